"""Computes checksums of weights, so that sender and receiver can be compared without sending the weights again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmtrain.rollout.generator import Weights

DIGITS = 16  # of the 64 of sha256: 64 bits


def checksum(tensor: Tensor) -> str:
    """Returns the first 16 hex digits of the sha256 of the tensor's bytes, row by row. Its dtype and shape are not in
    it.

    Example: checksum(torch.tensor([1.0])) is that of the bytes 00 00 80 3f
    """
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()[:DIGITS]


def noted(weights: Weights, sums: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights as they come, and notes the checksum of each under its name."""
    for name, tensor in weights:
        sums[name] = checksum(tensor)
        yield name, tensor


def differing(sent: Mapping[str, str], held: Mapping[str, str]) -> list[str]:
    """Returns the names of the tensors that are not the same on both sides, or on one side alone, in the order in which
    they were sent."""
    return [name for name in {**sent, **held} if sent.get(name) != held.get(name)]
