"""Defines the losses that draw a student's distribution towards those of its teachers (arXiv 2306.13649)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmtrain.losses.reduce import masked_sum
from llmtrain.types import Batch, Metrics, Scores

LEAST_REST = 1e-6  # below it 1 - sum of fp32 probabilities is rounding

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Maps log-probs [..., K] of a student and of a teacher to a divergence [...], in nats."""


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns KL(teacher || student) = sum_v T (log T - log S): [..., K] log-probs of each -> [...], in nats."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns KL(student || teacher) = sum_v S (log S - log T): [..., K] log-probs of each -> [...], in nats."""
    return forward_kl(teacher, student)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Returns beta KL(T || M) + (1 - beta) KL(S || M) with M = (1 - beta) S + beta T, 0 < beta < 1 (arXiv 2306.13649,
    section 2): [..., K] log-probs of each -> [...], in nats. Divided by beta it tends to the forward KL as beta -> 0;
    divided by 1 - beta to the reverse one as beta -> 1."""
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


def with_rest(logprobs: Tensor) -> Tensor:
    """Returns [..., K + 1]: the log-probs of K tokens, and that of all others as one, log(1 - sum of the K)."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST)
    return torch.cat([logprobs, rest.log()], -1)


def likeliest_of(proposals: Sequence[Scores], shares: Sequence[Tensor]) -> Tensor:
    """Returns candidates [B, T, K] from the K likeliest tokens of each teacher, `candidate_ids` of its scores: those
    with the largest share x probability, each once. Shares are [B, T]. Of one teacher they are its own."""
    if len(proposals) == 1:
        return proposals[0].candidate_ids
    ids = torch.cat([each.candidate_ids for each in proposals], -1)
    weights = torch.cat(
        [each.candidates + share[..., None].log() for each, share in zip(proposals, shares, strict=True)], -1
    )
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    ids, by_id = ids.gather(-1, order).sort(dim=-1, stable=True)  # of equal ids the weightiest comes first
    weights = weights.gather(-1, by_id)
    again = torch.nn.functional.pad(ids[..., 1:] == ids[..., :-1], (1, 0))
    weights = weights.masked_fill(again, -math.inf)
    return ids.gather(-1, weights.topk(proposals[0].candidate_ids.size(-1), -1).indices)


def distillation_loss(
    scores: Scores, batch: Batch, divergence: Divergence, teachers: int, whole: bool
) -> tuple[Tensor, Metrics]:
    """Returns sum over teachers i of share_i x divergence(student, teacher i), summed over the trained tokens (nats),
    and its metrics.

    `scores.candidates` are the student's log-probs of `batch.candidates`; `batch.extra` holds `teacher_<i>` [B, T, K],
    those of each teacher, and `share_<i>` [B, T], its weight at each token. Unless the candidates are the `whole`
    vocabulary, all other tokens count as one, which gives a lower bound of the divergence (the log sum inequality).
    Metrics, summed over the trained tokens: `teacher_covered` and `student_covered`, the probability of the candidates;
    `entropy` of the student.
    """
    assert scores.candidates is not None and scores.entropies is not None
    mask, student = batch.loss_mask, scores.candidates
    complete = (lambda logprobs: logprobs) if whole else with_rest
    loss, covered = torch.zeros((), device=student.device), torch.zeros((), device=student.device)
    for i in range(teachers):
        teacher, share = batch.extra[f"teacher_{i}"], batch.extra[f"share_{i}"]
        loss = loss + masked_sum(share * divergence(complete(student), complete(teacher)), mask)
        covered += masked_sum(share * teacher.exp().sum(-1), mask)
    metrics = {
        "teacher_covered": covered,
        "student_covered": masked_sum(student.exp().sum(-1), mask),
        "entropy": masked_sum(scores.entropies, mask),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def sampled_loss(scores: Scores, batch: Batch, teachers: int) -> tuple[Tensor, Metrics]:
    """Returns the policy gradient's loss of the reverse KL on tokens that the student sampled, -ratio x advantage,
    summed over the trained tokens, and its metrics: ratio = exp(log S - log S_old), advantage = sum_i share_i log T_i
    - log S_old, of the sampled token alone (arXiv 2306.08543, section 2.2, without what later tokens earn).

    `batch.extra` holds [B, T] each: `old_logprobs` of the student that sampled, `teacher_<i>`, those of each teacher,
    and `share_<i>`. At the weights that sampled, the value of the loss estimates the reverse KL. Metric, summed over
    the trained tokens: `entropy` of the student.
    """
    assert scores.logprobs is not None and scores.entropies is not None
    mask, extra = batch.loss_mask, batch.extra
    target = sum((extra[f"share_{i}"] * extra[f"teacher_{i}"] for i in range(teachers)), torch.zeros_like(mask * 1.0))
    ratio = torch.where(mask, scores.logprobs - extra["old_logprobs"], 0.0).exp()
    loss = -masked_sum(ratio * (target - extra["old_logprobs"]), mask)
    return loss, {"entropy": masked_sum(scores.entropies, mask).detach()}


def largest_gap(scores: Scores, batch: Batch) -> Tensor:
    """Returns the largest |log p - log p_old| of a trained token, a scalar, 0 without one: how far trainer and
    generator differ before an update. `batch.extra` holds `old_logprobs` [B, T]."""
    assert scores.logprobs is not None
    gaps = (scores.logprobs.detach() - batch.extra["old_logprobs"]).abs()
    return torch.where(batch.loss_mask, gaps, 0.0).max()
