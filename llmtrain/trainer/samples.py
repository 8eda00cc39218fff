"""samples.jsonl of an RL stage."""

from __future__ import annotations

import os
from collections.abc import Sequence

from llmtrain.observe.metrics import Samples
from llmtrain.trainer.assemble import Job
from llmtrain.types import Experience


class SampleLog:
    """Writes the first `log.samples` completions of each logged step, on rank 0."""

    def __init__(self, job: Job) -> None:
        self.decode, self.settings = job.tokenizer.decode, job.config.log
        self.file: Samples | None = None
        if job.mesh.rank == 0 and self.settings.samples:
            path = os.path.join(job.config.directory, "samples.jsonl")
            self.file = Samples(path, job.step, patient=job.config.checkpoint.on_error == "warn")

    def write(self, step: int, experiences: Sequence[Experience]) -> None:
        """The completions of one step."""
        if self.file is None or step % self.settings.every_steps:
            return
        for e in experiences[: self.settings.samples]:
            prompt = self.decode(e.rollout.prompt_ids)
            self.file.write({"step": step, "prompt": prompt, "completion": e.text, "reward": e.reward})
