"""What GRPO computes from rollouts, against the formulas that other tools publish, written plainly: padded [N, T]
tensors, one sample a row, no shared prompts. Value and gradient, through the recipe's own columns, rows and loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from llmtrain.config.recipes import config_class
from llmtrain.recipes import grpo
from llmtrain.types import Group, Sample, Scores
from tests.group_rows import group_batch

PROMPTS, SAMPLES, LONGEST, WIDTH = 6, 4, 9, 40
N = PROMPTS * SAMPLES


def rollouts() -> tuple[list[Group], dict[str, Tensor]]:
    """Returns groups with rewards, and the same as padded [N, T] tensors; a tool wrote some tokens of every third
    sample. One group has equal rewards."""
    rng, g = random.Random(5), torch.Generator().manual_seed(5)
    generator = -1 - torch.rand(N, LONGEST, generator=g)
    padded = {"generator": generator, "mask": torch.zeros(N, LONGEST), "rewards": torch.zeros(N)}
    groups: list[Group] = []
    for i in range(N):
        n = rng.randint(2, LONGEST)
        trained = [not (i % 3 == 0 and t == 1) for t in range(n)]
        padded["mask"][i, :n] = torch.tensor(trained).float()
        padded["rewards"][i] = 1.0 if i < SAMPLES else rng.choice([0.0, 1.0, 2.5])
        if i % SAMPLES == 0:
            groups.append([])
        ids = [rng.randrange(50) for _ in range(n)]
        sample = Sample([1, 2, i // SAMPLES], ids, trained, generator[i, :n].tolist(), [0] * n, True)
        sample.reward = padded["rewards"][i].item()
        sample.columns["place"] = [float(i * LONGEST + t) for t in range(n)]
        groups[-1].append(sample)
    old = generator + 0.4 * torch.randn(N, LONGEST, generator=g)  # another precision than the generator's
    padded |= {"old": old, "now": old + 0.3 * torch.randn(N, LONGEST, generator=g)}
    padded["reference"] = generator + torch.randn(N, LONGEST, generator=g)
    return groups, padded


def ours(*overrides: tuple[str, object], old: str = "old", limit: int = 12) -> tuple[Tensor, Tensor]:
    """Returns loss and gradient [N, T] of the recipe with these keys of its section."""
    section, (groups, padded) = {"mismatch": "off", **dict(overrides)}, rollouts()
    sections = {"rollout": {"group_size": SAMPLES, "max_new_tokens": limit}, "engine": {"precision": "fp32"}}
    config = config_class().model_validate({"name": "published", "grpo": section, **sections})
    if config.grpo.kl_in == "reward":
        for sample in (each for group in groups for each in group):
            place = torch.tensor(sample.columns["place"]).long()
            sample.columns["ref_logprobs"] = padded["reference"].flatten()[place].tolist()
    grpo.credit(groups, config.grpo)
    columns = ("advantages", "place", *(("weights",) if config.grpo.aggregate == "sequences" else ()))
    batch = group_batch(grpo.learnable(groups), WIDTH, PROMPTS, 0, columns)
    place = batch.extra.pop("place").long()
    logprobs = padded["now"].clone().requires_grad_()
    batch.extra["train_logprobs"] = padded["old"].flatten()[place]
    if config.grpo.mismatch == "off":  # p_old is the generator's: make it the one that the formulas have
        batch.extra["old_logprobs"] = padded[old].flatten()[place]
    if config.grpo.kl_coef and config.grpo.kl_in == "loss":
        batch.extra["ref_logprobs"] = padded["reference"].flatten()[place]
    shown = torch.where(batch.loss_mask, logprobs.flatten()[place], 0.0)
    total, _ = grpo.loss_of(config)(Scores(shown, torch.zeros_like(shown)), batch)
    loss = total / grpo.divided_by(groups, config)
    loss.backward()
    return loss.detach(), logprobs.grad


# The formulas. A: [N, 1] advantages; ratio, mask: [N, T].


def grouped(rewards: Tensor, eps: float) -> Tensor:
    """verl's compute_grpo_outcome_advantage (eps 1e-6) and TRL's scale_rewards="group" (eps 1e-4). Equal rewards have
    no deviation: with eps 0 it would be 0 / 0."""
    eps = eps or 1e-30
    r = rewards.view(PROMPTS, SAMPLES)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)).view(N, 1)


def centred(rewards: Tensor) -> Tensor:
    r = rewards.view(PROMPTS, SAMPLES)
    return (r - r.mean(1, keepdim=True)).view(N, 1)


def rloo(rewards: Tensor) -> Tensor:
    """verl's compute_rloo_outcome_advantage."""
    r = rewards.view(PROMPTS, SAMPLES)
    return (r * SAMPLES / (SAMPLES - 1) - r.mean(1, keepdim=True) * SAMPLES / (SAMPLES - 1)).view(N, 1)


