"""Losses of pairs, worked by hand: log sigma(1) = -0.313262, log sigma(-1) = -1.313262, log sigma(0) = -0.693147."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmtrain.losses.preference import bradley_terry_loss, dpo_loss, reward_metrics
from llmtrain.types import Batch, Scores

PLUS, MINUS = 0.3132617, 1.3132617  # -log sigma(1), -log sigma(-1)


def pair(**columns: list[float]) -> Batch:
    """One row: a prompt of one token, a chosen answer of two, a rejected one of four, padding."""
    branches = torch.tensor([[0, 1, 1, 2, 2, 2, 2, 0]])
    segments = torch.tensor([[0, 0, 0, 0, 0, 0, 0, -1]])
    zeros = torch.zeros(1, 8, dtype=torch.int64)
    mask = (branches > 0) & (segments == 0)
    extra = {name: torch.tensor([values]) for name, values in columns.items()}
    return Batch(zeros, zeros, mask, zeros, segments, branches, extra=extra)


def logprobs() -> Tensor:
    """Sums -3 and -8: 5 apart; means -1.5 and -2. What is not an answer must not count."""
    return torch.tensor([[-99.0, -1.0, -2.0, -5.0, -1.0, -1.0, -1.0, -99.0]], requires_grad=True)


REFERENCE = [-50.0, -4.0, -4.0, -2.0, -2.0, -1.0, -1.0, -50.0]  # sums -8, -6: gained +5 and -2, a lead of 7


def loss(batch: Batch, **settings: float | str | bool) -> float:
    return dpo_loss(Scores(logprobs=logprobs()), batch, **{"kind": "sigmoid", "beta": 0.2, **settings})[0].item()


def test_the_sigmoid_with_and_without_a_reference() -> None:
    assert loss(pair()) == pytest.approx(PLUS)  # 0.2 x 5
    assert loss(pair(ref_logprobs=REFERENCE), beta=1 / 7) == pytest.approx(PLUS)
    assert loss(pair(ref_logprobs=REFERENCE)) == pytest.approx(-math.log(1 / (1 + math.exp(-1.4))))


def test_the_reference_may_be_a_sum_at_one_place() -> None:
    at_the_end = [0.0, 0.0, -8.0, 0.0, 0.0, 0.0, -6.0, 0.0]
    assert loss(pair(ref_logprobs=at_the_end)) == loss(pair(ref_logprobs=REFERENCE))


def test_hinge_and_ipo() -> None:
    assert loss(pair(), kind="hinge") == pytest.approx(0.0)
    assert loss(pair(), kind="hinge", beta=0.1) == pytest.approx(0.5)
    assert loss(pair(), kind="ipo") == pytest.approx((5 - 2.5) ** 2)  # 1 / (2 beta) = 2.5
    assert loss(pair(), kind="ipo", beta=0.1) == pytest.approx(0.0, abs=1e-9)


def test_normalized_by_length() -> None:
    assert loss(pair(), length_normalized=True, beta=2.0) == pytest.approx(PLUS)  # 2 x (-1.5 + 2)
    assert loss(pair(ref_logprobs=REFERENCE), length_normalized=True, beta=1 / 3) == pytest.approx(PLUS)  # 5/2 + 2/4
    assert loss(pair(), kind="ipo", length_normalized=True) == pytest.approx((0.5 - 2.5) ** 2)


def test_simpo_is_a_normalized_sigmoid_with_gamma() -> None:
    simpo = {"length_normalized": True, "beta": 2.5, "gamma": 1.375}
    assert loss(pair(), **simpo) == pytest.approx(math.log1p(math.exp(-(2.5 * 0.5 - 1.375))))
    swapped = 0.9 * math.log1p(math.exp(0.125)) + 0.1 * math.log1p(math.exp(2.5 * 0.5 + 1.375))
    assert loss(pair(), **simpo, label_smoothing=0.1) == pytest.approx(swapped)  # the other would lead by gamma


def test_smoothed_and_soft_labels_are_an_expectation() -> None:
    assert loss(pair(), label_smoothing=0.1) == pytest.approx(0.9 * PLUS + 0.1 * MINUS)
    label = [0.0, 0.0, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert loss(pair(label=label)) == pytest.approx(0.7 * PLUS + 0.3 * MINUS)
    mixed = 0.7 * 0.9 + 0.3 * 0.1
    assert loss(pair(label=label), label_smoothing=0.1) == pytest.approx(mixed * PLUS + (1 - mixed) * MINUS)
    assert loss(pair(label=label), kind="ipo") == pytest.approx(0.7 * 2.5**2 + 0.3 * 7.5**2)
    assert loss(pair(label=label), kind="hinge") == pytest.approx(0.3 * 2.0)


def test_a_label_of_zero_swaps_the_pair() -> None:
    zero = pair(label=[0.0] * 8)
    assert loss(zero) == pytest.approx(MINUS)
    metrics = dpo_loss(Scores(logprobs=logprobs()), zero, "sigmoid", 0.2, nll_coef=1.0)[1]
    assert metrics["accuracy"] == 0 and metrics["nll"] == pytest.approx(2.0)  # of the rejected answer


def test_a_margin_is_taken_from_the_lead() -> None:
    assert loss(pair(margin=[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])) == pytest.approx(math.log(2))


def test_the_likelihood_of_the_chosen_answer_is_a_mean_over_its_tokens() -> None:
    assert loss(pair(), nll_coef=5.0) == pytest.approx(PLUS + 5 * 1.5)


def test_metrics_are_sums_over_pairs() -> None:
    _, metrics = dpo_loss(Scores(logprobs=logprobs()), pair(ref_logprobs=REFERENCE), "sigmoid", 0.2, nll_coef=1.0)
    expected = {"accuracy": 1, "margin": 1.4, "chosen_reward": 1.0, "rejected_reward": -0.4}
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx({**expected, "chosen_logprob": -3, "nll": 1.5})
    assert not any(value.requires_grad for value in metrics.values())


def test_the_gradient_reaches_the_answers_alone() -> None:
    x = logprobs()
    dpo_loss(Scores(logprobs=x), pair(), "sigmoid", 0.2)[0].backward()
    slope = 0.2 / (1 + math.e)  # beta sigma(-1)
    assert x.grad.tolist()[0] == pytest.approx([0, -slope, -slope, slope, slope, slope, slope, 0])


def test_no_pair_at_all() -> None:
    """A microbatch of padding alone, which some ranks have: 0, with a gradient of 0."""
    batch = pair(label=[0.0] * 8)
    batch.segment_ids, batch.loss_mask = torch.full((1, 8), -1), torch.zeros(1, 8, dtype=torch.bool)
    x = logprobs()
    total, metrics = dpo_loss(Scores(logprobs=x), batch, "ipo", 0.1, nll_coef=1.0)
    total.backward()
    assert total == 0 and x.grad.abs().sum() == 0 and all(value == 0 for value in metrics.values())


@pytest.mark.parametrize(("lead", "label", "right"), [(1.0, 1.0, 1), (-1.0, 1.0, 0), (0.0, 1.0, 0.5), (1.0, 0.5, 0.5)])
def test_a_tie_is_half_right(lead: float, label: float, right: float) -> None:
    assert reward_metrics(torch.tensor([[lead, 0.0]]), torch.tensor([label]))["accuracy"] == right


def scored(chosen: float, rejected: float, center_coef: float = 0.0, **columns: list[float]) -> tuple[float, dict]:
    """A scalar head has a value everywhere; that at the end of an answer counts."""
    batch = pair(**columns)
    batch.loss_mask = torch.tensor([[False, False, True, False, False, False, True, False]])
    values = torch.tensor([[7.0, 7.0, chosen, 7.0, 7.0, 7.0, rejected, 7.0]])
    total, metrics = bradley_terry_loss(Scores(values=values), batch, center_coef)
    return total.item(), {name: value.item() for name, value in metrics.items()}


def test_bradley_terry_by_hand() -> None:
    total, metrics = scored(3.0, 2.0)
    assert total == pytest.approx(PLUS)
    assert metrics == {"accuracy": 1, "margin": 1, "chosen_reward": 3, "rejected_reward": 2}
    assert scored(2.0, 3.0)[0] == pytest.approx(MINUS) and scored(2.0, 3.0)[1]["accuracy"] == 0
    assert scored(3.0, 2.0, center_coef=0.01)[0] == pytest.approx(PLUS + 0.01 * 25)
    assert scored(3.0, 2.0, margin=[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])[0] == pytest.approx(math.log(2))
    label = [0.0, 0.0, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert scored(3.0, 2.0, label=label)[0] == pytest.approx(0.7 * PLUS + 0.3 * MINUS)


def test_two_pairs_in_a_row_and_one_in_the_next_add_up() -> None:
    """Each value is at the one token of its answer: leads 1, -1, and 1."""
    branches = torch.tensor([[1, 2, 1, 2], [1, 2, 0, 0]])
    segments = torch.tensor([[0, 0, 1, 1], [0, 0, -1, -1]])
    zeros = torch.zeros(2, 4, dtype=torch.int64)
    batch = Batch(zeros, zeros, segments >= 0, zeros, segments, branches)
    values = torch.tensor([[2.0, 1.0, 4.0, 5.0], [0.5, -0.5, 9.0, 9.0]])
    total, metrics = bradley_terry_loss(Scores(values=values), batch, center_coef=0.1)
    assert total.item() == pytest.approx(2 * PLUS + MINUS + 0.1 * (9 + 81 + 0))
    assert metrics["accuracy"] == 2 and metrics["chosen_reward"] == 6.5
