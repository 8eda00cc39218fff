from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.losses.advantage import group_advantages


def test_grpo_by_hand() -> None:
    # mean 1/4; deviations 3/4, -1/4 x 3; squares 9/16 + 3/16 = 3/4; / (4 - 1) = 1/4; std 1/2
    assert group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), True).tolist() == [[1.5, -0.5, -0.5, -0.5]]


def test_dr_grpo_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 6.0, 8.0]])
    assert group_advantages(rewards, False).tolist() == [[0.75, -0.25, -0.25, -0.25], [-3.0, -1.0, 1.0, 3.0]]


def test_no_spread_gives_zeros() -> None:
    # 0.1 + 0.2 differs from 0.3 by rounding alone; the mean of three times 0.1 is not 0.1
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [0.1 + 0.2, 0.3, 0.3 + 3e-8]])
    for normalize_std in (True, False):
        assert group_advantages(rewards, normalize_std).tolist() == [[0.0] * 3] * 3


def test_group_of_one_gives_zero() -> None:
    assert group_advantages(torch.tensor([[1.0], [0.0]]), True).tolist() == [[0.0], [0.0]]


@given(st.lists(st.integers(0, 10), min_size=2, max_size=16))
def test_centred_and_scaled(rewards: list[int]) -> None:
    advantages = group_advantages(torch.tensor([rewards], dtype=torch.float64), True)
    assert abs(advantages.mean().item()) < 1e-9
    assert len(set(rewards)) == 1 or abs(advantages.std().item() - 1) < 1e-9
