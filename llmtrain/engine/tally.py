"""Sums the losses and metrics of one step over microbatches and ranks."""

from __future__ import annotations

import math
from collections import defaultdict

from torch import Tensor

from llmtrain.parallel.mesh import Mesh


def stop_if_not_finite(loss: float, broken: list[int]) -> bool:
    """Admits the update if all is finite: the plain `Admit`. Raises FloatingPointError otherwise, on every rank, naming
    the ranks."""
    if broken:
        raise FloatingPointError(
            f"{not_finite(loss, broken)}; the update was not made. Lower optim.lr, or inspect the batch; the last "
            "checkpoint is intact"
        )
    return True


def not_finite(loss: float, broken: list[int]) -> str:
    """Returns what is not finite, given the loss over all ranks and what `Tally.reduce` returned."""
    if math.isfinite(loss):
        return "the gradient is not finite, a sum over ranks, though the loss of each is"
    return f"the loss is not finite on rank(s) {', '.join(map(str, broken))}"


class Tally:
    """Sums what the last pipeline stage adds; `reduce` makes `loss` and `metrics` equal on all ranks."""

    def __init__(self, denominator: float) -> None:
        if denominator <= 0:
            raise ValueError("no token of this step is trained; check the data's loss mask and train.seq_len")
        self.denominator = denominator
        self.parts: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        self.loss = math.nan
        self.metrics: dict[str, float] = {}

    def add(self, index: int, loss_sum: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """Adds microbatch `index`; returns its loss sum, to be differentiated. A later call replaces an earlier one:
        torch's pipeline calls the loss once more, on made-up values, to learn the shapes."""
        self.parts[index] = (loss_sum.detach(), metrics)
        return loss_sum

    def reduce(self, mesh: Mesh, gradient_finite: bool) -> list[int]:
        """Sums over microbatches and ranks (a collective). Returns the ranks whose loss is not finite. If there are
        none, those that see a gradient that is not: it is reduced over ranks and need not come from them."""
        mine = self._local() if mesh.has_head else None
        bad = {"loss": mine is not None and not math.isfinite(mine["loss"]), "gradient": not gradient_finite}
        # Tensor- and context-parallel ranks hold the same values: count them once.
        report = mine if mesh.coords["tp"] == mesh.coords["cp"] == 0 else None
        gathered = mesh.all_gather_json({**bad, "report": report})
        self._merge([each["report"] for each in gathered if each["report"] is not None])
        found = {name: [rank for rank, each in enumerate(gathered) if each[name]] for name in bad}
        return found["loss"] or found["gradient"]

    def _local(self) -> dict:
        sums: dict[str, float] = defaultdict(float)
        maxima: dict[str, float] = {}
        for _, metrics in self.parts.values():
            for name, value in metrics.items():
                if name.endswith("_max"):
                    maxima[name] = max(maxima.get(name, -math.inf), float(value.nan_to_num(math.inf)))
                else:
                    sums[name] += float(value)
        return {"loss": sum(float(loss) for loss, _ in self.parts.values()), "sums": sums, "maxima": maxima}

    def _merge(self, reports: list[dict]) -> None:
        self.loss = sum(r["loss"] for r in reports) / self.denominator
        for name in dict.fromkeys(name for r in reports for name in r["sums"]):
            self.metrics[name] = sum(r["sums"].get(name, 0.0) for r in reports) / self.denominator
        for name in dict.fromkeys(name for r in reports for name in r["maxima"]):
            self.metrics[name] = max(r["maxima"].get(name, -math.inf) for r in reports)
