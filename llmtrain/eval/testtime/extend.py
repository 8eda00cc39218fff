"""Continues sequences from token ids, each by as much as it has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llmtrain.rollout.generator import Generator
from llmtrain.types import Group, Prompt, Sample, Sampling

Decode = Callable[[Sequence[int]], str]
"""Returns the text of tokens, special ones among them."""


@dataclass(frozen=True)
class Request:
    """Asks to continue `ids`, prompt and what follows it, by at most `room_tokens`. Example: Request([5, 7], 42, 16)"""

    ids: list[int]
    seed: int
    room_tokens: int
    samples: int = 1


def extend(generator: Generator, requests: Sequence[Request], sampling: Sampling) -> list[Group]:
    """Returns the continuations of each request, in their order.

    Requests for as many samples share a call, by the largest of their rooms. What one writes beyond its own room is cut
    off, as a call by itself would not have written it: a token depends on what stands before it and on its seed only.
    """
    found: dict[int, Group] = {}
    for samples in sorted({request.samples for request in requests}):
        numbers = [i for i, request in enumerate(requests) if request.samples == samples]
        prompts = [Prompt(requests[i].ids, requests[i].seed) for i in numbers]
        most = max(requests[i].room_tokens for i in numbers)
        groups = generator.generate(prompts, replace(sampling, max_new_tokens=most, num_samples=samples))
        for i, group in zip(numbers, groups, strict=True):
            found[i] = [cut(sample, requests[i].room_tokens) for sample in group]
    return [found[i] for i in range(len(requests))]


def cut(sample: Sample, room_tokens: int) -> Sample:
    """Returns the sample as it is where it fits, else its first `room_tokens`, unfinished."""
    if len(sample.ids) <= room_tokens:
        return sample
    kept = slice(room_tokens)
    return replace(
        sample,
        ids=sample.ids[kept],
        trained=sample.trained[kept],
        logprobs=sample.logprobs[kept],
        versions=sample.versions[kept],
        columns={name: values[kept] for name, values in sample.columns.items()},
        finished=False,
    )


def ends_with(ids: Sequence[int], sampling: Sampling, decode: Decode) -> bool:
    """Says whether a continuation ended as a whole completion does: by a stop token, or a stop string of `sampling`."""
    if ids and ids[-1] in sampling.stop_ids:
        return True
    text = decode(ids) if sampling.stop_strings else ""
    return any(string in text for string in sampling.stop_strings)
