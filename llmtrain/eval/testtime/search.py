"""Searches for completions step by step, guided by scores of what is written so far (arXiv 2408.03314)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import inf

from llmtrain.data.sampler import derive
from llmtrain.eval.testtime.extend import Decode, Request, ends_with, extend
from llmtrain.eval.testtime.problems import Grade, Written
from llmtrain.rollout.generator import Generator
from llmtrain.types import Prompt, Sample, Sampling


@dataclass(frozen=True)
class Steps:
    """Says how wide a search is and where a step ends. `decode` shows special tokens too.

    Example: Steps(candidates=16, width=4, stop="\\n", step_tokens=64, decode=tokenizer.decode)
    """

    candidates: int  # N, of a problem at each step
    width: int  # M, continuations of a beam: N / M go on
    stop: str
    step_tokens: int
    decode: Decode


@dataclass
class Beam(Written):
    """Holds a partial or whole completion with its score."""

    score: float | None = None
    ended: bool = False  # by a stop, or at the limit: it goes on no more


@dataclass
class Found:
    """Holds what the search of one problem ends as."""

    done: list[Beam] = field(default_factory=list)
    tokens: int = 0  # written for it, those of dropped beams too
    steps: int = 0


def search(
    generator: Generator, prompts: Sequence[Prompt], sampling: Sampling, how: Steps, grade: Grade
) -> list[Found]:
    """Returns what N candidates of each prompt end as.

    N first steps are sampled and scored. A candidate that ended is kept and takes one of the N places; of the others
    the best go on, `width` continuations each, so that all places are filled again (the last of them with fewer). It
    ends when all places hold ended beams, which are cut at `sampling.max_new_tokens`. Equal scores: the first goes on;
    None is below every score.
    """
    found = [Found() for _ in prompts]
    going = [[(Beam(i), how.candidates)] for i in range(len(prompts))]  # by problem: beams, continuations of each
    stepping = replace(sampling, stop_strings=(*sampling.stop_strings, how.stop))
    while any(going):
        requests = [request_of(found, prompts, own, place, sampling, how) for own in going for place in range(len(own))]
        parents = [beam for own in going for beam, _ in own]
        candidates: list[list[Beam]] = [[] for _ in prompts]
        for beam, group in zip(parents, extend(generator, requests, stepping), strict=True):
            candidates[beam.problem] += [grown(beam, sample, sampling, how) for sample in group]
            found[beam.problem].tokens += sum(len(sample.ids) for sample in group)
        every = list(chain.from_iterable(candidates))
        for beam, score in zip(every, grade(every), strict=True):
            beam.score = score
        going = [selected(*each, how) for each in zip(found, candidates, strict=True)]
    return found


def request_of(
    found: Sequence[Found],
    prompts: Sequence[Prompt],
    going: Sequence[tuple[Beam, int]],
    place: int,
    sampling: Sampling,
    how: Steps,
) -> Request:
    """Asks for the next step of the beam at a place, with a stream of its own: equal beams differ from here on."""
    beam, count = going[place]
    prompt = prompts[beam.problem]
    stream = derive(prompt.seed, f"step/{found[beam.problem].steps}/{place}")
    return Request([*prompt.ids, *beam.ids], stream, room_of(beam, sampling, how), count)


def room_of(beam: Beam, sampling: Sampling, how: Steps) -> int:
    """Returns the most tokens of the next step of a beam."""
    return min(how.step_tokens, sampling.max_new_tokens - len(beam.ids))


def grown(beam: Beam, sample: Sample, sampling: Sampling, how: Steps) -> Beam:
    """Returns a beam with its next step. It has ended when the step ends as a completion does, when no room is left,
    and when the generator wrote less than it was asked for, as at the last position of the model."""
    ids, room = [*beam.ids, *sample.ids], room_of(beam, sampling, how)
    whole = sample.finished and ends_with(sample.ids, sampling, how.decode)
    short = not sample.ids or (not sample.finished and len(sample.ids) < room)
    ended = whole or short or len(ids) >= sampling.max_new_tokens
    return Beam(beam.problem, ids, [*beam.logprobs, *sample.logprobs], ended=ended)


def selected(found: Found, candidates: Sequence[Beam], how: Steps) -> list[tuple[Beam, int]]:
    """Keeps the candidates that ended, and returns those that go on with their number of continuations."""
    found.steps += bool(candidates)
    found.done += [beam for beam in candidates if beam.ended]
    places = how.candidates - len(found.done)
    rest = [beam for beam in candidates if not beam.ended]
    rest.sort(key=lambda beam: inf if beam.score is None else -beam.score)
    counts = [min(how.width, places - start) for start in range(0, places, how.width)]
    return list(zip(rest, counts, strict=False))
