"""Converts rollouts to bytes and back: safetensors, no pickle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from safetensors.torch import load, save
from torch import Tensor

from llmtrain.types import Rollout


def pack(rollouts: Sequence[Rollout]) -> Tensor:
    """Returns the rollouts as a uint8 tensor. Prompts are not sent: the receiver asked for them and has them."""
    heads = [[r.group, len(r.completion_ids), int(r.finished), r.weight_version] for r in rollouts]
    ids = [i for r in rollouts for i in r.completion_ids]
    logprobs = [x for r in rollouts for x in r.logprobs]
    tensors = {
        "heads": torch.tensor(heads, dtype=torch.int64).view(-1, 4),
        "ids": torch.tensor(ids, dtype=torch.int32),
        "logprobs": torch.tensor(logprobs, dtype=torch.float32),
    }
    return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)


def unpack(data: Tensor, prompts: Sequence[list[int]]) -> list[Rollout]:
    """Returns the rollouts that `pack` wrote; `prompts[group]` are the prompt's ids."""
    tensors = load(data.numpy().tobytes())
    ids, logprobs = tensors["ids"].tolist(), tensors["logprobs"].tolist()
    out, at = [], 0
    for group, count, finished, version in tensors["heads"].tolist():
        piece = slice(at, at + count)
        out.append(Rollout(prompts[group], ids[piece], logprobs[piece], bool(finished), version, group))
        at += count
    return out


def renumber(rollouts: Sequence[Rollout], rank: int, size: int) -> list[Rollout]:
    """Returns rollouts of `prompts[rank::size]` with the group numbers that they have in `prompts`."""
    return [replace(r, group=r.group * size + rank) for r in rollouts]
