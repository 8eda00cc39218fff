"""Builds the frozen reference of a policy: the weights that it started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmtrain.engine.base import Scorer
from llmtrain.engine.build import Role, build_frozen
from llmtrain.model.decoder import Decoder
from llmtrain.model.lora import adapters_off
from llmtrain.trainer.frozen import awake
from llmtrain.trainer.job import Job
from llmtrain.trainer.weights import start_source
from llmtrain.types import Batch, Scores


class WithoutAdapters:
    """Implements engine.base.Scorer: scores with the weights that the adapters of another model were put on.

    It holds nothing of its own, so it is always where that model is.
    """

    def __init__(self, model: Scorer) -> None:
        self.model = model

    @property
    def parts(self) -> list[Decoder]:
        """Returns the parts of the model with its adapters."""
        return self.model.parts

    def score(self, microbatches: Sequence[Batch]) -> list[Scores]:
        """See Scorer. Raises RuntimeError while the model is on the host."""
        with adapters_off(self.parts):
            return self.model.score(microbatches)

    def to_host(self) -> None:
        """Does nothing: there is nothing to move."""

    def to_device(self) -> None:
        """Does nothing: there is nothing to move."""


class Waiting:
    """Implements engine.base.Scorer: lies in host memory but while it scores."""

    def __init__(self, model: Scorer) -> None:
        self.model = model
        self.to_host()

    @property
    def parts(self) -> list[Decoder]:
        """Returns the parts of the model that waits."""
        return self.model.parts

    def score(self, microbatches: Sequence[Batch]) -> list[Scores]:
        """See Scorer."""
        with awake([self.model], wait=True):
            return self.model.score(microbatches)

    def to_host(self) -> None:
        """See Scorer."""
        self.model.to_host()

    def to_device(self) -> None:
        """Does nothing: it goes there by itself."""


def build_reference(job: Job, wanted: bool, waits: bool = False) -> Scorer | None:
    """Returns the policy at the start of the run, frozen, if it is `wanted` (a collective); the policy is built before.

    With `model.lora` that is the policy without its adapters, which costs no memory; else a model of its own, which
    lies in host memory but while it scores if it `waits`.
    """
    if not wanted:
        return None
    if job.model.lora is not None:
        return WithoutAdapters(job.engine)
    config = job.config
    frozen = build_frozen(Role("reference", job.model, config.parallel, config.engine, start_source(job)), job.mesh)
    return Waiting(frozen) if waits else frozen


def own_experts(batches: Sequence[Batch]) -> list[Batch]:
    """Returns the batches for another model than the one that wrote them: it chooses its experts itself."""
    return [replace(batch, experts=None) for batch in batches]


def add_reference(batches: Sequence[Batch], reference: Scorer | None) -> None:
    """Adds `extra["ref_logprobs"]` to the batches, in place, if there is a reference."""
    if reference is not None:
        for batch, scores in zip(batches, reference.score(own_experts(batches)), strict=True):
            batch.extra["ref_logprobs"] = scores.logprobs.cpu()
