"""Pipeline parallelism over torch.distributed.pipelining: cutting the decoder, and running microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from llmtrain.config.stages import StagePlan
from llmtrain.parallel.mesh import Mesh
from llmtrain.types import Batch

Output = tuple[Tensor, Tensor]


def keep_stage(model: nn.Module, plan: StagePlan, stage: int) -> None:
    """Delete what other stages own, in place; names stay global. A tied head becomes a second copy."""
    if len(plan.layers) == 1:
        return
    if model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(torch.empty_like(model.embed.weight))
    if stage > 0:
        model.embed = None
    if stage < len(plan.layers) - 1:
        model.norm = model.head = None
    model.layers = nn.ModuleDict({str(i): model.layers[str(i)] for i in plan.layers[stage]})


def inputs_of(batch: Batch, has_head: bool, scaled: bool | None = None) -> dict[str, Tensor]:
    """Keyword arguments of Decoder.forward for a stage; `scaled`: with the temperature (None: if it is not 1)."""
    names = ["positions", "segment_ids", "branch_ids"] + (["labels"] if has_head else [])
    kwargs = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
    if has_head and (batch.temperature != 1.0 if scaled is None else scaled):
        kwargs["temperature"] = torch.full_like(batch.positions[:, 0], batch.temperature, dtype=torch.float32)
    return kwargs


class Pipeline:
    """Runs microbatches through the stages, 1F1B (arXiv 2104.04473). `parts` are this rank's stages, rising."""

    def __init__(self, parts: Sequence[nn.Module], plan: StagePlan, mesh: Mesh) -> None:
        self.parts, self.plan, self.mesh = parts, plan, mesh
        self.schedules: dict[bool, tuple[tuple, Schedule1F1B]] = {}
        self.loss: Callable[[Output, int], Tensor] | None = None

    def train(self, batches: Sequence[Batch], loss: Callable[[Output, int], Tensor]) -> None:
        """Forward and backward; on the rank with the head `loss(scores, i)` is called for microbatch i."""
        self.loss = loss
        last = {"target": torch.arange(len(batches)), "losses": []} if self.mesh.has_head else {}
        self._schedule(batches).step(*self._args(batches), **self._kwargs(batches), **last)

    @torch.no_grad()
    def score(self, batches: Sequence[Batch]) -> list[Output] | None:
        """The last stage's outputs, None on ranks without it."""
        self.loss = lambda scores, i: scores[0].sum()
        last = {"target": torch.arange(len(batches)), "losses": []} if self.mesh.has_head else {}
        out = self._schedule(batches).eval(*self._args(batches), **self._kwargs(batches), **last)
        if not self.mesh.has_head:
            return None
        rows = len(batches[0].input_ids)
        return list(zip(*(o.split(rows) for o in out), strict=True))

    def _args(self, batches: Sequence[Batch]) -> list[Tensor]:
        return [torch.cat([b.input_ids for b in batches])] if self.mesh.has_embedding else []

    def _kwargs(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        scaled = any(b.temperature != 1.0 for b in batches)
        each = [inputs_of(b, self.mesh.has_head, scaled) for b in batches]
        assert all(e.keys() == each[0].keys() for e in each), "microbatches of one step have the same fields"
        return {name: torch.cat([e[name] for e in each]) for name in each[0]}

    def _schedule(self, batches: Sequence[Batch]) -> Schedule1F1B:
        """For this number and shape of microbatches, a stage's buffers being sized once; the last one is kept, of each
        of training and scoring."""
        training = torch.is_grad_enabled()
        key = (len(batches), tuple(batches[0].input_ids.shape))
        if training not in self.schedules or self.schedules[training][0] != key:
            stages = [
                PipelineStage(part, index, len(self.plan.layers), self.mesh.device, group=self.mesh.groups["pp"])
                for part, index in zip(self.parts, self.plan.stages_of(self.mesh.coords["pp"]), strict=True)
            ]
            schedule = Schedule1F1B(
                stages[0], len(batches), loss_fn=lambda out, i: self.loss(out, int(i)), scale_grads=False
            )
            self.schedules[training] = (key, schedule)
        return self.schedules[training][1]
