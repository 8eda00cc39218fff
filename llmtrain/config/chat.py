"""Reads the arguments of `llmtrain chat`, which takes a path and options in place of a configuration."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from llmtrain.config.document import ConfigError
from llmtrain.config.hub import fetch, is_name

CHAT_USAGE = (
    "llmtrain chat RUN|DIRECTORY [--prompt TEXT] [--system TEXT] [--temperature T] [--max-new-tokens N] [--seed N] "
    "[--store DIRECTORY] [--passages N]"
)


@dataclass(frozen=True)
class ChatOptions:
    """Says whom to talk to, and how it answers.

    Example: ChatOptions("runs/quickstart/sft", prompt="What is 1 + 1?", temperature=0.0)
    """

    path: str  # a run or a Hugging Face directory
    prompt: str | None = None  # None: a conversation in the terminal
    system: str | None = None  # what the chat template shows before the first turn
    temperature: float = 0.7  # 0: always the likeliest token
    max_new_tokens: int = 512  # of one answer
    seed: int = 0  # the same answers to the same questions
    store: str | None = None  # of `llmtrain index`: each question is answered with passages that are found there
    passages: int = 3  # that are found for a question


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"chat: {message}; {CHAT_USAGE}")


def chat_options(arguments: Sequence[str]) -> ChatOptions:
    """Returns what the arguments say; a name on the hub is fetched. Raises ConfigError."""
    default = ChatOptions("")
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("path", metavar="RUN|DIRECTORY")
    parser.add_argument("--prompt", type=text)
    parser.add_argument("--system", type=text)
    parser.add_argument("--temperature", type=temperature, default=default.temperature)
    parser.add_argument("--max-new-tokens", type=count, default=default.max_new_tokens)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--store")
    parser.add_argument("--passages", type=count)
    given = parser.parse_args(list(arguments))
    if given.passages is not None and given.store is None:
        raise ConfigError(f"chat: --passages {given.passages}: is read with --store alone; give one, or leave it out")
    options = ChatOptions(**{**vars(given), "passages": given.passages or default.passages})
    if is_name(options.path):
        return ChatOptions(**{**vars(options), "path": fetch(options.path, options.path)})
    if not os.path.isdir(options.path):
        raise ConfigError(f"{options.path}: no such directory; give that of a run or of a Hugging Face model")
    return options


def text(written: str) -> str:
    """Returns the text. Raises ArgumentTypeError when it is not UTF-8."""
    if any("\ud800" <= character <= "\udfff" for character in written):  # how Python hands over other bytes
        raise argparse.ArgumentTypeError("is not UTF-8")
    return written


def temperature(written: str) -> float:
    """Returns the number. Raises ArgumentTypeError when it is no temperature."""
    value = float(written)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{written}: must be 0 (the likeliest token) or more")
    return value


def count(written: str) -> int:
    """Returns the number. Raises ArgumentTypeError when it is below 1."""
    value = int(written)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{written}: must be at least 1")
    return value
