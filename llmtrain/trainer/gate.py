"""Compares generator and trainer, and stops a run in which they disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmtrain.config.schema import RolloutConfig
from llmtrain.engine.base import Engine
from llmtrain.parallel.mesh import Mesh
from llmtrain.types import Batch


class Disagreement(RuntimeError):
    """Says that generator and trainer differ; raised on every trainer."""


def limit_of(max_logprob_gap: float | None, precision: str) -> float:
    """Returns by how many nats generator and trainer may differ in a token's log-prob."""
    return max_logprob_gap or (1e-3 if precision == "fp32" else 1.0)


class Gate:
    """Stops the run when generator and trainer disagree about the log-probs of what was sampled.

    At the first step everything is scored once more before the update. Later steps cost nothing: the first update on
    a set of rollouts sees the same weights as the generator did, so its `logprob_gap_max` is the comparison. Where
    samples may be older than the weights (`rollout.max_staleness`) the difference is what was learned since, and only
    the first step, whose samples are not, is compared; of a replay that resumes they are, so nothing is.
    """

    def __init__(self, rollout: RolloutConfig, precision: str, mesh: Mesh) -> None:
        self.limit = limit_of(rollout.max_logprob_gap, precision)
        self.mesh, self.passed, self.stale = mesh, False, rollout.max_staleness > 0
        self.replays = rollout.replay is not None

    def before_update(self, engine: Engine, batches: Sequence[Batch], number: int) -> None:
        """Compares at the first step, before its update (a collective)."""
        if self.passed or (self.stale and self.replays and number > 0):
            return
        gaps = [0.0]
        for batch, scores in zip(batches, engine.score(batches), strict=True):
            difference = (scores.logprobs.cpu() - batch.extra["old_logprobs"]).abs().masked_fill(~batch.loss_mask, 0.0)
            gaps.append(float(difference.nan_to_num(math.inf).max()))  # max() would lose a NaN
        self._compare(max(self.mesh.all_gather_json(max(gaps))), number)
        self.passed = True

    def after_update(self, gap: float, number: int) -> None:
        """Raises Disagreement when the gap is above `rollout.max_logprob_gap`, where the samples are of these
        weights."""
        if not self.stale:
            self._compare(gap, number)

    def _compare(self, gap: float, number: int) -> None:
        if not math.isfinite(gap) or gap > self.limit:
            raise Disagreement(
                f"step {number + 1}: generator and trainer differ by {gap:.4g} in a token's log-prob, more than "
                f"rollout.max_logprob_gap={self.limit}: they do not hold the same weights, or compute in too "
                "different a precision; try engine.precision=fp32, or raise the limit if the gap is understood"
            )
