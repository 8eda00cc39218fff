"""Runs tests/parity/layouts_worker.py with losses over groups, pairs, values and candidates: `layout["task"]` names
one."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmtrain.engine.base import LossFn
from llmtrain.losses.distill import distillation_loss, forward_kl, reverse_kl, sampled_loss
from llmtrain.losses.mismatch import mask_sequences, truncate
from llmtrain.losses.policy import capped, clipped, clipped_by_sequence, grpo_loss, policy_loss
from llmtrain.losses.preference import bradley_terry_loss, dpo_loss
from llmtrain.losses.reduce import masked_sum
from llmtrain.losses.sequence import sequence_sums
from llmtrain.types import IGNORE, Batch, Metrics, Scores
from tests.group_rows import ends_of
from tests.parity.layouts_worker import TASKS, WIDTH, Task, global_rows, main

BETA = 0.2  # multiplies the margin of a pair, which is about 10 nats


def laid_out(lengths: list[list[int]]) -> list[tuple[int, int, int, bool]]:
    """Returns (segment, branch, position, trained) of each token of groups in a row, given the lengths of each group's
    trunk, which is not trained, and of its branches."""
    row = []
    for segment, (trunk, *branches) in enumerate(lengths):
        row += [(segment, 0, at, False) for at in range(trunk)]
        for branch, length in enumerate(branches, 1):
            row += [(segment, branch, trunk + at, True) for at in range(length)]
    return row + [(-1, 0, 0, False)] * (WIDTH - len(row))


def group_batch(step: int, rows: int) -> Batch:
    """Returns two groups a row, each of two samples of 2 or 3 tokens behind a shared prompt of at most 2."""
    rng, g = random.Random(step), torch.Generator().manual_seed(200 + step)
    lengths = [[[rng.randint(0, 2), rng.randint(2, 3), rng.randint(2, 3)] for _ in range(2)] for _ in range(rows)]
    columns = torch.tensor([laid_out(row) for row in lengths])
    segments, branches, positions, mask = columns.unbind(-1)
    ids, labels = torch.randint(0, 64, (2, rows, WIDTH), generator=g)
    mask = mask.bool()
    near = -4.2 + 0.3 * torch.randn(2, rows, WIDTH, generator=g)  # the model's log-probs are about -log 64
    advantages = 1 + torch.randn(rows, WIDTH, generator=g)  # mean 0 would leave a loss near 0, and all its rounding
    extra = {"advantages": advantages, "old_logprobs": near[0], "ref_logprobs": near[1]}
    ends = ends_of(segments, branches)
    return Batch(ids, torch.where(mask, labels, IGNORE), mask, positions, segments, branches, ends, extra)


def corrected_batch(step: int, rows: int) -> Batch:
    """Returns `group_batch` with the trainer's log-probs before the update, near the generator's, and weights with
    which sequences count alike."""
    batch, g = group_batch(step, rows), torch.Generator().manual_seed(250 + step)
    batch.extra["train_logprobs"] = batch.extra["old_logprobs"] + 0.2 * torch.randn(rows, WIDTH, generator=g)
    _, numbers = sequence_sums(batch.extra["advantages"], batch.loss_mask, batch)
    counts = numbers[batch.loss_mask].bincount()
    batch.extra["weights"] = torch.where(batch.loss_mask, 1 / counts[numbers.clamp(min=0)], 0.0)
    return batch


def branch_pairs(step: int, rows: int) -> Batch:
    """Returns two pairs a row, with soft labels and margins."""
    batch = group_batch(step, rows)
    first = batch.loss_mask & (batch.branch_ids == 1)
    return replace(batch, extra={**batch.extra, "label": 0.3 * first, "margin": 0.1 * first})


def ended_pairs(step: int, rows: int) -> Batch:
    """Returns two pairs a row, of which the last token of each answer alone is in the mask, without labels."""
    batch = branch_pairs(step, rows)
    places = 8 * batch.segment_ids + batch.branch_ids
    last = batch.loss_mask & (places != torch.nn.functional.pad(places[:, 1:], (0, 1), value=-8))
    return replace(batch, loss_mask=last, labels=torch.full_like(batch.labels, IGNORE))


def pair_batch(step: int, rows: int) -> Batch:
    """Returns two rows a pair, behind prompts of equal length."""
    g = torch.Generator().manual_seed(300 + step)
    ids, labels = torch.randint(0, 64, (2, rows, WIDTH), generator=g)
    at = torch.arange(WIDTH).expand(rows, WIDTH)
    start = torch.randint(2, 6, (rows // 2, 1), generator=g).repeat_interleave(2, 0)
    end = torch.randint(8, WIDTH + 1, (rows, 1), generator=g)
    mask = (at >= start) & (at < end)
    extra = {"ref_logprobs": -4.2 + 0.3 * torch.randn(rows, WIDTH, generator=g)}
    return Batch(ids, torch.where(mask, labels, IGNORE), mask, at.clone(), torch.where(at < end, 0, -1), extra=extra)


def value_batch(step: int, rows: int) -> Batch:
    """Returns at positions of which half are trained; none has a label."""
    g = torch.Generator().manual_seed(400 + step)
    ids = torch.randint(0, 64, (rows, WIDTH), generator=g)
    at = torch.arange(WIDTH).expand(rows, WIDTH)
    cut = torch.randint(1, WIDTH, (rows, 1), generator=g)
    mask = torch.arange(rows * WIDTH).view(rows, WIDTH) % 2 == 1
    extra = {"returns": torch.randn(rows, WIDTH, generator=g)}
    positions = torch.where(at < cut, at, at - cut)
    return Batch(ids, torch.full_like(ids, IGNORE), mask, positions, (at >= cut).long(), extra=extra)


def candidate_batch(step: int, rows: int) -> Batch:
    """Returns rows with 5 of the 64 tokens at each position, and what two teachers say of them."""
    g = torch.Generator().manual_seed(600 + step)
    batch = global_rows(step, rows)
    batch.candidates, batch.temperature = torch.rand(rows, WIDTH, 64, generator=g).argsort(-1)[..., :5], 1.3
    said = (2 * torch.randn(2, rows, WIDTH, 64, generator=g)).log_softmax(-1)[..., :5]
    share = torch.rand(rows, WIDTH, generator=g)
    batch.extra = {"teacher_0": said[0], "teacher_1": said[1], "share_0": share, "share_1": 1 - share}
    return batch


def candidate_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    """Returns divergences in both directions; the metric `counted` is 1 when every trained token is counted once."""

    def both(student: Tensor, teacher: Tensor) -> Tensor:
        return forward_kl(student, teacher) + 0.5 * reverse_kl(student, teacher)

    loss, metrics = distillation_loss(scores, batch, both, teachers=2, whole=False)
    return loss, {**metrics, "counted": batch.loss_mask.float().sum()}


def taught_batch(step: int, rows: int) -> Batch:
    """Returns `group_batch` with what two teachers say of each token, one of which counts only in some branches."""
    batch, g = group_batch(step, rows), torch.Generator().manual_seed(650 + step)
    said = -3.2 + torch.randn(2, rows, WIDTH, generator=g)  # above the student by 1, as the advantages there are
    share = torch.where(batch.branch_ids == 1, 1.0, 0.25)
    extra = {"teacher_0": said[0], "teacher_1": said[1], "share_0": share, "share_1": 1 - share}
    return replace(batch, extra={**batch.extra, **extra})


def group_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    """Returns the policy loss; the metric `counted` is 1 when every trained token is counted once."""
    loss, metrics = grpo_loss(scores, batch, clip_low=0.2, clip_high=0.28, kl_coef=0.1)
    return loss, {**metrics, "counted": batch.loss_mask.float().sum()}


def counting(loss: partial) -> LossFn:
    """Returns the loss with the metric `counted`, as `group_loss` has it."""

    def counted(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        value, metrics = loss(scores, batch)
        return value, {**metrics, "counted": batch.loss_mask.float().sum()}

    return counted


SEQUENCE_RATIO = partial(
    policy_loss,
    objective=partial(clipped_by_sequence, low=0.1, high=0.15),
    correction=partial(mask_sequences, low=0.9, high=1.2, cap=1.3),
)
SEQUENCE_MEAN = partial(
    policy_loss,
    objective=partial(clipped, low=0.2, high=0.28, dual=1.4),
    kl_coef=0.1,
    kl_form="k2",
    off_policy_delta=0.1,
)
CAPPED = partial(policy_loss, objective=partial(capped, cap=1.2), correction=partial(truncate, cap=1.3))


def pair_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    """Returns the loss of DPO with all its parts; the metric `counted` is 1 when every pair is counted once."""
    loss, metrics = dpo_loss(scores, batch, "sigmoid", BETA, gamma=0.1, label_smoothing=0.1, nll_coef=0.5)
    return loss, {**metrics, "counted": pairs_in(batch)}


def mean_pair_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    """Returns the loss of IPO on means over tokens."""
    loss, metrics = dpo_loss(scores, batch, "ipo", beta=1.0, length_normalized=True)
    return loss, {**metrics, "counted": pairs_in(batch)}


def reward_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    """Returns the loss of a reward model, its centring strong enough to show."""
    loss, metrics = bradley_terry_loss(scores, batch, center_coef=0.1)
    return loss, {**metrics, "counted": pairs_in(batch)}


def pairs_in(batch: Batch) -> Tensor:
    """Returns half the number of answers: places of a segment and branch, or rows, with something in the mask."""
    branches = torch.zeros_like(batch.input_ids) if batch.branch_ids is None else batch.branch_ids
    rows = torch.arange(len(branches), device=branches.device)[:, None].expand_as(branches)
    places = torch.stack([rows, batch.segment_ids, branches])[:, batch.loss_mask]
    return torch.tensor(places.unique(dim=1).size(1) / 2)


def value_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    """Returns the sum of squared errors."""
    assert scores.values is not None and scores.logprobs is None
    error = scores.values - batch.extra["returns"]
    metrics = {"value": masked_sum(scores.values, batch.loss_mask), "counted": batch.loss_mask.float().sum()}
    metrics["error_max"] = torch.where(batch.loss_mask, error, 0.0).abs().max()
    return masked_sum(error**2, batch.loss_mask), {name: value.detach() for name, value in metrics.items()}


def trained_tokens(batch: Batch) -> Tensor:
    return batch.loss_mask.sum()


def samples(batch: Batch) -> Tensor:
    return torch.tensor(4.0 * len(batch.input_ids))


TASKS |= {
    "groups": Task(group_loss, trained_tokens, group_batch),
    "sequence ratio": Task(counting(SEQUENCE_RATIO), samples, corrected_batch),
    "sequence mean": Task(counting(SEQUENCE_MEAN), samples, corrected_batch),
    "capped ratio": Task(counting(CAPPED), trained_tokens, corrected_batch),
    "branch pairs": Task(pair_loss, pairs_in, branch_pairs),
    "row pairs": Task(mean_pair_loss, pairs_in, pair_batch, rows=4),
    "reward pairs": Task(reward_loss, pairs_in, ended_pairs),
    "sampled tokens": Task(counting(partial(sampled_loss, teachers=2)), trained_tokens, taught_batch),
    "candidates": Task(candidate_loss, trained_tokens, candidate_batch),
    "values": Task(value_loss, trained_tokens, value_batch),
}

if __name__ == "__main__":
    main()
