"""The loop of every training stage: step, log, save, and stop in good order when told to."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from llmtrain import __version__
from llmtrain.checkpoint.saver import Saver
from llmtrain.model.decoder import trained_shapes
from llmtrain.observe import wandb
from llmtrain.observe.log import log, progress
from llmtrain.observe.metrics import MetricsFile, StepLines
from llmtrain.parallel.mesh import Mesh
from llmtrain.trainer.assemble import Job, checkpoint_dir
from llmtrain.trainer.guard import Guard

SHOWN = ("loss", "reward_mean", "lr", "tokens_per_s")  # beside the progress bar
INTERRUPTED = 75  # exit code (EX_TEMPFAIL): start the same command again and it goes on

logger = logging.getLogger(__name__)

StepFn = Callable[[int], dict[str, float]]
"""step -> metrics; `tokens` among them is the number of tokens of this step."""


def train(job: Job, step_fn: StepFn) -> None:
    """Steps `job.step` .. `train.steps`. Raises SystemExit(75) after a checkpoint on SIGTERM or SIGUSR1, OSError on all
    ranks when the last save fails (or any, with `checkpoint.on_error: stop`)."""
    steps, name = job.config.train.steps, job.config.name
    guard, stop = Guard(job), StopSignal(job.mesh)
    job.saver = make_saver(job)
    with Record(job) as record, job.saver, progress(steps, job.step, name) as bar:
        while job.step < steps:
            began, job.watch.step = time.perf_counter(), job.step + 1
            metrics = step_fn(job.step)
            if guard.spiked:
                job.saver.wait()
                guard.rewind(int(metrics["tokens"]))
                record.go_on_after(job.step)
                continue
            job.step += 1
            record.write(job, metrics | guard.report(), time.perf_counter() - began, bar)
            save_or_stop(job, stop)
        job.saver.close()


def save_or_stop(job: Job, stop: StopSignal) -> None:
    """After a step: save where that is due, and leave if a signal came, or a save failed and must not."""
    config = job.config
    stopping, failing = stop.poll(job.saver.failed)
    if failing:
        job.saver.wait()  # raises on all ranks at the same step
    if stopping or is_due(job.step, config.checkpoint.every_steps) or job.step == config.train.steps:
        save(job)
    if stopping and job.step < config.train.steps:
        job.saver.close()
        log(f"stopped by a signal after step {job.step}; the same command goes on from here")
        sys.exit(INTERRUPTED)


def is_due(step: int, every_steps: int) -> bool:
    """0 = never."""
    return every_steps > 0 and step % every_steps == 0


def make_saver(job: Job) -> Saver:
    """A collective."""
    settings, mesh = job.config.checkpoint, job.mesh
    group = mesh.side_group(job.config.engine.timeout_s) if settings.background else mesh
    return Saver(checkpoint_dir(job.config), job.engine, trained_shapes(job.model), settings, group)


def save(job: Job) -> None:
    """A checkpoint of this step (a collective); see `Saver.save`."""
    state = {
        "step": job.step,
        "optimizer_step": job.engine.step,
        "tokens": job.tokens,
        "engine": job.engine.extra_state(),
        "guard": asdict(job.guard),
        "mesh": job.mesh.sizes,
        "config": job.config.model_dump(mode="json"),
        "model": job.model.model_dump(mode="json"),
        "base": job.base,
        "versions": {"llmtrain": __version__, **{name: version(name) for name in ("torch", "deepspeed")}},
    }
    job.saver.save(state)


class Record:
    """Where the numbers of a run go, on rank 0: metrics.jsonl, W&B, the progress bar. A context: closed, and W&B told
    of a failure, however the run ends."""

    def __init__(self, job: Job) -> None:
        self.every_steps, self.main = job.config.log.every_steps, job.mesh.rank == 0
        if not self.main:
            return
        config, directory = job.config, job.config.directory
        self.path = os.path.join(directory, "metrics.jsonl")
        self.patient = config.checkpoint.on_error == "warn"
        self.file = MetricsFile(self.path, job.step, self.patient)
        settings = config.model_dump(mode="json")
        self.sink = wandb.start(config.log.wandb, config.log.project, config.name, directory, settings, job.step > 0)

    def write(self, job: Job, metrics: dict[str, float], step_s: float, bar: Callable) -> None:
        """Metrics of `job.step`, with what every stage shares."""
        tokens = metrics.pop("tokens")
        job.tokens += int(tokens)
        if not self.main or not is_due(job.step, self.every_steps):
            return
        timing = {"tokens_per_s": tokens / step_s, "step_s": step_s, "peak_bytes": peak_bytes()}
        line = {**metrics, "tokens": job.tokens, **timing}
        self.file.write({"step": job.step, **line})
        self.sink.log(job.step, line)
        bar(job.step, {name: line[name] for name in SHOWN if name in line})

    def go_on_after(self, step: int) -> None:
        """The run went back: later lines are written again. (W&B keeps the first value of a step.)"""
        if self.main:
            self.file.close()
            self.file = MetricsFile(self.path, step, self.patient)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.main:
            self.file.close()
            self.sink.finish(exit_code=0 if kind is None or kind is SystemExit else 1)


def peak_bytes() -> int:
    """Of this rank so far: device memory where there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StopSignal:
    """SIGTERM or SIGUSR1 on any trainer stops all of them after the step they are in."""

    def __init__(self, mesh: Mesh) -> None:
        self.device, self.told = mesh.device, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.tell)

    def tell(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.told = True

    def poll(self, failing: bool) -> tuple[bool, bool]:
        """Whether any rank was told to stop, and whether any is `failing`. A collective: the same answer everywhere,
        also when a signal comes while it runs."""
        flags = torch.tensor([float(self.told), float(failing)], device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        stopping, failed = flags.tolist()
        return bool(stopping), bool(failed)


def note_evaluation(job: Job, scores: dict[str, float]) -> None:
    """One line in evaluations.jsonl, on rank 0; where the disk does not take it, and the run is to go on all the same,
    in the log alone."""
    if job.mesh.rank != 0:
        return
    shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
    log(f"held out, step {job.step}: {shown}")
    path = os.path.join(job.config.directory, "evaluations.jsonl")
    try:
        lines = StepLines(path, resume_step=job.step - 1)
        lines.write({"step": job.step, **scores})
        lines.close()
    except OSError as error:
        if job.config.checkpoint.on_error == "stop":
            raise
        logger.warning("%s: %s; what was held out at step %d stands above alone", path, error.strerror, job.step)