def vanilla(now: Tensor, old: Tensor, a: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    """verl's compute_policy_loss_vanilla; without `dual` TRL's loss of a token."""
    ratio = (now - old).exp()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    return loss if dual is None else torch.where(a < 0, torch.minimum(-a * dual, loss), loss)


def gspo(now: Tensor, old: Tensor, a: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """verl's compute_policy_loss_gspo: the value of the sequence's ratio, the gradient of the token's."""
    mean = ((now - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    ratio = (now - now.detach() + mean.detach()).exp()
    return torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))


def token_mean(loss: Tensor, mask: Tensor) -> Tensor:
    """verl's "token-mean", TRL's "dapo" and "bnpo" on one batch."""
    return (loss * mask).sum() / mask.sum()


def sequence_mean(loss: Tensor, mask: Tensor) -> Tensor:
    """verl's "seq-mean-token-mean", TRL's "grpo"."""
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def constant(loss: Tensor, mask: Tensor) -> Tensor:
    """verl's "seq-mean-token-sum-norm", TRL's "dr_grpo", with 12 tokens at most."""
    return (loss * mask).sum() / (N * 12)


def k3(now: Tensor, reference: Tensor) -> Tensor:
    return (reference - now).exp() - (reference - now) - 1


Formula = Callable[[dict[str, Tensor], Tensor], Tensor]
"""Maps the rollouts and log p, [N, T] with gradient, to the loss."""

DEFAULT: Formula = lambda d, now: token_mean(vanilla(now, d["old"], grouped(d["rewards"], 0), 0.2, 0.2), d["mask"])  # noqa: E731
CASES: dict[str, tuple[dict[str, object], Formula]] = {
    "defaults": ({}, DEFAULT),
    "verl's advantages": (
        {"std_eps": 1e-6},
        lambda d, now: token_mean(vanilla(now, d["old"], grouped(d["rewards"], 1e-6), 0.2, 0.2), d["mask"]),
    ),
    "TRL's first form": (
        {"std_eps": 1e-4, "aggregate": "sequences", "kl_coef": 0.04},
        lambda d, now: sequence_mean(
            vanilla(now, d["old"], grouped(d["rewards"], 1e-4), 0.2, 0.2) + 0.04 * k3(now, d["reference"]), d["mask"]
        ),
    ),
    "DAPO, dual clip": (
        {"clip_high": 0.28, "dual_clip": 1.3, "std_eps": 1e-6},
        lambda d, now: token_mean(vanilla(now, d["old"], grouped(d["rewards"], 1e-6), 0.2, 0.28, 1.3), d["mask"]),
    ),
    "Dr. GRPO": (
        {"normalize_std": False, "aggregate": "constant"},
        lambda d, now: constant(vanilla(now, d["old"], centred(d["rewards"]), 0.2, 0.2), d["mask"]),
    ),
    "RLOO": (
        {"normalize_std": False, "baseline": "leave_one_out"},
        lambda d, now: token_mean(vanilla(now, d["old"], rloo(d["rewards"]), 0.2, 0.2), d["mask"]),
    ),
    "deviation of the batch, TRL's": (
        {"std_of": "batch", "std_eps": 1e-4},
        lambda d, now: token_mean(
            vanilla(now, d["old"], centred(d["rewards"]) / (d["rewards"].std() + 1e-4), 0.2, 0.2), d["mask"]
        ),
    ),
    "GSPO": (
        {"objective": "gspo"},
        lambda d, now: sequence_mean(gspo(now, d["old"], grouped(d["rewards"], 0), d["mask"], 3e-4, 4e-4), d["mask"]),
    ),
    "GSPO, wide": (
        {"objective": "gspo", "clip_low": 0.1, "clip_high": 0.15, "aggregate": "tokens"},
        lambda d, now: token_mean(gspo(now, d["old"], grouped(d["rewards"], 0), d["mask"], 0.1, 0.15), d["mask"]),
    ),
    "CISPO, TRL's": (
        {"objective": "cispo", "ratio_cap": 1.2},
        lambda d, now: token_mean(
            -(now - d["old"]).exp().clamp(max=1.2).detach() * grouped(d["rewards"], 0) * now, d["mask"]
        ),
    ),
    "TIS, as in both": (
        {"mismatch": "truncate", "mismatch_cap": 1.4},
        lambda d, now: token_mean(
            vanilla(now, d["old"], grouped(d["rewards"], 0), 0.2, 0.2)
            * (d["old"] - d["generator"]).exp().clamp(max=1.4),
            d["mask"],
        ),
    ),
    "KL in the reward, verl's": (
        {"kl_coef": 0.1, "kl_in": "reward", "kl_form": "k1", "std_eps": 1e-6},
        lambda d, now: token_mean(
            vanilla(
                now,
                d["old"],
                grouped(d["rewards"] - 0.1 * ((d["generator"] - d["reference"]) * d["mask"]).sum(1), 1e-6),
                0.2,
                0.2,
            ),
            d["mask"],
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    section, formula = CASES[name]
    _, padded = rollouts()
    now = padded["now"].clone().requires_grad_()
    expected = formula(padded, now)
    expected.backward()
    loss, gradient = ours(*section.items())
    left_out = loss.new_zeros(())
    if section.get("kl_coef") and section.get("kl_in") != "reward":  # groups without a spread are in their KL alone
        r = padded["rewards"].view(PROMPTS, SAMPLES)
        alike = (r == r[:, :1]).all(1).repeat_interleave(SAMPLES)
        kl = (k3(padded["now"], padded["reference"]) * padded["mask"]).sum(1) / padded["mask"].sum(1)
        left_out, now.grad[alike] = section["kl_coef"] * kl[alike].sum() / N, gradient[alike]
        assert gradient[alike].eq(0).all() and alike.sum() >= SAMPLES
    torch.testing.assert_close(loss + left_out, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, now.grad, rtol=1e-5, atol=1e-7)
    assert gradient.abs().max() > 1e-3


def test_the_deviation_without_eps_differs_by_a_millionth() -> None:
    """Ours adds nothing to the deviation by default: groups without a spread have no advantage, whatever it is."""
    _, padded = rollouts()
    now = padded["now"].clone().requires_grad_()
    partial(CASES["verl's advantages"][1], padded)(now).backward()
    _, gradient = ours()
    torch.testing.assert_close(gradient, now.grad, rtol=1e-5, atol=1e-7)
