"""`llmtrain chat`: talk to the newest checkpoint of a run, or to a Hugging Face model, in the terminal."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llmtrain.arch.resolve import newest_step, resolve_model
from llmtrain.checkpoint.source import load_decoder
from llmtrain.config.chat import ChatOptions
from llmtrain.config.load import load
from llmtrain.config.machine import fast_precision
from llmtrain.config.schema import ModelConfig
from llmtrain.data.ends import end_ids
from llmtrain.data.sampler import derive
from llmtrain.data.search.store import Hit, Store, open_store
from llmtrain.data.stream import text_of
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.engine.precision import compute_dtype
from llmtrain.model.decoder import Decoder
from llmtrain.observe.log import log
from llmtrain.parallel.device import rank_device
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.stop import Decode
from llmtrain.trainer.job import open_tokenizer
from llmtrain.types import Prompt, Sampling

INTERRUPTED = 130  # exit code of a program that Ctrl-C has ended
Turn = tuple[str, list[int]]  # what was asked, and the tokens of the answer
WITH_PASSAGES = "Answer with the help of these passages.\n\n{passages}\n\nQuestion: {question}"
SHOWN_CHARACTERS = 160  # of a passage, for the user
LEAST_ROOM = 64  # tokens that an answer has at least, where earlier turns can be forgotten for it


def main(options: ChatOptions) -> int:
    """Answers `options.prompt`, or talks until the end of the input; returns the exit status.

    Raises ValueError when there is no model that generates at the path, or the prompt leaves no room for an answer.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may have another encoding
    tokenizer = tokenizer_of(options.path)
    if not tokenizer.bare:
        _ = tokenizer.hugging_face  # no answer does without it: what cannot be loaded is told before the first line
    store = None if options.store is None else open_store(options.store, device=str(rank_device()))
    talk = Talk(options, load_generator(options.path), tokenizer, store)
    if options.prompt is not None:
        talk.answer(options.prompt)
        return 0
    log(f"{options.path}, step {newest_step(options.path)}" if _is_run(options.path) else options.path)
    log("Ctrl-C ends an answer, and twice the program; so does Ctrl-D")
    return converse(talk)


def converse(talk: Talk) -> int:
    """Answers line by line until the input ends (0) or Ctrl-C comes twice with no line between (130). A line that
    cannot be answered is forgotten."""
    if terminal := sys.stdin.isatty() and sys.stdout.isatty():
        importlib.import_module("readline")  # lets `input` edit its line
    interrupted = False
    while True:
        try:
            line = input("> " if terminal else "")
            interrupted = False
            if line.strip():
                talk.answer(line)
        except EOFError:
            return 0
        except ValueError as error:
            talk.turns.pop()
            log(str(error))
        except KeyboardInterrupt:
            print()
            if interrupted:
                return INTERRUPTED
            interrupted = True


