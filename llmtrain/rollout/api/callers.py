"""Says what a client may ask, how it is encoded and sampled, and who hears the answer."""

from __future__ import annotations

import secrets
from typing import Protocol

from llmtrain.rollout.api.choices import Delta
from llmtrain.rollout.api.model import ServedModel
from llmtrain.rollout.api.requests import ChatRequest, CompletionRequest
from llmtrain.types import Sampling


class Caller(Protocol):
    """Stands for one client. Its methods raise Refused for what it cannot have."""

    def prompts(self, asked: ChatRequest | CompletionRequest) -> list[list[int]]:
        """Returns the token ids of each prompt of a request; of a chat there is one. Runs in a thread of its own."""

    def sampling(self, asked: ChatRequest | CompletionRequest, prompt_tokens: int) -> Sampling:
        """Returns how a prompt of so many tokens is continued."""

    def seed(self, asked: ChatRequest | CompletionRequest) -> int:
        """Returns the seed of the random streams of a request."""

    def heard(self, asked: ChatRequest | CompletionRequest, prompt: int, whole: Delta) -> None:
        """Is told of each choice that is complete: which prompt it continues, its tokens, what the client sees."""

    def left(self, asked: ChatRequest | CompletionRequest) -> None:
        """Is told that a request has ended, whether it was answered or not; perhaps twice."""


class Anyone:
    """Implements a `Caller` who gets what is asked for, and of whom nothing is kept."""

    def __init__(self, model: ServedModel) -> None:
        self.model, self.sampling = model, model.sampling

    def prompts(self, asked: ChatRequest | CompletionRequest) -> list[list[int]]:
        self.model.check_name(asked.model)
        return [self.model.conversation(asked)] if isinstance(asked, ChatRequest) else self.model.prompts(asked)

    def seed(self, asked: ChatRequest | CompletionRequest) -> int:
        return secrets.randbits(31) if asked.seed is None else asked.seed

    def heard(self, asked: ChatRequest | CompletionRequest, prompt: int, whole: Delta) -> None:
        return

    def left(self, asked: ChatRequest | CompletionRequest) -> None:
        return
