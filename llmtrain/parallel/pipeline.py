"""Pipeline parallelism over torch.distributed.pipelining: which layers a stage owns, and running microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from llmtrain.parallel.mesh import Mesh
from llmtrain.types import Batch

Output = tuple[Tensor, Tensor]


def stage_layers(num_layers: int, pp: int, stage: int) -> range:
    """Layers of a stage: near-equal runs, the first stages one longer. Raises ValueError if a stage would be empty."""
    if num_layers < pp:
        raise ValueError(f"parallel.pp={pp}: at most one stage a layer, the model has {num_layers}; lower pp")
    base, longer = divmod(num_layers, pp)
    first = stage * base + min(stage, longer)
    return range(first, first + base + (stage < longer))


def stage_of(name: str, num_layers: int, pp: int) -> int:
    """The stage that owns a canonical parameter (of a tied embedding: the first)."""
    if name.startswith("embed."):
        return 0
    if not name.startswith("layers."):
        return pp - 1
    layer = int(name.split(".")[1])
    return next(s for s in range(pp) if layer in stage_layers(num_layers, pp, s))


def split_stage(model: nn.Module, stage: int, pp: int) -> None:
    """Delete what other stages own, in place; names stay global. A tied head becomes a second copy."""
    if pp == 1:
        return
    keep = stage_layers(len(model.layers), pp, stage)
    if model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(torch.empty_like(model.embed.weight))
    if stage > 0:
        model.embed = None
    if stage < pp - 1:
        model.norm = model.head = None
    model.layers = nn.ModuleDict({str(i): model.layers[str(i)] for i in keep})


def inputs_of(batch: Batch, last_stage: bool, scaled: bool | None = None) -> dict[str, Tensor]:
    """Keyword arguments of Decoder.forward for a stage; `scaled`: with the temperature (None: if it is not 1)."""
    names = ["positions", "segment_ids", "branch_ids"] + (["labels"] if last_stage else [])
    kwargs = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
    if last_stage and (batch.temperature != 1.0 if scaled is None else scaled):
        kwargs["temperature"] = torch.full_like(batch.positions[:, 0], batch.temperature, dtype=torch.float32)
    return kwargs


class Pipeline:
    """Runs microbatches through the stages, 1F1B (arXiv 2104.04473)."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.schedules: dict[bool, tuple[tuple, Schedule1F1B]] = {}
        self.loss: Callable[[Output, int], Tensor] | None = None

    def train(self, batches: Sequence[Batch], loss: Callable[[Output, int], Tensor]) -> None:
        """Forward and backward; on the last stage `loss(scores, i)` is called for microbatch i."""
        self.loss = loss
        last = {"target": torch.arange(len(batches)), "losses": []} if self.mesh.is_last_stage else {}
        self._schedule(batches).step(*self._args(batches), **self._kwargs(batches), **last)

    @torch.no_grad()
    def score(self, batches: Sequence[Batch]) -> list[Output] | None:
        """The last stage's outputs, None on the other stages."""
        self.loss = lambda scores, i: scores[0].sum()
        last = {"target": torch.arange(len(batches)), "losses": []} if self.mesh.is_last_stage else {}
        out = self._schedule(batches).eval(*self._args(batches), **self._kwargs(batches), **last)
        if not self.mesh.is_last_stage:
            return None
        rows = len(batches[0].input_ids)
        return list(zip(*(o.split(rows) for o in out), strict=True))

    def _args(self, batches: Sequence[Batch]) -> list[Tensor]:
        return [torch.cat([b.input_ids for b in batches])] if self.mesh.is_first_stage else []

    def _kwargs(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        scaled = any(b.temperature != 1.0 for b in batches)
        each = [inputs_of(b, self.mesh.is_last_stage, scaled) for b in batches]
        assert all(e.keys() == each[0].keys() for e in each), "microbatches of one step have the same fields"
        return {name: torch.cat([e[name] for e in each]) for name in each[0]}

    def _schedule(self, batches: Sequence[Batch]) -> Schedule1F1B:
        """For this number and shape of microbatches, a stage's buffers being sized once; the last one is kept, of each
        of training and scoring."""
        training = torch.is_grad_enabled()
        key = (len(batches), tuple(batches[0].input_ids.shape))
        if training not in self.schedules or self.schedules[training][0] != key:
            pp, at = self.mesh.sizes["pp"], self.mesh.coords["pp"]
            stage = PipelineStage(self.model, at, pp, self.mesh.device, group=self.mesh.groups["pp"])
            schedule = Schedule1F1B(
                stage, len(batches), loss_fn=lambda out, i: self.loss(out, int(i)), scale_grads=False
            )
            self.schedules[training] = (key, schedule)
        return self.schedules[training][1]