@dataclass
class Talk:
    """Holds a conversation: what the chat template shows of it, or, without one, a text that goes on."""

    options: ChatOptions
    generator: NativeGenerator
    tokenizer: Tokenizer
    store: Store | None = None
    turns: list[Turn] = field(default_factory=list)
    asked: int = 0
    hits: list[Hit] = field(default_factory=list)  # for the question that is being answered

    def __post_init__(self) -> None:
        self.ends = end_ids(self.tokenizer, (self.options.path, self.tokenizer.directory))
        if self.options.system and not self.tokenizer.has_chat:
            raise ValueError(f"--system: {self.tokenizer.directory} has no chat template, which would show it; drop it")

    def answer(self, text: str) -> None:
        """Prints the answer to a text, token by token; one that Ctrl-C ends is remembered as far as it came."""
        o, said = self.options, []
        self.turns.append((text, said))
        self.asked += 1
        self.hits = [] if self.store is None else self.store.search(text, o.passages)
        prompt = Prompt(self._fitting(), derive(o.seed, f"chat/{self.asked}"))
        self._tell_sources()
        sampling = Sampling(o.max_new_tokens, temperature=o.temperature, stop_ids=self.ends)
        for piece in text_of(_kept(self.generator.stream(prompt, sampling), said), self.tokenizer.decode):
            print(piece, end="", flush=True)
        print(flush=True)

    def _fitting(self) -> list[int]:
        """Returns the tokens of the conversation; the oldest turns are forgotten where they leave no room, then the
        passages that fit the question least are left out."""
        limit = self.generator.max_seq_tokens
        room = min(self.options.max_new_tokens, LEAST_ROOM, limit // 2)
        turns = self.turns
        while len(ids := self._ids(turns)) > limit - room and (len(turns) > 1 or self.hits):
            turns, self.hits = (turns[1:], self.hits) if len(turns) > 1 else (turns, self.hits[:-1])
        if len(turns) < len(self.turns) and len(ids) < limit:
            self.turns = turns
            log(f"the conversation is longer than {limit} tokens: its oldest turns are forgotten")
        return ids

    def _tell_sources(self) -> None:
        """Says which passages the model is given, each in a line."""
        for number, hit in enumerate(self.hits, 1):
            beginning = "".join(c if c.isprintable() else " " for c in hit.passage.text[:SHOWN_CHARACTERS])
            log(f"[{number}] {hit.passage.source}: {' '.join(beginning.split())}")
        if self.store is not None and not self.hits:
            log("no passage of the store is shown")

    def _with_passages(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Returns the turns with the passages before the last question; earlier ones stand without theirs."""
        if not self.hits:
            return turns
        *before, (text, said) = turns
        passages = "\n\n".join(hit.passage.text for hit in self.hits)
        return [*before, (WITH_PASSAGES.format(passages=passages, question=text), said)]

    def _ids(self, turns: Sequence[Turn]) -> list[int]:
        turns = self._with_passages(turns)
        if self.tokenizer.has_chat:
            return self.tokenizer.encode_chat(self._messages(turns))
        ids: list[int] = []
        for text, said in turns:
            more = self.tokenizer.encode(f"\n{text}", parse_special=False) if ids else self._first(text)
            ids += more + [token for token in said if token not in self.ends]
        return ids

    def _first(self, text: str) -> list[int]:
        ids = [*self.tokenizer.prefix_ids, *self.tokenizer.encode(text, parse_special=False)]
        if not ids:
            raise ValueError("chat: the prompt is empty; write one")
        return ids

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.options.system}] if self.options.system else []
        both = [[("user", text), ("assistant", self.tokenizer.decode(said))] for text, said in turns]
        spoken = [{"role": role, "content": text} for turn in both for role, text in turn]
        return system + spoken[:-1]  # the last answer is to come


def _kept(tokens: Iterator[int], said: list[int]) -> Iterator[int]:
    """Yields the tokens, and appends them to `said`."""
    for token in tokens:
        said.append(token)
        yield token


def load_generator(
    path: str, max_batch_seqs: int = 1, max_seq_tokens: int | None = None, decode: Decode | None = None
) -> NativeGenerator:
    """Returns a generator of the model at the path, on the GPU if there is one; the rest is as in `NativeGenerator`.
    Raises ValueError as `language_model` does."""
    model = load_model(path, language_model(path))
    return NativeGenerator(model, max_batch_seqs, rank_device(), max_seq_tokens, decode)


def language_model(path: str) -> ModelConfig:
    """Returns the architecture of the model at the path. Raises ValueError when there is none that generates."""
    model = resolve_model(ModelConfig(init_from=path))
    if model.head != "lm":
        raise ValueError(f"{path}: its head gives numbers instead of words (model.head={model.head}); give another")
    return model


def load_model(path: str, model: ModelConfig) -> Decoder:
    """Returns the model at the path, in the dtype that is fast here."""
    return load_decoder(path, model, compute_dtype(fast_precision()))


def tokenizer_of(path: str) -> Tokenizer:
    """Returns the tokenizer that goes with a run or a Hugging Face directory. Raises ValueError when the path is
    neither."""
    if os.path.isfile(os.path.join(path, "config.json")):
        return load_tokenizer(path)
    if _is_run(path):
        return open_tokenizer(load(os.path.join(path, "config.yaml"), []))
    stages = sorted(each.name for each in os.scandir(path) if each.is_dir() and _is_run(each.path))
    other = f"; give a stage of it: {', '.join(stages)}" if stages else "; give a run or a Hugging Face directory"
    raise ValueError(f"{path}: has neither config.json (Hugging Face) nor config.yaml and checkpoints (a run){other}")


def _is_run(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "config.yaml")) and os.path.isdir(os.path.join(path, "checkpoints"))
