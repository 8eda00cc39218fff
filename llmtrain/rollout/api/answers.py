"""Writes answers in the form of the OpenAI protocol, whole and in pieces, with the token ids that vLLM adds."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llmtrain.data.calls import Call, CallStream
from llmtrain.data.chat import OPEN as THOUGHT
from llmtrain.data.stream import UNFINISHED, TextStream
from llmtrain.rollout.api.choices import Choice, Delta
from llmtrain.rollout.api.model import ServedModel
from llmtrain.rollout.api.requests import ChatRequest, CompletionRequest
from llmtrain.rollout.continuous import Token

Json = dict[str, Any]
END_TOKENS = 16  # of a prompt, in which <think> and white space fit
LOWEST = -9999.0  # what vLLM writes for minus infinity


@dataclass
class Answer:
    """Holds what an answer to one request is written from; `prompts` are those of the request, as token ids."""

    model: ServedModel
    asked: ChatRequest | CompletionRequest
    prompts: list[list[int]]
    prompt_tokens: list[list[Token]] = field(default_factory=list)  # of each prompt that is echoed with log-probs
    choices: list[Choice] = field(default_factory=list)
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        a, tokenizer = self.asked, self.model.tokenizer
        self.chat = isinstance(a, ChatRequest)
        stop_ids = (*self.model.ends, *(a.stop_token_ids or ()))
        tools = isinstance(a, ChatRequest) and a.shown_tools is not None
        thinking = tools and self._thinking()
        self.decode = partial(tokenizer.decode, skip_special=a.skip_special_tokens)
        calls = [CallStream(thinking) if tools else None for _ in range(len(self.prompts) * (a.n or 1))]
        self.choices = [Choice(self.decode, a.stop, stop_ids, each) for each in calls]
        self.calls = [0] * len(self.choices)  # of each choice: how many are told
        self.offsets = [Offsets(self.decode) for _ in self.choices]
        self.begun: set[int] = set()  # choices of which something is streamed

    def _thinking(self) -> bool:
        """Returns whether the chat template has opened a thought, in which the answer then begins."""
        end = self.model.tokenizer.decode(self.prompts[0][-END_TOKENS:], skip_special=False)
        return end.rstrip().endswith(THOUGHT)

    def prompt_of(self, number: int) -> int:
        """Returns which prompt a choice continues."""
        return number // (self.asked.n or 1)

    def head(self, chunk: bool) -> Json:
        """Returns what every answer begins with."""
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if chunk else "chat.completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model.name}

    def whole(self, deltas: Sequence[Delta]) -> Json:
        """Returns the answer that is not streamed."""
        choices = [self._choice(number, delta) for number, delta in enumerate(deltas)]
        ids = {"prompt_token_ids": self.prompts[0]} if self.chat and self.asked.return_token_ids else {}
        usage = self.usage(sum(len(delta.tokens) for delta in deltas))
        return {**self.head(chunk=False), "choices": choices, "usage": usage, **ids}

    def pieces(self, number: int, delta: Delta) -> list[Json]:
        """Returns what is streamed next of a choice; nothing where there is nothing to tell yet."""
        a, pieces = self.asked, []
        if self.chat and number not in self.begun:
            ids = {"prompt_token_ids": self.prompts[0]} if a.return_token_ids else {}
            start = {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            pieces.append({**self.head(chunk=True), "choices": [start], **ids})
        if delta.text or delta.calls or delta.end or a.return_token_ids or a.top is not None:
            pieces.append({**self.head(chunk=True), "choices": [self._choice(number, delta, "delta")]})
        self.begun.update([number] if pieces else [])
        return pieces

    def usage(self, completion_tokens: int) -> Json:
        """Returns what was read and written, in tokens."""
        prompt = sum(map(len, self.prompts))
        total = prompt + completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion_tokens, "total_tokens": total}

    def _choice(self, number: int, delta: Delta, part: str = "message") -> Json:
        a, at = self.asked, self.prompt_of(number)
        token_ids = {"token_ids": [t.id for t in delta.tokens]} if a.return_token_ids else {}
        if not self.chat:
            first = a.return_token_ids and number not in self.begun
            prompt_ids = {"prompt_token_ids": self.prompts[at]} if first else {}
            text = (self.decode(self.prompts[at]) if a.echo else "") + delta.text
            told = {"text": text, "logprobs": self._columns(number, delta.tokens), "finish_reason": delta.end}
            return {"index": number, **told, **prompt_ids, **token_ids}
        said = {"content": delta.text or None} if part == "delta" or delta.calls else {"content": delta.text}
        said |= {"role": "assistant"} if part == "message" else {}
        said |= {"tool_calls": self._calls(number, delta.calls, part)} if delta.calls else {}
        content = [self._token(t) for t in delta.tokens]
        logprobs = None if a.top is None else {"content": content, "refusal": None}
        return {"index": number, part: said, "logprobs": logprobs, "finish_reason": delta.end, **token_ids}

    def _calls(self, number: int, calls: Sequence[Call], part: str) -> list[Json]:
        found = []
        for call in calls:
            function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
            place = {"index": self.calls[number]} if part == "delta" else {}
            found.append({**place, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
            self.calls[number] += 1
        return found

    def _name(self, id_: int) -> str:
        """Returns how a token is called beside its log-prob."""
        if self.asked.return_tokens_as_token_ids:
            return f"token_id:{id_}"
        return self.model.tokenizer.decode([id_], skip_special=False)

    def _token(self, token: Token) -> Json:
        """Returns a token of a chat, with the likeliest ones at its place."""
        return {**self._named(token.id, token.plain), "top_logprobs": [self._named(*each) for each in token.top]}

    def _named(self, id_: int, logprob: float | None) -> Json:
        text = self.model.tokenizer.decode([id_], skip_special=False)
        return {
            "token": self._name(id_),
            "logprob": _written(logprob),
            "bytes": None if UNFINISHED in text else list(text.encode()),
        }

    def _columns(self, number: int, tokens: Sequence[Token]) -> Json | None:
        """Returns the log-probs of a completion, those of an echoed prompt in front, whose first token has none."""
        if self.asked.top is None:
            return None
        at, echo = self.prompt_of(number), self.asked.echo
        told = [*(self.prompt_tokens[at] if echo else ()), *tokens]
        rows = [(t.id, _written(t.plain), self._likeliest(t)) for t in told]
        ids, values, tops = map(list, zip(*([(self.prompts[at][0], None, None)] if echo else []), *rows, strict=True))
        names = [self._name(id_) for id_ in ids]
        places = self.offsets[number](ids)
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": places}

    def _likeliest(self, token: Token) -> dict[str, float]:
        """Returns the likeliest tokens at a place by their names; of those with one name the likeliest."""
        return {self._name(id_): _written(value) for id_, value in reversed(token.top)}


class Offsets:
    """Tells at which character of a text its tokens begin, as they come."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.stream, self.at = TextStream(decode), 0

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """Returns the places of the next tokens."""
        found = []
        for id_ in ids:
            found.append(self.at)
            self.at += len(self.stream.push(id_))
        return found


def _written(logprob: float | None) -> float | None:
    """Returns a log-prob for JSON, which has no word for minus infinity."""
    return None if logprob is None else max(logprob, LOWEST)
