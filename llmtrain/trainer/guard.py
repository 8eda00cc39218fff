"""Decides what happens when a step goes wrong: numbers that are not finite, a loss spike, copies of weights that
differ.

Every decision is taken before the update, from values that are equal on all ranks, and what it depends on is in the
checkpoints: a run that was killed decides again as it did. events.jsonl tells what was decided.
"""

from __future__ import annotations

import os
from functools import partial
from statistics import fmean, pstdev

from llmtrain.checkpoint.roles import MAIN
from llmtrain.engine.tally import not_finite, stop_if_not_finite
from llmtrain.observe.log import log
from llmtrain.observe.metrics import Events
from llmtrain.parallel.replicas import differing
from llmtrain.trainer.job import Job
from llmtrain.trainer.resume import load_newest, named

SHOWN = 8  # parameters named in a message


class Guard:
    """Decides about the updates of all models of a run (`Engine.admit`). `job.guard` is its memory."""

    def __init__(self, job: Job) -> None:
        self.job, self.settings = job, job.config.guard
        self.skipped = 0  # updates left out in the step under way
        self.spiked = False  # the step under way asks for a rewind
        self.events = Events(os.path.join(job.config.directory, "events.jsonl")) if job.mesh.rank == 0 else None
        self._recall()
        for role, engine in job.engines.items():
            engine.admit = partial(self.admit, role)

    def admit(self, role: str, loss: float, broken: list[int]) -> bool:
        """Decides about an update, as engine.base.Admit asks. Raises FloatingPointError (on all ranks) by the policy
        `stop`, and after `guard.max_skips` in a row; RuntimeError when copies of the weights differ."""
        settings, memory, step = self.settings, self.job.guard.of(role), self.job.step + 1
        if settings.replica_check_steps and step % settings.replica_check_steps == 0:
            self._check_replicas(role, step)
        if broken:
            return self._not_finite(role, loss, broken)
        if settings.spike != "off" and is_spike(loss, memory.losses, settings.spike_window, settings.spike_sigma):
            return self._spike(role, loss)
        memory.skips = 0
        if settings.spike != "off":
            memory.losses = [*memory.losses, loss][-settings.spike_window :]
        return True

    def report(self) -> dict[str, float]:
        """Returns what metrics.jsonl says of the step that ends: `skipped`, the updates left out, if there were any."""
        skipped, self.skipped = self.skipped, 0
        return {"skipped": skipped} if skipped else {}

    def rewind(self, step_tokens: int) -> None:
        """Goes back to the newest checkpoint, never to see the data of the steps since again (PaLM's recipe, arXiv
        2204.02311, section 5.1); a collective. `step_tokens` are those of the step that spiked.

        Raises RuntimeError without a checkpoint, FloatingPointError after `guard.max_skips` rewinds to the same one.
        """
        job, last_step, tokens = self.job, self.job.step + 1, self.job.tokens + step_tokens
        rewinds, self.spiked = job.guard.rewinds, False
        if load_newest(job) is None:
            raise RuntimeError(f"step {last_step}: the loss spiked and no checkpoint is intact; start the run anew")
        if self.events is not None:
            self.events.go_on_after(job.step)
        job.guard.rewinds = [*rewinds, [job.step, last_step - job.step, tokens - job.tokens]]
        again = sum(to_step == job.step for to_step, _, _ in job.guard.rewinds)
        self._note("rewind", last_step, to_step=job.step, steps=last_step - job.step, tokens=tokens - job.tokens)
        log(f"step {last_step}: back to step {job.step}, and on with the data behind the spike")
        if again > self.settings.max_skips:
            raise FloatingPointError(
                f"guard.max_skips={self.settings.max_skips}: the run went back to step {job.step} more often; "
                "lower optim.lr, or take up an older checkpoint"
            )

    def _check_replicas(self, role: str, step: int) -> None:
        if found := differing(self.job.engines[role].replicas(), self.job.mesh):
            raise RuntimeError(
                f"step {step}: {named(role)}{'; '.join(found[:SHOWN])} ({len(found)} in all). Memory or a device "
                "there is not to be trusted: start again without that host; the run goes on from its last checkpoint"
            )

    def _not_finite(self, role: str, loss: float, broken: list[int]) -> bool:
        if self.settings.nonfinite == "skip":
            return self._skip(role, not_finite(loss, broken), loss)
        try:
            return stop_if_not_finite(loss, broken)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {self.job.step + 1}: {named(role)}{error}") from None

    def _spike(self, role: str, loss: float) -> bool:
        if self.settings.spike == "skip":
            return self._skip(role, f"the loss, {loss:.4g}, spiked", loss)
        self.spiked = True
        return False

    def _skip(self, role: str, reason: str, loss: float) -> bool:
        memory, step = self.job.guard.of(role), self.job.step + 1
        memory.skips += 1
        self.skipped += 1
        self._note("skip", step, reason=reason, loss=loss, **({} if role == MAIN else {"role": role}))
        log(f"step {step}: {named(role)}{reason}; the update is left out")
        if memory.skips > self.settings.max_skips:
            raise FloatingPointError(
                f"step {step}: {named(role)}{reason}, and guard.max_skips={self.settings.max_skips} updates before it "
                "were left out in a row; lower optim.lr, or inspect the data"
            )
        return False

    def _note(self, event: str, step: int, **details: object) -> None:
        if self.events is not None:
            self.events.write({"step": step, "event": event, **details})

    def _recall(self) -> None:
        """Takes up rewinds from events.jsonl: one that was followed by a kill is in no checkpoint yet."""
        job, noted = self.job, None
        if self.events is not None:
            noted = self.events.go_on_after(job.step)
        noted = job.mesh.all_gather_json(noted)[0]
        rewinds = [[e["to_step"], e["steps"], e["tokens"]] for e in noted if e["event"] == "rewind"]
        job.guard.rewinds = max(job.guard.rewinds, rewinds, key=len)


def is_spike(loss: float, window: list[float], size: int, sigma: float) -> bool:
    """Tells whether the loss is more than `sigma` standard deviations above the mean of the `size` ones before; False
    while there are fewer."""
    return len(window) == size and loss > fmean(window) + sigma * pstdev(window)
