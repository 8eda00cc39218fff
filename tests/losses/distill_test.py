"""Divergences and losses of distillation, by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmtrain.losses.distill import (
    distillation_loss,
    forward_kl,
    jensen_shannon,
    largest_gap,
    reverse_kl,
    sampled_loss,
    with_rest,
)
from llmtrain.types import Batch, Scores

STUDENT, TEACHER = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.5, 0.25]).log()


def distributions(n: int = 5, K: int = 7) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, n, K, generator=g, dtype=torch.float64).log_softmax(-1)
    return student, teacher


def batch_of(mask: list[bool], **extra: Tensor) -> Batch:
    ids = torch.zeros(1, len(mask), dtype=torch.int64)
    return Batch(ids, ids, torch.tensor([mask]), ids, extra=extra)


def test_divergences_by_hand() -> None:
    """KL of (1/4, 1/2, 1/4) from (1/2, 1/4, 1/4): 1/4 ln 1/2 + 1/2 ln 2 = 1/4 ln 2, and so the other way round.
    Their mixture is (3/8, 3/8, 1/4): both halves have 1/2 ln 4/3 + 1/4 ln 2/3."""
    assert forward_kl(STUDENT, TEACHER).item() == pytest.approx(0.25 * math.log(2))
    assert reverse_kl(STUDENT, TEACHER).item() == pytest.approx(0.25 * math.log(2))
    half = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    assert jensen_shannon(STUDENT, TEACHER, 0.5).item() == pytest.approx(half, rel=1e-5)
    certain, other = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    assert forward_kl(certain, other).item() == pytest.approx(0.5 * math.log(0.25 / 0.09))  # not symmetric
    assert reverse_kl(certain, other).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))


def test_the_mixture_leans_to_the_teacher_by_beta() -> None:
    """beta 1/4: M = 3/4 S + 1/4 T = (7/16, 5/16, 1/4)."""
    of_teacher = 0.25 * math.log(4 / 7) + 0.5 * math.log(8 / 5)
    of_student = 0.5 * math.log(8 / 7) + 0.25 * math.log(4 / 5)
    found = jensen_shannon(STUDENT, TEACHER, 0.25).item()
    assert found == pytest.approx(0.25 * of_teacher + 0.75 * of_student, rel=1e-5)


def test_whole_vocabulary_equals_torch() -> None:
    student, teacher = distributions()
    expected = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), expected)
    expected = F.kl_div(teacher, student, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(reverse_kl(student, teacher), expected)


@pytest.mark.parametrize("beta", [1e-3, 1e-5])
def test_limits_of_beta(beta: float) -> None:
    """JSD(beta) / beta -> forward KL as beta -> 0, JSD(beta) / (1 - beta) -> reverse KL as beta -> 1; the error is of
    the order of beta."""
    student, teacher = distributions()
    near = {"rtol": 5 * beta, "atol": 5 * beta}
    torch.testing.assert_close(jensen_shannon(student, teacher, beta) / beta, forward_kl(student, teacher), **near)
    torch.testing.assert_close(jensen_shannon(student, teacher, 1 - beta) / beta, reverse_kl(student, teacher), **near)


def test_the_rest_is_one_token_by_hand() -> None:
    """Of (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4) only the first: two outcomes, (1/2, 1/2) and (1/4, 3/4)."""
    student, teacher = with_rest(STUDENT[:1]), with_rest(TEACHER[:1])
    assert student.exp().tolist() == pytest.approx([0.5, 0.5]) and teacher.exp().tolist() == pytest.approx([0.25, 0.75])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert forward_kl(student, teacher).item() == pytest.approx(expected)
    assert expected < forward_kl(STUDENT, TEACHER).item()  # a lower bound
    assert with_rest(STUDENT)[-1].item() == pytest.approx(math.log(1e-6))  # nothing is left: no infinity


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, partial(jensen_shannon, beta=0.3)])
def test_more_candidates_bound_the_divergence_more_tightly(divergence: object) -> None:
    student, teacher = distributions(K=9)
    bounds = [divergence(with_rest(student[:, :k]), with_rest(teacher[:, :k])) for k in range(1, 9)]
    for lower, higher in zip(bounds, [*bounds[1:], divergence(student, teacher)], strict=True):
        assert (lower <= higher + 1e-9).all()


def test_the_loss_of_two_teachers_by_hand() -> None:
    """At the first token teacher 0 alone, at the second 1/4 of it and 3/4 of teacher 1, which is the student itself;
    the third is not trained."""
    student = STUDENT.expand(1, 3, 3)
    scores = Scores(entropies=torch.tensor([[1.0, 2.0, 4.0]]), candidates=student)
    extra = {
        "teacher_0": torch.stack([TEACHER, TEACHER, TEACHER * math.inf])[None],
        "teacher_1": student.clone(),
        "share_0": torch.tensor([[1.0, 0.25, 1.0]]),
        "share_1": torch.tensor([[0.0, 0.75, 0.0]]),
    }
    loss, metrics = distillation_loss(scores, batch_of([True, True, False], **extra), forward_kl, 2, whole=True)
    assert loss.item() == pytest.approx(1.25 * 0.25 * math.log(2))
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(
        {"teacher_covered": 2.0, "student_covered": 2.0, "entropy": 3.0}
    )
    first = {name: x[..., :1] if x.dim() == 3 else x for name, x in extra.items()}
    scores = Scores(entropies=scores.entropies, candidates=student[..., :1])
    loss, metrics = distillation_loss(scores, batch_of([True, True, False], **first), forward_kl, 2, whole=False)
    assert loss.item() == pytest.approx(1.25 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5)))
    assert float(metrics["teacher_covered"]) == pytest.approx(1.25 * 0.25 + 0.75 * 0.5)
    assert float(metrics["student_covered"]) == pytest.approx(2 * 0.5)


def test_the_gradient_pushes_logits_by_the_difference() -> None:
    """Of the forward KL it is S - T, whatever the logits."""
    logits = torch.tensor([[[1.0, -0.5, 0.2]]], requires_grad=True)
    scores = Scores(entropies=torch.zeros(1, 1), candidates=logits.log_softmax(-1))
    extra = {"teacher_0": TEACHER[None, None], "share_0": torch.ones(1, 1)}
    distillation_loss(scores, batch_of([True], **extra), forward_kl, 1, whole=True)[0].backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - TEACHER.exp())


def test_the_sampled_loss_by_hand() -> None:
    """log S_old = -1, log S = -1 + ln 2 (ratio 2); the teachers say -3 and -2, in shares 1/4 and 3/4: advantage
    -2.25 + 1 = -1.25, loss 2.5, and its gradient -ratio x advantage."""
    logprobs = torch.tensor([[-1.0 + math.log(2), 5.0]], requires_grad=True)
    extra = {
        "old_logprobs": torch.tensor([[-1.0, -math.inf]]),
        "teacher_0": torch.tensor([[-3.0, 0.0]]),
        "teacher_1": torch.tensor([[-2.0, 0.0]]),
        "share_0": torch.full((1, 2), 0.25),
        "share_1": torch.full((1, 2), 0.75),
    }
    scores, batch = Scores(logprobs, torch.tensor([[0.5, 9.0]])), batch_of([True, False], **extra)
    loss, metrics = sampled_loss(scores, batch, teachers=2)
    loss.backward()
    assert loss.item() == pytest.approx(2.5) and logprobs.grad.tolist()[0] == pytest.approx([2.5, 0.0])
    assert metrics["entropy"] == 0.5
    assert largest_gap(scores, batch).item() == pytest.approx(math.log(2))
