"""Converts groups of samples to bytes and back: safetensors, no pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import load, save
from torch import Tensor

from llmtrain.types import Group, Sample

DTYPES = {"ids": torch.int32, "trained": torch.uint8, "logprobs": torch.float32, "versions": torch.int32}
"""Maps the lists of a sample that are sent, one value a token, to their dtypes."""


def pack(groups: Mapping[int, Group]) -> Tensor:
    """Returns groups, by the number of their prompt, as a uint8 tensor.

    Prompts are not sent: the receiver asked for them and has them. Neither is what only a trainer fills in.
    """
    samples = [(number, s) for number, group in groups.items() for s in group]
    heads = [[number, len(s.ids), int(s.finished)] for number, s in samples]
    tensors = {
        name: torch.tensor([x for _, s in samples for x in getattr(s, name)], dtype=d) for name, d in DTYPES.items()
    }
    tensors["heads"] = torch.tensor(heads, dtype=torch.int64).view(-1, 3)
    return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)


def unpack(data: Tensor, prompts: Sequence[list[int]]) -> dict[int, Group]:
    """Returns what `pack` was given; `prompts[number]` are the ids of a prompt."""
    tensors = load(data.numpy().tobytes())
    lists = {name: tensors[name].tolist() for name in DTYPES}
    lists["trained"] = [bool(x) for x in lists["trained"]]
    groups: dict[int, Group] = {}
    at = 0
    for number, count, finished in tensors["heads"].tolist():
        own = {name: values[at : at + count] for name, values in lists.items()}
        groups.setdefault(number, []).append(Sample(prompts[number], **own, finished=bool(finished)))
        at += count
    return groups
