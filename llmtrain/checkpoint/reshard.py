"""Computes which elements of a parameter lie where in two layouts. It knows no files and no ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llmtrain.types import Address

Slicing = tuple[int | None, int]
"""A slicing is (tp_dim, tp_size); (None, 1) for every parameter that is not sliced."""


def slicing(address: Address) -> Slicing:
    """Returns how the parameter is sliced over tensor-parallel ranks."""
    if address.tp_dim is None or address.tp_size == 1:
        return None, 1
    return address.tp_dim, address.tp_size


def slice_index(address: Address) -> int:
    """Returns which of those slices the piece belongs to."""
    return 0 if slicing(address) == (None, 1) else address.tp_rank


def slice_numel(address: Address) -> int:
    """Returns the number of elements of one slice. Raises ValueError where the dimension does not divide."""
    tp_dim, tp_size = slicing(address)
    if tp_dim is not None and address.shape[tp_dim] % tp_size:
        raise ValueError(
            f"{address.name}: dimension {tp_dim} of {list(address.shape)} does not divide into {tp_size} slices"
        )
    return math.prod(address.shape) // tp_size


def slices(full: Tensor, cut: Slicing) -> Tensor:
    """Returns a view [outer, tp_size, rest] of a contiguous global tensor: `[:, r]`, flattened, is the flat r-th
    slice."""
    tp_dim, tp_size = cut
    return full.view(math.prod(full.shape[: tp_dim or 0]), tp_size, -1)


def piece(full: Tensor, address: Address) -> Tensor:
    """Returns a copy of the flat elements of the global tensor that `address` names."""
    flat = slices(full, slicing(address))[:, slice_index(address)].reshape(-1)
    return flat[address.start : address.start + address.numel].clone()


def assemble(shape: tuple[int, ...], cut: Slicing, flat_slices: Iterable[Tensor]) -> Tensor:
    """Returns the global tensor, built from its flat slices in tensor-parallel order: the inverse of `slices`."""
    full = torch.empty(shape, dtype=torch.float32)
    view = slices(full, cut)
    for index, flat in enumerate(flat_slices):
        view[:, index] = flat.view(view.size(0), -1)
    return full


def overlap(stored: Address, start: int, numel: int) -> tuple[int, int]:
    """Returns [begin, end) within the slice, common to a stored piece and `[start, start + numel)`; empty if end <=
    begin."""
    return max(stored.start, start), min(stored.start + stored.numel, start + numel)


def check_inside(address: Address) -> None:
    """Raises ValueError unless the slice exists and the piece lies within it."""
    numel, tp_size = slice_numel(address), slicing(address)[1]
    if not (0 <= slice_index(address) < tp_size and 0 <= address.start <= address.start + address.numel <= numel):
        raise ValueError(f"{address}: outside the {tp_size} slices of {numel} elements")


def check_coverage(pieces: Sequence[Address]) -> None:
    """Raises ValueError unless these pieces of one parameter cover every element exactly once.

    It sorts intervals, so its cost depends on the number of pieces, not on the size of the tensor.
    """
    first = pieces[0]
    tp_size = slicing(first)[1]
    spans: list[list[tuple[int, int]]] = [[] for _ in range(tp_size)]
    for a in pieces:
        if (a.name, a.shape, slicing(a)) != (first.name, first.shape, slicing(first)):
            raise ValueError(f"{first.name}: pieces of different layouts, {first} and {a}; all ranks must cut it alike")
        check_inside(a)
        if a.numel:
            spans[slice_index(a)].append((a.start, a.start + a.numel))
    for index, covered in enumerate(spans):
        _check_tiling(f"{first.name}, slice {index} of {tp_size}", sorted(covered), slice_numel(first))


def _check_tiling(what: str, spans: list[tuple[int, int]], numel: int) -> None:
    covered = 0
    for start, end in [*spans, (numel, numel)]:
        if start != covered:
            fault = "owned twice" if start < covered else "owned by no rank"
            lo, hi = sorted((start, covered))
            raise ValueError(f"{what}: elements {lo} to {hi} of {numel} {fault}; each must be owned exactly once")
        covered = end
