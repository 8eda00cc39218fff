"""Turns what a model says of two answers, in both orders, into the probability that one is better. Pure."""

from __future__ import annotations

import math


def preferred_a(log_a: float, log_b: float) -> float:
    """Returns the normalised probability of the choice (A): p_A / (p_A + p_B).

    Example: preferred_a(log 0.2, log 0.1) -> 2/3
    """
    difference = max(-700.0, min(700.0, log_b - log_a))
    return 1 / (1 + math.exp(difference))


def clamped(value: float, low: float, high: float) -> float:
    """Returns the value, or the bound that it is beyond."""
    return min(max(value, low), high)


def both_orders(first_as_a: float, second_as_a: float) -> float:
    """Returns the probability that the first of two answers is better, from the probabilities of (A) with the first as
    (A) and with the second as (A). Their mean cancels a preference for a letter: it adds to one what it takes from the
    other. Example: both_orders(0.9, 0.7) -> 0.6
    """
    return (first_as_a + 1 - second_as_a) / 2
