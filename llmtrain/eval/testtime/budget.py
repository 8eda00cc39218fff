"""Forces the length of the thinking part of completions (s1, arXiv 2501.19393): longer by a wait, shorter by a cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llmtrain.data.sampler import derive
from llmtrain.eval.testtime.extend import Decode, Request, ends_with, extend
from llmtrain.rollout.generator import Generator
from llmtrain.types import Prompt, Sample, Sampling


@dataclass(frozen=True)
class Forcing:
    """Says how thinking is forced, all in token ids. `decode` shows special tokens too.

    Example: Forcing(64, 1, "</think>", wait_ids=[30], close_ids=[31, 32], answer_tokens=16, decode=tokenizer.decode)
    """

    budget_tokens: int  # thinking at most, waits included
    waits: int  # times at most
    end: str | None  # by which the model ends its thinking; None: it thinks until it stops
    wait_ids: list[int]
    close_ids: list[int]
    answer_tokens: int
    decode: Decode


@dataclass
class Forced:
    """Holds one completion while it is forced."""

    problem: int
    prompt: Prompt
    ids: list[int] = field(default_factory=list)  # behind the prompt, what was put in among them
    lost_tokens: int = 0  # written by the model, and taken out for a wait
    waits: int = 0  # that were put in
    cut: bool = False  # at the budget
    stopped: bool = False  # by itself, as a whole completion

    @property
    def tokens(self) -> int:
        """Returns the tokens spent: written or put in, and those that were taken out again."""
        return len(self.ids) + self.lost_tokens

    def request(self, purpose: str, room_tokens: int) -> Request:
        return Request([*self.prompt.ids, *self.ids], derive(self.prompt.seed, purpose), room_tokens)


def forced(
    generator: Generator, prompts: Sequence[Prompt], samples: int, sampling: Sampling, how: Forcing
) -> list[Forced]:
    """Returns `samples` completions of each prompt, those of a prompt together.

    Thinking goes on until `budget_tokens`, where it is cut and `close_ids` follow, or until the model ends it: by
    `end`, or by what ends a completion in `sampling`. While waits are left and one fits, an end is taken out and
    `wait_ids` stand in its place. Behind thinking that was cut, or ended by `end`, the model writes an answer. It goes
    on from the ids of prompt and completion always; nothing that it wrote is encoded again.
    """
    streams = [Prompt(p.ids, derive(p.seed, f"forced/{j}")) for p in prompts for j in range(samples)]
    every = [Forced(i // samples, prompt) for i, prompt in enumerate(streams)]
    strings = sampling.stop_strings if how.end is None else (*sampling.stop_strings, how.end)
    thinking, waiting = replace(sampling, stop_strings=strings), every
    while waiting:
        requests = [each.request(f"thought/{each.waits}", how.budget_tokens - len(each.ids)) for each in waiting]
        groups = extend(generator, requests, thinking)
        waiting = [each for each, (s,) in zip(waiting, groups, strict=True) if goes_on(each, s, sampling, how)]
    open_ones = [each for each in every if not each.stopped]
    for each in open_ones:
        each.ids += how.close_ids if each.cut else []
    requests = [each.request("answer", how.answer_tokens) for each in open_ones]
    for each, (sample,) in zip(open_ones, extend(generator, requests, sampling), strict=True):
        each.ids += sample.ids
    return every


def goes_on(each: Forced, sample: Sample, sampling: Sampling, how: Forcing) -> bool:
    """Adds what was thought, and a wait where one is due; says whether more thinking follows."""
    if not sample.finished:
        each.ids, each.cut = each.ids + sample.ids, True
        return False
    kept = before_end(sample.ids, sampling, how)
    if each.waits < how.waits and len(each.ids) + len(kept) + len(how.wait_ids) < how.budget_tokens:
        each.ids = [*each.ids, *kept, *how.wait_ids]
        each.lost_tokens += len(sample.ids) - len(kept)
        each.waits += 1
        return True
    each.stopped = not _thought(sample.ids, how) and ends_with(sample.ids, sampling, how.decode)
    each.ids = each.ids + sample.ids
    return False


def before_end(ids: list[int], sampling: Sampling, how: Forcing) -> list[int]:
    """Returns the tokens before what ended them; a token that holds a part of the end is left out whole."""
    if ids and ids[-1] in sampling.stop_ids:
        return ids[:-1]
    text = how.decode(ids)
    marks = [text.find(mark) for mark in (*sampling.stop_strings, how.end) if mark and mark in text]
    before = text[: min(marks)] if marks else text
    return next((ids[:k] for k in range(len(ids), 0, -1) if before.startswith(how.decode(ids[:k]))), [])


def _thought(ids: list[int], how: Forcing) -> bool:
    """Says whether the thinking was ended by its end, so that an answer follows."""
    return how.end is not None and how.end in how.decode(ids)
