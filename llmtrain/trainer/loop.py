"""Runs the loop of every recipe: step, log, save, and stop in good order when told to."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from llmtrain.observe.log import log, progress
from llmtrain.parallel.mesh import Mesh
from llmtrain.trainer.evaluating import Evaluation
from llmtrain.trainer.guard import Guard
from llmtrain.trainer.job import Job
from llmtrain.trainer.record import Record, is_due
from llmtrain.trainer.resume import make_saver, save
from llmtrain.trainer.waste import Waste

INTERRUPTED = 75  # exit code (EX_TEMPFAIL): start the same command again and it goes on

StepFn = Callable[[int], tuple[dict[str, float], int]]
"""Takes a step, counted from 0; returns its metrics and its tokens."""


def train(job: Job, step_fn: StepFn) -> None:
    """Takes the steps `job.step` .. `train.steps`. Raises SystemExit(75) after a checkpoint on SIGTERM or SIGUSR1,
    OSError on all ranks when the last save fails (or any, with `checkpoint.on_error: stop`)."""
    steps, name = job.config.train.steps, job.config.name
    guard, stop = Guard(job), StopSignal(job.mesh)
    job.saver, waste, evaluation = make_saver(job), Waste(job), Evaluation(job)
    with Record(job) as record, job.saver, progress(steps, job.step, name) as bar:
        record.write_start(evaluation.at_start())
        while job.step < steps:
            began, job.watch.step = time.perf_counter(), job.step + 1
            metrics, tokens = step_fn(job.step)
            if guard.spiked:
                job.saver.wait()
                guard.rewind(tokens)
                record.go_on_after(job.step)
                continue
            job.step += 1
            waste.look(metrics)
            step_s = time.perf_counter() - began
            record.write(job, metrics | job.report() | guard.report(), tokens, step_s, bar, evaluation.after_step())
            record.complete(job, evaluation.late())
            save_or_stop(job, stop, lambda: record.complete(job, evaluation.before_save()))
        job.saver.close()


def save_or_stop(job: Job, stop: StopSignal, before_save: Callable[[], None]) -> None:
    """Saves after a step where that is due, and leaves if a signal came, or a save failed and must not."""
    config = job.config
    stopping, failing = stop.poll(job.saver.failed)
    if failing:
        job.saver.wait()  # raises on all ranks at the same step
    last = stopping or job.step == config.train.steps
    if last or is_due(job.step, config.checkpoint.every_steps):
        before_save()
        save(job, last)
    if stopping and job.step < config.train.steps:
        job.saver.close()
        log(f"stopped by a signal after step {job.step}; the same command goes on from here")
        sys.exit(INTERRUPTED)


class StopSignal:
    """Lets SIGTERM or SIGUSR1 on any trainer stop all of them after the step they are in."""

    def __init__(self, mesh: Mesh) -> None:
        self.device, self.told = mesh.device, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.tell)

    def tell(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal: the loop asks for it at the end of the step."""
        self.told = True

    def poll(self, failing: bool) -> tuple[bool, bool]:
        """Returns whether any rank was told to stop, and whether any is `failing`. A collective: the same answer
        everywhere, also when a signal comes while it runs."""
        flags = torch.tensor([float(self.told), float(failing)], device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        stopping, failed = flags.tolist()
        return bool(stopping), bool(failed)
