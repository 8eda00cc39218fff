"""Fits the laws that a document asks for, and says what they predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from llmtrain.config.scaling import ScalingConfig
from llmtrain.scaling.laws.bootstrap import counts_of, drawn_rows, interval
from llmtrain.scaling.laws.kaplan import fit_kaplan
from llmtrain.scaling.laws.parabolas import IsoFlop, budget, fit_parabola, fit_parabolas
from llmtrain.scaling.laws.parametric import Parametric, fit_parametric, refit
from llmtrain.scaling.laws.projection import fit_projection
from llmtrain.scaling.laws.read import Points, budgets_of
from llmtrain.scaling.laws.sigmoid import fit_sigmoid, refit_sigmoid

Optimum = IsoFlop | Parametric
"""A law of the best size and the best number of tokens: it has `params` and `tokens`, power laws of FLOPs."""

FITS: dict[str, Callable[[Points], Parametric]] = {"parametric": fit_parametric, "projection": fit_projection}


def fit_losses(points: Points, settings: ScalingConfig, seed: int) -> dict[str, Any]:
    """Returns the fits of all methods by name, with intervals, best sizes of the targets and of all budgets, what the
    lower budgets predict of the largest, and warnings; methods that found no law are in `failed`, with the reason.
    Raises ValueError where all fail, as with too few points."""
    points, left_out = kept(points, settings.min_tokens_per_param)
    groups = budgets_of(points.flops)
    rows = drawn_rows(groups, settings.bootstrap, seed)
    budgets = [budget(points.flops[group]) for group in groups]
    flops = [*budgets, *settings.target_flops]
    result: dict[str, Any] = {"points": len(points), "left_out": left_out, "budgets": budgets, "methods": {}}
    failed: dict[str, str] = {}
    for method in settings.method:
        try:
            result["methods"][method] = fitted(method, points, settings, rows, flops)
        except ValueError as error:
            failed[method] = str(error)
    if not result["methods"]:
        raise ValueError("\n".join(failed.values()))
    result |= {"failed": failed} if failed else {}
    if settings.held_out:
        result["held_out"] = held_out(points, groups, settings)
    return result


def fitted(
    method: str, points: Points, settings: ScalingConfig, rows: np.ndarray, flops: Sequence[float]
) -> dict[str, Any]:
    """Returns the fit of one method as plain data; `rows` are the points drawn again. Raises ValueError where the
    points show no law."""
    if method == "kaplan":
        return {"fit": asdict(fit_kaplan(points)), "warnings": []}
    law = fit_optimum(method, points, settings)
    return described(law, redrawn(law, points, rows), flops, len(rows))


def kept(points: Points, least: float | None) -> tuple[Points, int]:
    """Returns the points with at least so many tokens a parameter, and the number of others. Raises ValueError if no
    point is left."""
    if least is None:
        return points, 0
    keep = points.tokens >= least * points.params
    if not keep.any():
        raise ValueError(f"scaling.min_tokens_per_param={least:g}: leaves out all {len(points)} points; lower it")
    return points[keep], int((~keep).sum())


def fit_optimum(method: str, points: Points, settings: ScalingConfig) -> Optimum:
    """Returns the fit of a method that has an optimum. Raises ValueError where the points show none."""
    if method == "parabolas":
        return fit_parabolas(points, settings.axis)
    law = FITS[method](points)
    if not law.has_optimum:
        raise ValueError(
            f"scaling.method={method}: alpha={law.alpha:.3g}, beta={law.beta:.3g}: a loss that does not fall with both "
            "size and tokens has no best size; add runs or leave the method out"
        )
    return law


def redrawn(law: Optimum, points: Points, rows: np.ndarray) -> list[Optimum]:
    """Returns the fits to points drawn again; draws whose fits have no law of a best size are not among them."""
    if not len(rows):
        return []
    if isinstance(law, Parametric):
        return [each for each in refit(points, counts_of(rows, len(points)), law) if each.has_optimum]
    found = []
    for each in rows:
        try:
            found.append(fit_parabolas(points[each], law.axis))
        except ValueError:
            continue
    return found


def described(law: Optimum, again: Sequence[Optimum], flops: Sequence[float], draws: int) -> dict[str, Any]:
    """Returns a fit as plain data."""
    fit = asdict(law)
    result: dict[str, Any] = {"warnings": fit.pop("warnings", []), "fit": fit}
    if len(again) < draws:
        result["warnings"].append(f"{draws - len(again)} of {draws} draws of the points have no law")
    for axis in ("params", "tokens"):
        laws = [getattr(each, axis) for each in again]
        own = getattr(law, axis)
        result[axis] = {
            **{"coefficient": own.coefficient, "exponent": own.exponent},
            "coefficient_interval": interval([each.coefficient for each in laws]),
            "exponent_interval": interval([each.exponent for each in laws]),
            "best": [{"flops": C, "value": own.at(C), "interval": interval([e.at(C) for e in laws])} for C in flops],
        }
    if isinstance(law, Parametric):
        names = ("E", "A", "B", "alpha", "beta")
        result["intervals"] = {name: interval([getattr(each, name) for each in again]) for name in names}
    return result


def held_out(points: Points, groups: Sequence[np.ndarray], settings: ScalingConfig) -> dict[str, Any]:
    """Returns what the lower budgets predict of the largest one: the loss of each of its runs, and its best size.

    Its `reason` says why a method predicts nothing.
    """
    largest = groups[-1]
    lower, runs = points[np.concatenate(groups[:-1])] if len(groups) > 1 else points[:0], points[largest]
    found: dict[str, Any] = {"flops": budget(runs.flops), "methods": {}}
    for method in settings.method:
        try:
            found["methods"][method] = _predicted(method, lower, runs, settings)
        except ValueError as error:
            found["methods"][method] = {"reason": str(error)}
    return found


def _predicted(method: str, lower: Points, runs: Points, settings: ScalingConfig) -> dict[str, Any]:
    law = fit_kaplan(lower) if method == "kaplan" else fit_optimum(method, lower, settings)
    if isinstance(law, IsoFlop):
        flops = budget(runs.flops)
        real = _minimum(runs, settings)
        predicted = getattr(law, settings.axis).at(flops)
        error = None if real is None else predicted / real - 1
        return {f"best_{settings.axis}": predicted, f"real_best_{settings.axis}": real, "error": error}
    losses = np.asarray(law.loss(runs.params, runs.tokens))
    errors, best = losses / runs.loss - 1, int(np.argmin(runs.loss))
    return {
        **{"loss": float(losses[best]), "real_loss": float(runs.loss[best]), "error": float(errors[best])},
        **{
            "mean_absolute_error": float(np.abs(errors).mean()),
            "largest_error": float(errors[np.abs(errors).argmax()]),
        },
        "runs": [
            dict(zip(("params", "tokens", "loss", "predicted"), map(float, each), strict=True))
            for each in zip(runs.params, runs.tokens, runs.loss, losses, strict=True)
        ],
    }


def _minimum(runs: Points, settings: ScalingConfig) -> float | None:
    """Returns the best size of one budget by its own parabola."""
    parabola, _ = fit_parabola(getattr(runs, settings.axis), runs.loss, budget(runs.flops))
    return parabola.best


def fit_rewards(columns: Mapping[str, np.ndarray], settings: ScalingConfig, seed: int) -> dict[str, Any]:
    """Returns the sigmoid of reward over compute with intervals, and its reward at the targets. Raises ValueError where
    there are too few points."""
    compute, reward = columns["flops"], columns["reward"]
    fit, warnings = fit_sigmoid(compute, reward)
    rows = drawn_rows([np.arange(len(compute))], settings.bootstrap, seed)
    usable = [each for each in rows if len(np.unique(compute[each])) >= 4]
    again = refit_sigmoid(compute, reward, counts_of(np.array(usable), len(compute))) if usable else []
    names = ("R_0", "R_max", "C_mid", "slope")
    return {
        **{"points": len(compute), "fit": asdict(fit), "warnings": warnings},
        "intervals": {name: interval([getattr(each, name) for each in again]) for name in names},
        "targets": [
            {"flops": C, "reward": float(fit.reward(C)), "interval": interval([float(e.reward(C)) for e in again])}
            for C in settings.target_flops
        ],
    }
