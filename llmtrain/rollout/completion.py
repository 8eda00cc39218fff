"""Holds what is decoded for one sample: its tokens so far, its stream of random numbers, where it ends."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmtrain.rollout.stop import Stop
from llmtrain.types import Sample, Sampling


@dataclass(eq=False)
class Completion:
    """Holds one completion while it is decoded."""

    prompt_ids: list[int]
    group: int
    max_tokens: int  # prompt and completion together
    sampling: Sampling
    stop: Stop
    stream: random.Random
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the tokens before the weights changed
    experts: list[Tensor] = field(default_factory=list)  # of its inputs, where they are recorded

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.tokens)

    @property
    def stopped(self) -> bool:
        return self.stop(self.tokens)

    @property
    def done(self) -> bool:
        return self.stopped or self.length == self.max_tokens

    def uniform(self) -> float:
        """Returns the next random number of the stream in [0, 1); 24 bits, so that fp32 cannot round it to 1."""
        return self.stream.getrandbits(24) / 2**24

    def sample(self, version: int) -> Sample:
        n, experts = len(self.tokens), torch.cat(self.experts) if self.experts else None
        versions = self.versions + [version] * (n - len(self.versions))
        own = (self.tokens, [True] * n, self.logprobs, versions)
        return Sample(self.prompt_ids, *own, self.stopped, experts=experts)
