"""Tells of work that is wasted, each kind once in a run: a line in the log, and one in events.jsonl."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

from llmtrain.config.schema import OptimConfig
from llmtrain.observe.log import log
from llmtrain.observe.metrics import Events, read_metrics
from llmtrain.trainer.job import Job
from llmtrain.types import Batch

EVENT = "waste"
IDLE_STEPS = 10  # so many steps in a row without a group that has a spread of rewards
PADDING = 0.5  # a larger share of padding is told


class Waste:
    """Looks at the steps of a run, on rank 0."""

    def __init__(self, job: Job) -> None:
        self.job, self.idle_steps = job, 0
        self.path = os.path.join(job.config.directory, "events.jsonl")
        known = read_metrics(self.path) if os.path.exists(self.path) else []
        self.told = {line["about"] for line in known if line["event"] == EVENT}
        for engine in job.engines.values():
            for about, words in schedule_waste(engine.optim, engine.total_steps):
                self._tell(about, words)

    def look(self, metrics: Mapping[str, float]) -> None:
        """Looks at the step that has ended, by its metrics and by what `note_padding` has noted."""
        self.idle_steps = self.idle_steps + 1 if metrics.get("kept_fraction") == 0 else 0
        if self.idle_steps == IDLE_STEPS:
            self._tell(
                "groups",
                f"no group of the last {IDLE_STEPS} steps has a spread of rewards, or no sample was kept, so nothing "
                "was learned in them: "
                "take easier or harder prompts, a higher rollout.temperature or a larger rollout.group_size",
            )
        if self.job.padding > PADDING:
            self._tell(
                "padding",
                f"{self.job.padding:.0%} of the tokens in the microbatches of a step are padding: {self._remedy()}",
            )

    def _remedy(self) -> str:
        train, mesh = self.job.config.train, self.job.mesh
        if self.job.config.data.replay_seqs and mesh.sizes["pp"] > 1:
            return "with data.replay_seqs rows in a pipeline have train.seq_len tokens; lower it, or use no pipeline"
        if self.job.recipe.fixed_batch and train.micro_batch_tokens is None:
            return "set train.micro_batch_tokens, so that short rows share one"
        return "take more rows or prompts a step, or fewer data-parallel ranks and pipeline stages"

    def _tell(self, about: str, words: str) -> None:
        if self.job.mesh.rank or about in self.told:
            return
        self.told.add(about)
        log(f"step {self.job.step}: {words}")
        with contextlib.suppress(OSError):  # a full disk; the log has it
            Events(self.path).write({"step": self.job.step, "event": EVENT, "about": about, "words": words})


def schedule_waste(optim: OptimConfig, updates: int) -> Iterator[tuple[str, str]]:
    """Yields (about, words) of a learning rate whose course is cut off."""
    if optim.warmup_steps >= updates:
        yield (
            "peak",
            f"optim.warmup_steps={optim.warmup_steps}: the learning rate rises in all {updates} updates of the run, "
            f"and optim.lr={optim.lr:g} is never reached or only by the last; lower warmup_steps",
        )
    elif optim.schedule != "constant" and updates == optim.warmup_steps + 1:
        yield (
            "decay",
            f"optim.schedule={optim.schedule}: the decay never begins, as the run has {updates} updates and the warmup "
            f"takes {optim.warmup_steps}; lower warmup_steps, or set optim.schedule=constant",
        )


def note_padding(job: Job, microbatches: Sequence[Batch]) -> None:
    """Notes what share of the tokens of this rank's microbatches is padding, for the end of the step."""
    padded = sum(int((b.segment_ids == -1).sum()) for b in microbatches if b.segment_ids is not None)
    job.padding = padded / max(1, sum(b.input_ids.numel() for b in microbatches))
