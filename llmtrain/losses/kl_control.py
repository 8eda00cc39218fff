"""Moves the coefficient of a KL penalty so that the divergence comes to a target."""

from __future__ import annotations

MOST_ERROR = 0.2  # of the divergence, relative to the target, that one step answers


def adapted_kl_coef(kl_coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """Returns the coefficient after a step of `samples` samples whose mean divergence was `kl`.

    kl_coef (1 + e samples / horizon), e = kl / target - 1 within +-0.2 (arXiv 1909.08593, section 2.2, in the form of
    its code). kl and target are in nats a sample, horizon is in samples. 0.1 after 256 samples with twice the target
    and a horizon of 10,000: 0.1 (1 + 0.2 * 0.0256) = 0.100512.
    """
    error = max(-MOST_ERROR, min(MOST_ERROR, kl / target - 1))
    return kl_coef * (1 + error * samples / horizon)
