from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.losses.advantage import group_advantages, has_spread, overlong_penalty


def test_grpo_by_hand() -> None:
    # mean 1/4; deviations 3/4, -1/4 x 3; squares 9/16 + 3/16 = 3/4; / (4 - 1) = 1/4; std 1/2
    assert group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), True).tolist() == [[1.5, -0.5, -0.5, -0.5]]


def test_dr_grpo_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 6.0, 8.0]])
    assert group_advantages(rewards, False).tolist() == [[0.75, -0.25, -0.25, -0.25], [-3.0, -1.0, 1.0, 3.0]]


def test_leave_one_out_by_hand() -> None:
    # 1 - 0 = 1, 0 - 1/3; 2 - (4 + 6 + 8) / 3 = -4, 4 - 16/3, 6 - 14/3, 8 - 12/3
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 6.0, 8.0]])
    found = group_advantages(rewards, False, baseline="leave_one_out").flatten().tolist()
    assert found == pytest.approx([1, *[-1 / 3] * 3, -4, -4 / 3, 4 / 3, 4])
    # over the deviation 1/2 of the first group, which is that of its rewards
    scaled = group_advantages(rewards, True, baseline="leave_one_out")[0].tolist()
    assert scaled == pytest.approx([2, *[-2 / 3] * 3])


def test_the_deviation_of_the_whole_batch_by_hand() -> None:
    # rewards 1, 0, 4, 3: mean 2, squares 1 + 4 + 4 + 1 = 10, / (4 - 1); each group's own mean is taken off
    rewards, std = torch.tensor([[1.0, 0.0], [4.0, 3.0]]), (10 / 3) ** 0.5
    found = group_advantages(rewards, True, std_of="batch").flatten().tolist()
    assert found == pytest.approx([0.5 / std, -0.5 / std] * 2)
    with_eps = group_advantages(rewards, True, std_of="batch", eps=0.25).flatten().tolist()
    assert with_eps == pytest.approx([0.5 / (std + 0.25), -0.5 / (std + 0.25)] * 2)


def test_what_is_added_to_the_deviation() -> None:
    # std 1/2 + 1/4: 3/4 / 3/4 = 1
    found = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), True, eps=0.25)
    assert found[0].tolist() == pytest.approx([1.0, *[-1 / 3] * 3])


def test_spread() -> None:
    assert has_spread([0.0, 0.0, 1.0]) and not has_spread([0.3, 0.1 + 0.2, 0.3])


def test_overlong_by_hand() -> None:
    """Of 20 tokens the last 8 are the buffer: up to 12 nothing, at 16 half, at 20 all."""
    assert [overlong_penalty(n, 20, 8) for n in (1, 12, 13, 16, 20)] == [0.0, 0.0, -0.125, -0.5, -1.0]


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
