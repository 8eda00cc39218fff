"""Writes what a run leaves while it trains: metrics.jsonl, W&B, the progress bar, evaluations.jsonl, samples.jsonl."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import TracebackType

import torch

from llmtrain.observe import wandb
from llmtrain.observe.beside import PREFIX
from llmtrain.observe.log import as_line, log
from llmtrain.observe.metrics import MetricsFile, Samples, StepLines
from llmtrain.trainer.completions import completion_text
from llmtrain.trainer.job import Job
from llmtrain.types import Group

STEP_SAMPLES = "step_samples"  # what a step says of how many completions it sampled
SAMPLES = "samples"  # key in Job.state, and in metrics.jsonl: how many the run has sampled
CURRICULUM = "curriculum"  # key in Job.state: what `data.curriculum` has learned of the rows
SHOWN = ("loss", "reward_mean", "lr", "tokens_per_s")  # beside the progress bar

logger = logging.getLogger(__name__)


def is_due(step: int, every_steps: int) -> bool:
    """Says whether something that happens `every_steps` steps (0 = never) happens after this one."""
    return every_steps > 0 and step % every_steps == 0


class Record:
    """Sends the numbers of a run, on rank 0, to metrics.jsonl, W&B and the progress bar. It is a context manager: files
    are closed, and W&B told of a failure, however the run ends."""

    def __init__(self, job: Job) -> None:
        self.every_steps, self.main = job.config.log.every_steps, job.mesh.rank == 0
        if not self.main:
            return
        config, directory = job.config, job.config.directory
        self.path = os.path.join(directory, "metrics.jsonl")
        self.patient = config.checkpoint.on_error == "warn"
        self.file = MetricsFile(self.path, job.step or -1, self.patient)  # at step 0 a line of before is written again
        settings = config.model_dump(mode="json")
        self.sink = wandb.start(config.log.wandb, config.log.project, config.name, directory, settings, job.step > 0)

    def write_start(self, measured: Mapping[str, float]) -> None:
        """Writes what was measured before the first step, if anything was."""
        if self.main and measured:
            self.file.write({"step": 0, **measured})
            self.sink.log(0, measured)

    def write(
        self,
        job: Job,
        metrics: dict[str, float],
        tokens: int,
        step_s: float,
        bar: Callable,
        measured: Mapping[str, float],
    ) -> None:
        """Writes the metrics of `job.step`, in which `tokens` were seen, with what every recipe shares, and what was
        `measured` after it, whose line is never left out."""
        job.tokens += tokens
        if STEP_SAMPLES in metrics:
            job.state[SAMPLES] = job.state.get(SAMPLES, 0) + metrics[STEP_SAMPLES]
        if not self.main or not (measured or is_due(job.step, self.every_steps)):
            return
        timing = {"tokens_per_s": tokens / step_s, "step_s": step_s, "peak_bytes": peak_bytes()}
        sampled = {SAMPLES: job.state[SAMPLES]} if STEP_SAMPLES in metrics else {}
        if CURRICULUM in job.state:
            sampled["skipped_prompts"] = job.state[CURRICULUM]["skipped"]
        line = {**metrics, "tokens": job.tokens, **sampled, **timing, **measured}
        self.file.write({"step": job.step, **line})
        self.sink.log(job.step, line)
        bar(job.step, {name: line[name] for name in SHOWN if name in line})

    def complete(self, job: Job, late: Mapping[int, Mapping[str, float]]) -> None:
        """Adds what was measured of earlier steps, by these, to their lines. W&B, whose steps ascend, has it at the
        newest step, with its own in `eval/step`."""
        for step, measured in late.items() if self.main else ():
            self.file.amend(step, dict(measured))
            self.sink.log(job.step, {**measured, f"{PREFIX}step": step})

    def go_on_after(self, step: int) -> None:
        """Lets later lines be written again, after the run went back to `step`. (W&B keeps the first value of a
        step.)"""
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
    """Returns the most memory that this rank has used so far: device memory where there is a GPU, else resident
    memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def note_evaluation(job: Job, scores: dict[str, float]) -> None:
    """Writes one line to evaluations.jsonl and the log, on rank 0. Where the disk does not take it, and the run is to
    go on all the same (`checkpoint.on_error: warn`), it stands in the log alone."""
    if job.mesh.rank != 0:
        return
    log(f"held out, step {job.step}: {as_line(scores)}")
    path = os.path.join(job.config.directory, "evaluations.jsonl")
    try:
        lines = StepLines(path, resume_step=job.step - 1)
        lines.write({"step": job.step, **scores})
        lines.close()
    except OSError as error:
        if job.config.checkpoint.on_error == "stop":
            raise
        logger.warning("%s: %s; what was held out at step %d stands above alone", path, error.strerror, job.step)


class SampleLog:
    """Writes the first `log.samples` completions of each logged step, on rank 0, and one on which a reward failed."""

    def __init__(self, job: Job) -> None:
        self.decode, self.settings = completion_text(job.config, job.tokenizer), job.config.log
        self.file: Samples | None = None
        if job.mesh.rank == 0 and self.settings.samples:
            path = os.path.join(job.config.directory, "samples.jsonl")
            self.file = Samples(path, job.step, patient=job.config.checkpoint.on_error == "warn")

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Writes the completions of one step."""
        if self.file is None or step % self.settings.every_steps:
            return
        samples = list(chain.from_iterable(groups))
        shown = samples[: self.settings.samples]
        if not any(sample.errors for sample in shown):
            shown += [sample for sample in samples if sample.errors][:1]
        for sample in shown:
            prompt, completion = self.decode(sample.prompt_ids), self.decode(sample.ids)
            more = {"reward_errors": sample.errors} if sample.errors else {}
            if not all(sample.trained):
                more["turns"] = [{"policy" if own else "environment": self.decode(ids)} for own, ids in sample.turns()]
            self.file.write({"step": step, "prompt": prompt, "completion": completion, "reward": sample.reward, **more})


class Clock:
    """Measures the seconds between laps."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last call."""
        now = time.perf_counter()
        self.last, passed = now, now - self.last
        return passed
