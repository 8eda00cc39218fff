"""Turns the tokens of a choice into what a client sees of them: text up to a stop string, and tool calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmtrain.data.calls import Call, CallStream
from llmtrain.data.stream import TextStream, unsure
from llmtrain.rollout.continuous import Token


@dataclass
class Delta:
    """Holds what tokens add to a choice."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    end: str | None = None  # stop, length, tool_calls; None = more follows

    def add(self, other: Delta) -> None:
        """Appends what comes next."""
        self.text += other.text
        self.calls += other.calls
        self.tokens += other.tokens
        self.end = other.end


class Choice:
    """Reads the tokens of one choice as they come. Neither a stop string nor what stands behind it is shown, nor a stop
    token. With `calls` these are told from text."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str],
        stop_ids: Sequence[int],
        calls: CallStream | None = None,
    ) -> None:
        self.stream, self.stops, self.stop_ids, self.calls = TextStream(decode), stops, stop_ids, calls
        self.called = False
        self.held = ""  # text that may be the beginning of a stop string
        self.over = False  # a stop string has come

    def push(self, token: Token) -> Delta:
        """Returns what a token adds."""
        text = "" if token.end == "stop" and token.id in self.stop_ids else self.stream.push(token.id)
        text = self._before_stop(text + (self.stream.rest() if token.end else ""), last=token.end is not None)
        delta = Delta(text, [], [token], token.end)
        if self.calls is not None:
            delta.text, delta.calls = self.calls.push(text)
            delta.text += self.calls.rest() if token.end else ""
            self.called = self.called or bool(delta.calls)
            delta.end = "tool_calls" if self.called and token.end == "stop" else token.end
        return delta

    def _before_stop(self, text: str, last: bool) -> str:
        """Returns the text that may be shown now."""
        if self.over:
            return ""
        text = self.held + text
        found = [at for at in map(text.find, self.stops) if at >= 0]
        self.over = bool(found)
        sure = min(found) if found else len(text) if last else len(text) - unsure(text, self.stops)
        self.held = text[sure:]
        return text[:sure]
