"""Defines the losses of pairs of answers to one prompt, of which the first of each two neighbours was chosen.

A pair may carry, at one place of its chosen answer, `extra["label"]` (the probability p that it is the better one; 1
where there is none) and `extra["margin"]` (m, by how much its reward is to be higher; 0). Every term is the expectation
over who is better: p f(chosen, rejected) + (1 - p) f(rejected, chosen).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmtrain.losses.sequence import sequence_sums
from llmtrain.types import Batch, Metrics, Scores

Kind = Literal["sigmoid", "ipo", "hinge"]


def pair_sums(x: Tensor, mask: Tensor, batch: Batch) -> Tensor:
    """Returns [pairs, 2]: the sums of `x` over the masked positions of the chosen and of the rejected answers."""
    return sequence_sums(x, mask, batch)[0].view(-1, 2)


def of_pairs(name: str, usual: float, batch: Batch, pairs: Tensor) -> Tensor:
    """Returns [pairs]: the label or margin of each pair, the usual one where the batch has none."""
    if name not in batch.extra:
        return torch.full_like(pairs[:, 0], usual)
    column = batch.extra[name]
    return pair_sums(column, torch.ones_like(batch.loss_mask), batch).sum(-1)


def expected(better: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Returns `chosen` where the chosen answer is the better one, `rejected` where not, weighed by the probability."""
    return better * chosen + (1 - better) * rejected


def pair_loss(lead: Tensor, kind: Kind, beta: float) -> Tensor:
    """Returns the loss of each pair by its `lead`, the reward of the better answer less that of the other, less the
    margin: sigmoid -log sigma(lead), hinge max(0, 1 - lead), ipo (lead / beta - 1 / (2 beta))^2."""
    if kind == "ipo":
        return ((lead - 0.5) / beta) ** 2
    return -logsigmoid(lead) if kind == "sigmoid" else (1 - lead).clamp(min=0)


def dpo_loss(
    scores: Scores,
    batch: Batch,
    kind: Kind,
    beta: float,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    nll_coef: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Returns the loss of DPO (arXiv 2305.18290, equation 7) or a form of it, summed over pairs, and its metrics.

    The reward of an answer is r = beta (log pi - log pi_ref), sums over its tokens, with `length_normalized` divided by
    their number; without `extra["ref_logprobs"]` ([B, T], or each sum at one place) log pi_ref is 0. Of the lead
    d = r_chosen - r_rejected - m - gamma:
    sigmoid: -log sigma(d). ipo: arXiv 2310.12036, equation 17. hinge: SLiC-HF, arXiv 2305.10425, on the same rewards.
    SimPO (arXiv 2405.14734, equation 6) is sigmoid, length-normalised, without a reference and with its gamma.
    `label_smoothing` e makes p to p (1 - e) + (1 - p) e: conservative DPO. `nll_coef` adds that much of the mean
    negative log-likelihood a token of the better answer (arXiv 2404.19733, equation 1).

    Metrics, summed over pairs: `accuracy` (the better one has the higher reward; a tie or p = 1/2 counts 1/2), `margin`
    (r_chosen - r_rejected), `chosen_reward`, `rejected_reward`, `chosen_logprob` (log pi of the whole answer), `nll`
    (a token, if it has a coefficient).
    """
    assert scores.logprobs is not None
    mask = batch.loss_mask
    logprobs = pair_sums(scores.logprobs, mask, batch)
    tokens = pair_sums(torch.ones_like(scores.logprobs), mask, batch).clamp(min=1)
    gained = logprobs
    if "ref_logprobs" in batch.extra:
        gained = logprobs - pair_sums(batch.extra["ref_logprobs"], mask, batch)
    rewards = beta * (gained / tokens if length_normalized else gained)
    better = of_pairs("label", 1.0, batch, rewards)
    margin = of_pairs("margin", 0.0, batch, rewards) + gamma
    lead = rewards[:, 0] - rewards[:, 1]
    smooth = better * (1 - label_smoothing) + (1 - better) * label_smoothing
    losses = expected(smooth, pair_loss(lead - margin, kind, beta), pair_loss(-lead - margin, kind, beta))
    metrics = reward_metrics(rewards, better) | {"chosen_logprob": logprobs[:, 0].detach().sum()}
    if nll_coef:
        nll = expected(better, *(-logprobs / tokens).unbind(-1))
        losses = losses + nll_coef * nll
        metrics["nll"] = nll.detach().sum()
    return losses.sum(), metrics


def bradley_terry_loss(scores: Scores, batch: Batch, center_coef: float) -> tuple[Tensor, Metrics]:
    """Returns the loss of a reward model, summed over pairs, and its metrics: those of rewards in `dpo_loss`.

    -log sigma(r_chosen - r_rejected - m) (arXiv 2203.02155, equation 1; the margin: arXiv 2307.09288, equation 2) +
    center_coef (r_chosen + r_rejected)^2 (arXiv 2312.09244, equation 2), where r is the value at the one position of an
    answer that is in the mask.
    """
    assert scores.values is not None
    rewards = pair_sums(scores.values, batch.loss_mask, batch)
    better, margin = of_pairs("label", 1.0, batch, rewards), of_pairs("margin", 0.0, batch, rewards)
    lead = rewards[:, 0] - rewards[:, 1]
    losses = expected(better, -logsigmoid(lead - margin), -logsigmoid(-lead - margin))
    return (losses + center_coef * rewards.sum(-1) ** 2).sum(), reward_metrics(rewards, better)


def reward_metrics(rewards: Tensor, better: Tensor) -> Metrics:
    """Returns what rewards [pairs, 2] say of the pairs, summed over them; `better` is the probability [pairs] that the
    chosen one is the better."""
    rewards = rewards.detach()
    lead = rewards[:, 0] - rewards[:, 1]
    right = (1 + torch.sign((2 * better - 1) * lead)) / 2
    return {
        "accuracy": right.sum(),
        "margin": lead.sum(),
        "chosen_reward": rewards[:, 0].sum(),
        "rejected_reward": rewards[:, 1].sum(),
    }
