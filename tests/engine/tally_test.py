"""What one step sums over ranks, and which ranks it says had a number that is not finite."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from llmtrain.engine.tally import Tally, not_finite


def reduced(losses: list[float], finite: bool) -> tuple[list[int], float]:
    """What `reduce` returns on rank 0 of a job whose ranks have these losses, and the loss of all."""
    tallies = [Tally(2.0) for _ in losses]
    for tally, loss in zip(tallies, losses, strict=True):
        tally.add(0, torch.tensor(loss), {})
    reports: list[dict] = []

    def mesh(gather: object) -> SimpleNamespace:
        return SimpleNamespace(has_head=True, coords={"tp": 0, "cp": 0}, all_gather_json=gather)

    for tally in tallies[1:]:
        tally.reduce(mesh(lambda own: reports.append(own) or [own]), finite)
    return tallies[0].reduce(mesh(lambda own: [own, *reports]), finite), tallies[0].loss


@pytest.mark.parametrize(
    ("losses", "finite", "ranks", "words"),
    [
        ([1.0, 2.0, 3.0], True, [], ""),
        ([1.0, math.nan, 3.0], False, [1], "the loss is not finite on rank(s) 1"),  # in the gradient of all
        ([1.0, math.inf, math.nan], True, [1, 2], "the loss is not finite on rank(s) 1, 2"),
        ([1.0, 2.0], False, [0, 1], "the gradient is not finite, a sum over ranks, though the loss of each is"),
    ],
)
def test_the_ranks_that_had_it_are_named(losses: list[float], finite: bool, ranks: list[int], words: str) -> None:
    found, loss = reduced(losses, finite)
    assert found == ranks
    if ranks:
        assert not_finite(loss, found) == words
