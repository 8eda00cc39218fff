"""Holds the model that is served: from requests to token ids and sampling, and to the tokens that come of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from llmtrain.data.chat import Message
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.rollout.api.refused import Refused
from llmtrain.rollout.api.requests import ChatRequest, CompletionRequest, shown
from llmtrain.rollout.continuous import Request, Streams, Token
from llmtrain.types import Prompt, Sampling

if TYPE_CHECKING:
    from llmtrain.rollout.api.callers import Caller

MOST_SEQUENCES = 1024  # decoded or waiting; above it the client is told to come again


@dataclass
class ServedModel:
    """Holds a model with its name and its tokenizer, and what decodes its requests."""

    name: str
    tokenizer: Tokenizer
    ends: tuple[int, ...]  # tokens that end an answer
    continuous: Streams
    created: int = field(default_factory=lambda: int(time.time()))

    def check_name(self, name: str) -> None:
        """Raises Refused when another model is asked for."""
        if name != self.name:
            message = f"model={shown(name)}: is not served here; ask for {self.name!r} (GET /v1/models lists it)"
            raise Refused(404, message, "model", "model_not_found")

    def prompts(self, asked: CompletionRequest) -> list[list[int]]:
        """Returns the token ids of each prompt. Raises Refused as `check_prompt` does."""
        prefix = self.tokenizer.prefix_ids if asked.add_special_tokens else []
        encode = self.tokenizer.encode
        rows = [[*prefix, *encode(p, parse_special=False)] if isinstance(p, str) else p for p in asked.prompt]
        for ids in rows:
            self.check_prompt(ids, asked.limit, "prompt")
        return rows

    def conversation(self, asked: ChatRequest) -> list[int]:
        """Returns the token ids of a conversation, up to the start of the next turn. Raises Refused where there is no
        template, or it refuses the messages."""
        messages = [message_of(turn.model_dump(exclude_unset=True)) for turn in asked.messages]
        kwargs = asked.chat_template_kwargs
        try:
            ids = self.tokenizer.encode_chat(messages, tools=asked.shown_tools, kwargs=kwargs)
        except ValueError as error:
            raise Refused(400, str(error), "messages") from None
        self.check_prompt(ids, asked.limit or 1, "messages")
        return ids

    def check_prompt(self, ids: Sequence[int], wanted: int, param: str) -> None:
        """Raises Refused for a prompt that leaves no room for so many tokens, or has some that the model lacks. Clients
        look for the words `context length`."""
        limit = self.continuous.max_seq_tokens
        if not ids:
            raise Refused(400, f"{param}: has no tokens; write something", param)
        if len(ids) + wanted > limit:
            message = (
                f"{param} of {len(ids)} tokens and max_tokens={wanted}: together they must be at most {limit}, the "
                "context length here; shorten the one or lower the other"
            )
            raise Refused(400, message, param, "context_length_exceeded")
        vocab_size = self.continuous.vocab_size
        if max(ids) >= vocab_size:
            raise Refused(400, f"{param}: token {max(ids)} must be below {vocab_size}, the vocabulary's size", param)

    def check_sampling(self, sampling: Sampling, top: int | None) -> None:
        """Raises Refused for what the generator cannot sample, or cannot tell of it."""
        if why := self.continuous.refuses(sampling, top):
            raise Refused(422, why, why.partition("=")[0].partition(":")[0])

    def sampling(self, asked: ChatRequest | CompletionRequest, prompt_tokens: int) -> Sampling:
        """Returns how a prompt of so many tokens is continued."""
        stops = tuple(dict.fromkeys((*self.ends, *(asked.stop_token_ids or ()))))
        return Sampling(
            asked.limit or self.continuous.max_seq_tokens - prompt_tokens,
            asked.n or 1,
            1.0 if asked.temperature is None else asked.temperature,
            1.0 if asked.top_p is None else asked.top_p,
            max(0, asked.top_k or 0),
            stops,
            tuple(asked.stop),
        )

    async def tokens(
        self, asked: ChatRequest | CompletionRequest, prompts: Sequence[list[int]], caller: Caller
    ) -> AsyncIterator[tuple[int, Token]]:
        """Yields the tokens of all choices, each with the number of its choice. Whoever leaves before the end frees
        the places. Raises Refused when too many wait, else what went wrong."""
        n, seed = asked.n or 1, caller.seed(asked)
        if self.continuous.sequences + n * len(prompts) > MOST_SEQUENCES:
            raise Refused(429, f"more than {MOST_SEQUENCES} sequences would wait; ask for less, or later")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        numbers = []

        def deliver(place: int, each: Token | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, (place, each))

        try:
            for place, ids in enumerate(prompts):
                told, sampling = partial(deliver, place), caller.sampling(asked, len(ids))
                request = Request(Prompt(ids, seed), sampling, told, asked.top)
                numbers.append(self.continuous.submit(request))
            left = n * len(prompts)
            while left:
                place, each = await queue.get()
                if isinstance(each, Exception):
                    raise each
                left -= each.end is not None
                yield place * n + each.sample, each
        finally:
            for number in numbers:
                self.continuous.drop(number)

    async def echoed(self, ids: Sequence[int], top: int) -> list[Token]:
        """Returns what the model says of each token of a prompt but the first, at temperature 1."""
        return await asyncio.wrap_future(self.continuous.scored(ids, top))


def message_of(turn: Message) -> Message:
    """Returns a message as templates expect it: the arguments of its calls as an object, where they are the JSON of
    one, and a text where the content is null."""
    turn = {**turn, "content": turn.get("content") or ""}
    if turn.get("tool_calls"):
        turn["tool_calls"] = [{**each, "function": _function(each["function"])} for each in turn["tool_calls"]]
    else:
        turn.pop("tool_calls", None)
    return turn


def _function(function: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(function.get("arguments", ""))
    except (TypeError, ValueError, RecursionError):
        return function
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function
