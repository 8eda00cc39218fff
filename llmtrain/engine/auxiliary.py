"""Handles what modules do beside the token loss: auxiliary losses whose gradient their own backward adds, and routers
that are balanced between updates. What they count and the biases they keep is the same on all ranks of a pipeline
stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.engine.base import FragmentReader
from llmtrain.model.balance import balance_metrics, update_bias
from llmtrain.model.mtp import MultiToken
from llmtrain.model.router import Router
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.plan import buffers_of
from llmtrain.types import Address, Fragment


def routers_of(parts: Sequence[nn.Module]) -> dict[str, Router]:
    """Returns the routers of this rank's layers, by canonical module name."""
    return {name: m for part in parts for name, m in part.named_modules() if isinstance(m, Router)}


def start_auxiliary(parts: Sequence[nn.Module], factor: float) -> None:
    """Resets the counts before a step. Auxiliary losses count like the token loss, whose sum is differentiated times
    `factor`."""
    for router in routers_of(parts).values():
        router.counts.reset()
        router.counts.loss_factor = factor
    for modules in (part.mtp for part in parts if part.mtp is not None):
        modules.reset()
        modules.loss_factor = factor


@torch.no_grad()
def finish_auxiliary(parts: Sequence[nn.Module], mesh: Mesh, denominator: float, taken: bool) -> dict[str, float]:
    """Sums the counts over all ranks after a step and, if the update was `taken`, moves the routers' biases (a
    collective). Returns metrics, the same on all ranks; empty without routers and multi-token prediction modules."""
    further = {} if parts[0].config.mtp_layers == 0 else {"mtp_loss": _mean_further(parts[0].mtp, mesh)}
    if parts[0].config.moe is None:
        return further
    routers = routers_of(parts)
    sums = {name: _summed(router, mesh) for name, router in routers.items()}
    for name, router in routers.items():
        if taken and "bias" in router.config.balance:
            router.bias.copy_(update_bias(router.bias, sums[name].load, router.config.bias_rate))
    mine = _metrics(sums, _computed(sums, mesh), parts[0].config.moe.top_k, denominator)
    gathered = mesh.all_gather_json(mine if mesh.coords["tp"] == 0 else {})
    return further | _joined(gathered)


def _mean_further(modules: MultiToken, mesh: Mesh) -> float:
    """Returns the mean of -log p of a further token, over depths and data-parallel ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    if modules.sum is not None and modules.tokens is not None:
        sums += torch.stack([modules.sum.double(), modules.tokens.double()])
    dist.all_reduce(sums, group=mesh.groups["grad"])
    return float(sums[0] / sums[1].clamp(min=1))


class Sums(NamedTuple):
    """Holds a router's counts, summed over the data- and context-parallel ranks."""

    load: Tensor  # int64 [E]
    tokens: Tensor  # int64
    computed: Tensor  # int64: rows that experts of this tp coordinate computed
    losses: Tensor  # fp32 [2]


def _summed(router: Router, mesh: Mesh) -> Sums:
    own = router.counts

    def held(value: Tensor | None, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=mesh.device) if value is None else value

    load, tokens = held(own.load, router.weight.size(0)), held(own.tokens)
    computed = held(own.computed) if own.travels else load.sum()
    losses = held(own.losses, 2, dtype=torch.float32)
    counts = torch.cat([load, tokens[None], computed[None]])
    dist.all_reduce(counts, group=mesh.groups["grad"])
    dist.all_reduce(losses, group=mesh.groups["grad"])
    return Sums(counts[:-2], counts[-2], counts[-1], losses)


def _computed(sums: dict[str, Sums], mesh: Mesh) -> dict[str, Tensor]:
    """Returns the rows that the experts of each layer computed, summed over tp too, whose ranks have some experts
    each."""
    if mesh.tp_group is None or not sums:
        return {name: s.computed for name, s in sums.items()}
    rows = torch.stack([s.computed for s in sums.values()])
    dist.all_reduce(rows, group=mesh.tp_group)
    return dict(zip(sums, rows, strict=True))


def _metrics(sums: dict[str, Sums], computed: dict[str, Tensor], top_k: int, denominator: float) -> dict[str, float]:
    layers = {name: ("mtp" if name.startswith("mtp.") else "") + name.split(".")[1] for name in sums}
    loads, tokens = ({layers[name]: getattr(s, field) for name, s in sums.items()} for field in ("load", "tokens"))
    losses = torch.stack([s.losses for s in sums.values()]).sum(0) / denominator if sums else torch.zeros(2)
    found = balance_metrics(loads, {layers[name]: rows for name, rows in computed.items()}, tokens, top_k)
    return found | {"aux_loss": float(losses[0]), "z_loss": float(losses[1])}


def _joined(gathered: Sequence[dict[str, float]]) -> dict[str, float]:
    """Joins the metrics of all ranks: those of a layer come from whichever pipeline stage has it; losses are summed
    over the pipeline stages, each of which many ranks report."""
    joined: dict[str, float] = {}
    for report in gathered:
        joined |= report
    stages = {tuple(sorted(report)): report for report in gathered if report}  # pipeline stages differ in their layers
    for name in ("aux_loss", "z_loss"):
        joined[name] = sum(report[name] for report in stages.values())
    return joined


def buffer_fragments(parts: Sequence[nn.Module], mesh: Mesh) -> Iterator[Fragment]:
    """Yields what a checkpoint holds beside parameters, from one of the ranks that have it; nothing under adapters,
    where no buffer moves."""
    if mesh.coords["tp"] or dist.get_rank(mesh.groups["grad"]) or parts[0].config.lora is not None:
        return
    for name, value in buffers_of(parts).items():
        yield Fragment(Address(name, tuple(value.shape), None, 0, 1, 0, value.numel()), {"weight": value.flatten()})


@torch.no_grad()
def load_buffers(parts: Sequence[nn.Module], read: FragmentReader) -> None:
    """Fills the buffers on every rank with what `buffer_fragments` gave."""
    if parts[0].config.lora is not None:
        return
    for name, value in buffers_of(parts).items():
        whole = read(Address(name, tuple(value.shape), None, 0, 1, 0, value.numel()))["weight"]
        value.copy_(whole.view_as(value))
