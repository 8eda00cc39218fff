from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.checkpoint.reshard import assemble, check_coverage, check_inside, overlap, piece, slice_numel, slicing
from llmtrain.types import Address


@st.composite
def cut_parameter(draw: st.DrawFn) -> tuple[torch.Tensor, list[Address]]:
    """A parameter of 1 to 4 dimensions, cut by tensor parallelism along one of them, each slice cut at random."""
    tp_size = draw(st.integers(1, 4))
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    tp_dim = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    if tp_dim is not None:
        shape[tp_dim] *= tp_size
    full = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    numel = full.numel() // (1 if tp_dim is None else tp_size)
    pieces = []
    for tp_rank in range(1 if tp_dim is None else tp_size):
        cuts = draw(st.lists(st.integers(0, numel), max_size=4))
        edges = [0, *sorted(cuts), numel]
        pieces += [Address("p", tuple(shape), tp_dim, tp_rank, tp_size, a, b - a) for a, b in pairwise(edges)]
    return full, draw(st.permutations(pieces))


def join(full: torch.Tensor, pieces: list[Address]) -> torch.Tensor:
    cut, numel = slicing(pieces[0]), slice_numel(pieces[0])
    flat = [torch.full((numel,), -1.0) for _ in range(cut[1])]
    for a in pieces:
        flat[a.tp_rank if cut[0] is not None else 0][a.start : a.start + a.numel] = piece(full, a)
    return assemble(tuple(full.shape), cut, flat)


@settings(max_examples=150, deadline=None)
@given(cut_parameter())
def test_any_cut_covers_once_and_joins_to_the_same_tensor(case: tuple[torch.Tensor, list[Address]]) -> None:
    full, pieces = case
    check_coverage(pieces)
    assert torch.equal(join(full, pieces), full)


@settings(max_examples=60, deadline=None)
@given(cut_parameter(), st.data())
def test_a_lost_doubled_or_shifted_piece_is_noticed(
    case: tuple[torch.Tensor, list[Address]], data: st.DataObject
) -> None:
    _, pieces = case
    one = data.draw(st.sampled_from([a for a in pieces if a.numel]))
    others = [a for a in pieces if a != one]
    with pytest.raises(ValueError, match=r"p, slice .* owned twice"):
        check_coverage([*pieces, one])
    if others:
        with pytest.raises(ValueError, match=r"p, slice .* owned by no rank"):
            check_coverage(others)
    with pytest.raises(ValueError, match=r"owned|outside"):
        check_coverage([*others, replace(one, start=one.start + 1)])


def test_a_piece_is_the_one_that_types_address_describes() -> None:
    full = torch.arange(32.0).view(4, 8)
    assert piece(full, Address("head.weight", (4, 8), 0, 1, 2, 8, 8)).tolist() == list(range(24, 32))
    columns = Address("o", (4, 8), 1, 1, 2, 2, 4)  # columns 4-7, from the third element of the slice on
    assert piece(full, columns).tolist() == [6, 7, 12, 13]


def test_a_replicated_parameter_is_the_same_whatever_rank_it_names() -> None:
    full = torch.arange(6.0)
    assert torch.equal(piece(full, Address("norm", (6,), None, 1, 2, 0, 6)), full)
    with pytest.raises(ValueError, match="owned twice"):
        check_coverage([Address("norm", (6,), None, rank, 2, 0, 6) for rank in range(2)])


def test_mixed_layouts_and_uneven_slices_are_refused() -> None:
    rows, columns = Address("p", (4, 4), 0, 0, 2, 0, 8), Address("p", (4, 4), 1, 1, 2, 0, 8)
    with pytest.raises(ValueError, match="different layouts"):
        check_coverage([rows, columns])
    with pytest.raises(ValueError, match="does not divide into 3"):
        check_coverage([replace(rows, tp_size=3)])
    with pytest.raises(ValueError, match="outside"):
        check_inside(replace(rows, tp_rank=2))
    with pytest.raises(ValueError, match="outside"):
        check_coverage([replace(rows, tp_rank=2)])


def test_overlap() -> None:
    stored = Address("p", (10,), None, 0, 1, 4, 3)
    assert overlap(stored, 0, 6) == (4, 6)
    begin, end = overlap(stored, 7, 3)
    assert end <= begin
