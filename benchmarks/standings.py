"""Turns measured rounds into a table and a verdict on each target of the pretraining benchmark."""

from __future__ import annotations

import statistics

TOLERANCE = 0.02  # relative, of the losses: bf16 rounds differently in each contestant

SPEED = (  # ours, theirs, least ratio of their speeds
    ("llmtrain, compiled", "Trainer", 1.6),
    ("llmtrain, compiled", "Trainer + DeepSpeed", 1.6),
    ("llmtrain, compiled", "LitGPT, compiled", 1.2),
    ("llmtrain", "llmtrain without engine", 0.98),
    ("llmtrain, compiled", "llmtrain without engine, compiled", 0.98),
)
OURS = ("llmtrain, compiled", "llmtrain")

Rounds = list[dict]
"""The rounds of one contestant are as benchmarks.common.Turns sends them."""


def check_same_work(runs: dict[str, Rounds], reference: str, tolerance: float = TOLERANCE) -> dict[str, list[float]]:
    """Returns the losses of every step. Raises RuntimeError when one differs from the reference's by over
    `tolerance`."""
    losses = {name: [loss for turn in turns for loss in turn["values"]] for name, turns in runs.items()}
    for name, found in losses.items():
        for step, (loss, expected) in enumerate(zip(found, losses[reference], strict=True), 1):
            if not abs(loss - expected) <= tolerance * expected:
                raise RuntimeError(
                    f"{name}: loss {loss:.4f} at step {step}, {reference} has {expected:.4f}: other work"
                )
    return losses


def ratio(turns: Rounds, reference: Rounds, clock: str = "wall_s") -> float:
    """Returns how many times as fast as the reference a contestant is.

    It is the median over rounds, so that what slows the machine in one round slows both.
    """
    return statistics.median(other[clock] / turn[clock] for turn, other in zip(turns, reference, strict=True))


def summary(turns: Rounds, reference: Rounds, turn_tokens: int) -> dict[str, float]:
    """Returns medians over rounds, and the spread of the speed."""
    rates = [turn_tokens / turn["wall_s"] for turn in turns]
    return {
        "tokens_per_s": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "tokens_per_cpu_s": statistics.median(turn_tokens / turn["cpu_s"] for turn in turns),
        "ratio": ratio(turns, reference),
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
    }


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 a second, from the data sheets (SXM)


def mfu(tokens_per_s: float, flops_per_token: float, device: str) -> float | None:
    """Returns the model FLOPs utilization (arXiv 2204.02311, appendix B); None for a device whose peak is not listed.

    Example: 60,000 tokens/s of 6e9 FLOPs on an H100: 0.364
    """
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in device), None)
    return None if peak is None else tokens_per_s * flops_per_token / peak


def targets(timed: dict[str, Rounds]) -> list[dict]:
    """Returns a verdict for each target whose contestants ran."""
    found = [
        {
            "target": f"{ours} at least {least} times as fast as {theirs}",
            "wall": ratio(timed[ours], timed[theirs]),
            "cpu": ratio(timed[ours], timed[theirs], "cpu_s"),
            "met": ratio(timed[ours], timed[theirs]) >= least,
        }
        for ours, theirs, least in SPEED
        if ours in timed and theirs in timed
    ]
    return found + _memory(timed)


def _memory(timed: dict[str, Rounds]) -> list[dict]:
    """Returns verdicts on memory: ours compiled against others that compile, and eager against those that do not."""
    peak = {name: max(turn["peak_bytes"] for turn in turns) for name, turns in timed.items()}
    verdicts = []
    for ours in (name for name in OURS if name in peak):
        others = [name for name in peak if "llmtrain" not in name and ("compiled" in name) == ("compiled" in ours)]
        if others:
            least = min(others, key=peak.__getitem__)
            share = peak[ours] / peak[least]
            verdicts.append({"target": f"{ours} peaks below {least}", "share": share, "met": share < 1})
    return verdicts


def print_table(results: dict[str, dict[str, float]], losses: dict[str, list[float]], reference: str) -> None:
    print(f"{'':34}{'tokens/s':>9}{'min - max':>15}{'ratio':>7}{'tokens/CPU-s':>14}{'peak MB':>9}  losses")
    for name, r in results.items():
        spread = f"{r['slowest']:.0f} - {r['fastest']:.0f}"
        first = " ".join(f"{loss:.4f}" for loss in losses[name][:3])
        figures = f"{r['tokens_per_s']:>9.0f}{spread:>15}{r['ratio']:>7.2f}{r['tokens_per_cpu_s']:>14.0f}"
        print(f"{name:34}{figures}{r['peak_bytes'] / 1e6:>9.0f}  {first} ... {losses[name][-1]:.4f}")
    print(f"ratio: median over rounds of the speed relative to {reference!r} in the same round")


def print_targets(verdicts: list[dict], load: float) -> None:
    print(f"targets (load average before: {load:.1f}; a missed one is explained by --profile)")
    for v in verdicts:
        figures = f"{v['share']:.2f} of it" if "share" in v else f"{v['wall']:.2f} wall, {v['cpu']:.2f} CPU"
        print(f"  {'met   ' if v['met'] else 'MISSED'}  {v['target']}: {figures}")
