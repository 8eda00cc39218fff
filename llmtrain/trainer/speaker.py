"""Lets one model of a document speak in this process: it answers prompts, and questions about its own answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.source import load_decoder
from llmtrain.config.schema import Config, ConstitutionalConfig, JudgeConfig
from llmtrain.data.asked import spoken
from llmtrain.data.chat import Message
from llmtrain.data.prompts import PromptSet
from llmtrain.data.sampler import derive
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.engine.precision import compute_dtype
from llmtrain.eval.continuations import continuation_logprobs
from llmtrain.parallel.device import rank_device
from llmtrain.rollout.native import NativeGenerator
from llmtrain.trainer.completions import completion_text, sampling_of, stop_text
from llmtrain.trainer.job import open_tokenizer
from llmtrain.types import Group, Prompt, Sample, Sampling

NEXT_TURN = "\n\nUser:"  # ends an answer where no chat template does


@dataclass(frozen=True)
class Question:
    """Holds a conversation that the model goes on with, the beginning of its answer, and the seed of its stream.

    Example: Question([{"role": "user", "content": "2+2?"}], "The answer is ", 42)
    """

    messages: list[Message]
    prefill: str = ""
    seed: int = 0


class Said(NamedTuple):
    """Holds an answer. Example: Said("4", finished=True)"""

    text: str
    finished: bool  # else it was cut at a limit


@dataclass
class Speaker:
    """Holds `model.init_from` of a document with all that it needs to speak."""

    config: Config
    tokenizer: Tokenizer
    generator: NativeGenerator
    sampling: Sampling  # as the section `rollout` says
    decode: Callable[[Sequence[int]], str]
    completions: int = 0  # how many it has written

    def sample(
        self,
        prompts: PromptSet,
        numbers: Sequence[int],
        purpose: str,
        samples: int | None = None,
        greedy: bool = False,
    ) -> list[Group]:
        """Returns a group of `samples` (None: `rollout.group_size`) for each of these numbers of prompts, in the order
        of the document's seed (`PromptSet.around`), or one greedy sample each."""
        chosen = [prompts.around(number, self.config.seed) for number in numbers]
        streams = [derive(self.config.seed, f"{purpose}/{number}") for number in numbers]
        asked = [Prompt(prompts.prompt_ids(i), stream) for i, stream in zip(chosen, streams, strict=True)]
        request = replace(self.sampling, num_samples=1 if greedy else samples or self.sampling.num_samples)
        request = replace(request, temperature=0.0) if greedy else request
        groups = self.write(asked, request)
        for group, i in zip(groups, chosen, strict=True):
            for sample in group:
                sample.example = prompts.examples[i]
        return groups

    def answer(self, questions: Sequence[Question], tokens: int, samples: int = 1) -> list[list[Said] | None]:
        """Returns `samples` answers of at most `tokens` tokens to each question; None for a question that leaves no
        room for them in `train.seq_len`."""
        ids = [self.encode(question) for question in questions]
        fits = [i for i, each in enumerate(ids) if 0 < len(each) <= self.config.train.seq_len - tokens]
        ends = () if self.tokenizer.has_chat else (NEXT_TURN,)
        request = replace(self.sampling, max_new_tokens=tokens, num_samples=samples, stop_strings=ends)
        groups = self.write([Prompt(ids[i], questions[i].seed) for i in fits], request) if fits else []
        found = dict(zip(fits, groups, strict=True))
        return [[self.said(sample) for sample in found[i]] if i in found else None for i in range(len(ids))]

    def write(self, prompts: Sequence[Prompt], request: Sampling) -> list[Group]:
        """Returns a group of completions for each prompt, and counts them."""
        groups = self.generator.generate(prompts, request)
        self.completions += sum(map(len, groups))
        return groups

    def said(self, sample: Sample) -> Said:
        """Returns an answer without what ended it."""
        text = self.decode(sample.ids)
        return Said((text if self.tokenizer.has_chat else text.partition(NEXT_TURN)[0]).strip(), sample.finished)

    def encode(self, question: Question) -> list[int]:
        """Returns the tokens of a conversation up to where its answer goes on: by the chat template, or as plain
        text."""
        if self.tokenizer.has_chat:
            return self.tokenizer.encode_chat(question.messages, question.prefill)
        text = f"{spoken(question.messages)}\n\nAssistant: {question.prefill}".rstrip(" ")
        return [*self.tokenizer.prefix_ids, *self.tokenizer.encode(text, parse_special=False)]

    def choose(self, questions: Sequence[Question], choices: Sequence[str]) -> list[list[float] | None]:
        """Returns for each question the log-prob of every choice behind its prefill; None for a question that leaves no
        room. A choice is encoded together with what stands before it."""
        rows: list[list[tuple[list[int], list[int]]]] = []
        for question in questions:
            whole = [self.encode(replace(question, prefill=question.prefill + choice)) for choice in choices]
            shared = shared_length(whole)
            rows.append([(ids[:shared], ids[shared:]) for ids in whole])
        limit = self.config.train.seq_len
        fits = [all(given and len(given) + len(more) <= limit for given, more in row) for row in rows]
        asked = list(chain.from_iterable(row for row, fit in zip(rows, fits, strict=True) if fit))
        values = iter(continuation_logprobs(self.generator.model, asked, self.generator.device))
        return [[next(values) for _ in choices] if fit else None for fit in fits]


def numbers_of(name: str, settings: JudgeConfig | ConstitutionalConfig, prompts: PromptSet) -> range:
    """Returns the numbers of the prompts that the section `name` asks for. Raises ValueError when it asks for more than
    there are, as rows would be written twice."""
    if settings.prompts > len(prompts):
        raise ValueError(
            f"{name}.prompts={settings.prompts}: must be at most {len(prompts)}, the rows of data.train that can be "
            "used, as none is asked twice; lower it, or give more rows"
        )
    first = settings.first + settings.round * settings.prompts
    return range(first, first + settings.prompts)


def shared_length(rows: Sequence[list[int]]) -> int:
    """Returns how many first tokens all rows share, so that something of each is left."""
    most = min(map(len, rows)) - 1
    return next((i for i in range(most) if len({row[i] for row in rows}) > 1), most)


def open_speaker(config: Config) -> Speaker:
    """Returns the model of `model.init_from`, on the GPU if there is one. Raises ValueError as `load_decoder` does."""
    device, tokenizer = rank_device(), open_tokenizer(config)
    model = load_decoder(config.model.init_from, resolve_model(config.model), compute_dtype(config.engine.precision))
    generator = NativeGenerator(
        model.to(device).eval(), config.rollout.max_batch_seqs, device, config.train.seq_len, stop_text(tokenizer)
    )
    return Speaker(config, tokenizer, generator, sampling_of(config, tokenizer), completion_text(config, tokenizer))
