"""Converts groups of samples to bytes and back: safetensors, no pickle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from safetensors.torch import load, save
from torch import Tensor

from llmtrain.types import Group, Sample

DTYPES = {"ids": torch.int32, "trained": torch.uint8, "logprobs": torch.float32, "versions": torch.int32}
"""Maps the lists of a sample that are sent, one value a token, to their dtypes."""
Prompts = Sequence[list[int]] | Mapping[int, list[int]]
"""Maps the number of a prompt to its ids."""


def pack(groups: Mapping[int, Group], prompts: Prompts = ()) -> Tensor:
    """Returns groups, by the number of their prompt, as a uint8 tensor.

    `prompts[number]` are the ids that the receiver asked for, and has: they are not sent. A group that shares another
    prompt sends it; what an environment said of a sample (`parts`, `errors`) is sent where it is. What only a trainer
    fills in is not.
    """
    return torch.frombuffer(bytearray(save(tensors_of(groups, prompts))), dtype=torch.uint8)


def unpack(data: Tensor, prompts: Prompts) -> dict[int, Group]:
    """Returns what `pack` was given; `prompts[number]` are the ids that were asked for."""
    return groups_of(load(data.numpy().tobytes()), prompts)


def tensors_of(groups: Mapping[int, Group], prompts: Prompts = ()) -> dict[str, Tensor]:
    """Returns what `pack` sends, as tensors: a list of values for all tokens by its name, `heads` [samples, 3]: the
    number of the prompt, the tokens, and whether the sample is finished; `notes`, JSON, where there are any; and
    `experts`, where the generator recorded them."""
    samples = [(number, s) for number, group in groups.items() for s in group]
    heads = [[number, len(s.ids), int(s.finished)] for number, s in samples]
    tensors = {
        name: torch.tensor([x for _, s in samples for x in getattr(s, name)], dtype=d) for name, d in DTYPES.items()
    }
    tensors["heads"] = torch.tensor(heads, dtype=torch.int64).view(-1, 3)
    own = {n: g[0].prompt_ids for n, g in groups.items() if g and prompts and g[0].prompt_ids != prompts[n]}
    judged = {i: [s.parts, s.errors] for i, (_, s) in enumerate(samples) if s.parts or s.errors}
    attempts = {i: s.attempt for i, (_, s) in enumerate(samples) if s.attempt is not None}
    if own or judged or attempts:
        notes = json.dumps({"prompts": own, "judged": judged, "attempts": attempts}).encode()
        tensors["notes"] = torch.frombuffer(bytearray(notes), dtype=torch.uint8)
    if samples and samples[0][1].experts is not None:
        tensors["experts"] = torch.cat(list(expert_parts(groups.values())))
    return tensors


def groups_of(tensors: Mapping[str, Tensor], prompts: Prompts) -> dict[int, Group]:
    """Returns what `tensors_of` was given."""
    lists = {name: tensors[name].tolist() for name in DTYPES}
    lists["trained"] = [bool(x) for x in lists["trained"]]
    nothing = {"prompts": {}, "judged": {}, "attempts": {}}
    notes = json.loads(bytes(tensors["notes"].tolist())) if "notes" in tensors else nothing
    heads = tensors["heads"].tolist()
    asked = {number: notes["prompts"].get(str(number)) or prompts[number] for number, *_ in heads}
    experts = whole_experts(tensors.get("experts"), heads, asked)
    groups: dict[int, Group] = {}
    at = 0
    for i, ((number, count, finished), chosen) in enumerate(zip(heads, experts, strict=True)):
        own = {name: values[at : at + count] for name, values in lists.items()}
        parts, errors = notes["judged"].get(str(i), ({}, {}))
        own |= {"finished": bool(finished), "parts": parts, "errors": errors, "experts": chosen}
        own["attempt"] = notes["attempts"].get(str(i))
        groups.setdefault(number, []).append(Sample(asked[number], **own))
        at += count
    return groups


def expert_parts(groups: Iterable[Group]) -> Iterator[Tensor]:
    """Yields the experts of each prompt once, then those of what each of its samples added."""
    for group in groups:
        tokens = len(group[0].prompt_ids)
        yield group[0].experts[:tokens]
        yield from (sample.experts[tokens:] for sample in group)


def whole_experts(
    parts: Tensor | None, heads: Sequence[Sequence[int]], prompts: Mapping[int, list[int]]
) -> Iterator[Tensor | None]:
    """Yields the experts of each sample, given as (number of its prompt, tokens, ...), of what `expert_parts` gave."""
    at, last, prompt = 0, None, None
    for number, count, *_ in heads:
        if parts is None:
            yield None
            continue
        if number != last:
            last, prompt = number, parts[at : at + len(prompts[number])]
            at += len(prompt)
        yield torch.cat([prompt, parts[at : at + count - 1]])
        at += count - 1
