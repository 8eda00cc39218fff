"""Turns measured rounds into the tables and verdicts of the post-training benchmark."""

from __future__ import annotations

import statistics
from typing import Any

OURS = "llmtrain"
TOLERANCE = {"fp32": (1e-3, 1e-2), "bf16": (5e-2, 1e-1)}  # of loss and gradient norm, relative
TARGET = (5.0, 1 / 3)  # of grpo: least ratio, most share
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
Result = dict[str, Any]


def summary(turns: list[dict], ours: list[dict]) -> Result:
    """Returns medians over the rounds, and how ours compares: `ratio`, theirs to ours in CPU time, and `share`, ours
    to theirs in peak memory."""
    cpu = [turn["cpu_s"] for turn in turns]
    peak, own = (max(t["peak_bytes"] + t["children_bytes"] for t in each) for each in (turns, ours))
    return {
        "cpu_s": statistics.median(cpu),
        "least": min(cpu),
        "most": max(cpu),
        "wall_s": statistics.median(turn["wall_s"] for turn in turns),
        "peak_bytes": peak,
        "ratio": statistics.median(t["cpu_s"] / o["cpu_s"] for t, o in zip(turns, ours, strict=True)),
        "share": own / peak,
    }


def check_same_work(runs: dict[str, list[dict]], precision: str) -> dict[str, list[dict]]:
    """Returns loss and gradient norm of every step. Raises RuntimeError where a contestant differs from the first: a
    loss by more than `TOLERANCE` of it or of 0.1, whichever is more, a norm by more than that of it."""
    values = {name: [value for turn in turns for value in turn["values"]] for name, turns in runs.items()}
    reference, (of_loss, of_norm) = next(iter(values)), TOLERANCE[precision]
    for name, found in values.items():
        for step, (value, right) in enumerate(zip(found, values[reference], strict=True), 1):
            near = abs(value["loss"] - right["loss"]) <= of_loss * max(abs(right["loss"]), 0.1)
            if not (near and abs(value["grad_norm"] - right["grad_norm"]) <= of_norm * right["grad_norm"]):
                raise RuntimeError(f"{name}: {value} at step {step}, {reference} has {right}: other work")
    return values


def show(title: str, results: dict[str, Result], values: dict[str, list[dict]]) -> None:
    head = f"{'CPU s':>8}{'min - max':>15}{'wall s':>8}{'peak MB':>9}{'ratio':>7}{'share':>7}"
    print(f"\n{title}\n{'':20}{head}  loss, norm")
    for name, r in results.items():
        spread = f"{r['least']:.2f} - {r['most']:.2f}"
        first = " ".join(f"{value['loss']:.5f}, {value['grad_norm']:.4f};" for value in values[name][:2])
        figures = f"{r['cpu_s']:>8.2f}{spread:>15}{r['wall_s']:>8.2f}{r['peak_bytes'] / 1e6:>9.0f}"
        print(f"{name:20}{figures}{r['ratio']:>7.2f}{r['share']:>7.2f}  {first}", flush=True)


def against_best(results: dict[str, Result]) -> Result:
    """Returns name, ratio and share of the fastest of the others, {} where there are none."""
    others = {name: r for name, r in results.items() if name != OURS}
    if not others or OURS not in results:
        return {}
    name = min(others, key=lambda name: others[name]["ratio"])
    return {"name": name, "ratio": others[name]["ratio"], "share": others[name]["share"]}


def show_best(best: Result, algorithm: str) -> None:
    print(f"{OURS} is {best['ratio']:.2f} times as fast as {best['name']}, with {best['share']:.2f} of its memory")
    if algorithm == "grpo":
        met = ["met" if ok else "MISSED" for ok in (best["ratio"] >= TARGET[0], best["share"] <= TARGET[1])]
        print(f"targets: {TARGET[0]:.0f} times as fast: {met[0]}, a third of the memory: {met[1]}", flush=True)


def products(times: dict[str, float]) -> float:
    """Returns the share of the time that is in matrix products."""
    return sum(times.get(name, 0.0) for name in PRODUCTS) / sum(times.values())
