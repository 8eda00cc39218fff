"""What models are made of beside the plain decoder, on every axis and both engines, against one plain process: parts of
the families, experts, latent attention, multi-token prediction, muP, adapters. A few layouts of each, in two starts;
the lists they come from are run whole by the slow tests beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.parity import architectures_test as architectures
from tests.parity import deepseek_test as deepseek
from tests.parity import experts_test as experts
from tests.parity import lora_test as lora
from tests.parity import mup_test as mup
from tests.parity.layouts_test import check, quick_and_whole


def some(layouts: Sequence[dict], *numbers: int) -> list[dict]:
    return [layouts[number] for number in numbers]


TWO = [
    *some(architectures.TWO, 0, 1, 2, 4, 6, 9),
    *some(experts.TWO, 0, 2, 3, 5),
    *some(deepseek.FEW, 0, 1, 4),
    *some(mup.TWO, 0, 5),
]
FOUR = [*some(architectures.FOUR, 0, 1, 2, 4, 5), *some(experts.FOUR, 0, 2, 3, 4, 5), *lora.QUICK]


@quick_and_whole
def test_two_ranks(forked: Callable, shorten: Callable) -> None:
    check(forked, 2, shorten(TWO), timeout_s=280)


@quick_and_whole
def test_four_ranks(forked: Callable, shorten: Callable) -> None:
    check(forked, 4, shorten(FOUR), timeout_s=280)
