"""Converts groups of samples to bytes and back: safetensors, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

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
    number of the prompt, the tokens, and whether the sample is finished; and `notes`, JSON, where there are any."""
    samples = [(number, s) for number, group in groups.items() for s in group]
    heads = [[number, len(s.ids), int(s.finished)] for number, s in samples]
    tensors = {
        name: torch.tensor([x for _, s in samples for x in getattr(s, name)], dtype=d) for name, d in DTYPES.items()
    }
    tensors["heads"] = torch.tensor(heads, dtype=torch.int64).view(-1, 3)
    own = {n: g[0].prompt_ids for n, g in groups.items() if g and prompts and g[0].prompt_ids != prompts[n]}
    judged = {i: [s.parts, s.errors] for i, (_, s) in enumerate(samples) if s.parts or s.errors}
    if own or judged:
        notes = json.dumps({"prompts": own, "judged": judged}).encode()
        tensors["notes"] = torch.frombuffer(bytearray(notes), dtype=torch.uint8)
    return tensors


def groups_of(tensors: Mapping[str, Tensor], prompts: Prompts) -> dict[int, Group]:
    """Returns what `tensors_of` was given."""
    lists = {name: tensors[name].tolist() for name in DTYPES}
    lists["trained"] = [bool(x) for x in lists["trained"]]
    notes = json.loads(bytes(tensors["notes"].tolist())) if "notes" in tensors else {"prompts": {}, "judged": {}}
    groups: dict[int, Group] = {}
    at = 0
    for i, (number, count, finished) in enumerate(tensors["heads"].tolist()):
        own = {name: values[at : at + count] for name, values in lists.items()}
        prompt_ids = notes["prompts"].get(str(number)) or prompts[number]
        parts, errors = notes["judged"].get(str(i), ({}, {}))
        groups.setdefault(number, []).append(
            Sample(prompt_ids, **own, finished=bool(finished), parts=parts, errors=errors)
        )
        at += count
    return groups
