"""Computes what failures and checkpoints leave of a run's time, in closed form and event by event.

Failures come at random, with the same rate at any time; each loses what was done since the last checkpoint, and the
restart. With M the mean time between failures of the job, R the restart, tau the work between two checkpoints and delta
the pause for one, a segment takes on average M exp(R / M) (exp((tau + delta) / M) - 1) (J. T. Daly, "A higher order
estimate of the optimum checkpoint interval", 2006; failures during a restart count), and the best tau is near
sqrt(2 delta M) (J. W. Young, "A first order approximation to the optimum checkpoint interval", 1974).
"""

from __future__ import annotations

import math
import random

MOST_RESTARTS = 1_000_000  # of one simulated run: with more it gets nowhere


def job_mttf_s(gpu_mttf_hours: float, gpus: int) -> float:
    """Returns the mean seconds between failures of a job that every failure of a GPU stops."""
    return gpu_mttf_hours * 3600 / gpus


def best_interval_s(save_s: float, mttf_s: float) -> float:
    """Returns the work between two checkpoints that loses least, in seconds, by Young's estimate."""
    return math.sqrt(2 * save_s * mttf_s)


def goodput(interval_s: float, save_s: float, restart_s: float, mttf_s: float) -> float:
    """Returns the share of the time that is work which lasts, by Daly's formula; 0 where nothing ever gets done."""
    segment = (interval_s + save_s) / mttf_s
    if segment + restart_s / mttf_s > 700:  # beyond what exp can hold
        return 0.0
    return interval_s / (mttf_s * math.exp(restart_s / mttf_s) * math.expm1(segment))


def simulated_goodput(
    work_s: float, interval_s: float, save_s: float, restart_s: float, mttf_s: float, seed: int
) -> float:
    """Returns the same share in one simulated run of `work_s` seconds of work.

    Raises ValueError when failures come so often that the run gets nowhere.
    """
    draw, clock, done, restarts = random.Random(seed), 0.0, 0.0, 0
    fails = draw.expovariate(1 / mttf_s)
    while done < work_s:
        part = min(interval_s, work_s - done)
        if clock + part + save_s <= fails:
            clock, done = clock + part + save_s, done + part
            continue
        clock = fails
        fails, restarts = clock + draw.expovariate(1 / mttf_s), restarts + 1
        while fails < clock + restart_s:  # during the restart
            clock = fails
            fails, restarts = clock + draw.expovariate(1 / mttf_s), restarts + 1
        clock += restart_s
        if restarts > MOST_RESTARTS:
            raise ValueError(f"failures every {mttf_s:g} s: the run gets nowhere; save more often or use fewer GPUs")
    return work_s / clock
