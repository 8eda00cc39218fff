"""Implements Muon: a matrix moves by its averaged gradient, orthogonalised (kellerjordan.github.io/posts/muon), at
AdamW's scale (arXiv 2502.16982)."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from llmtrain.config.schema import OptimConfig
from llmtrain.parallel.collectives import all_gather
from llmtrain.parallel.mesh import Mesh

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of x, x^3, x^5: steepest at 0, singular values end between 0.7 and 1.2
ITERATIONS = 5
STACK_NUMEL = 2**24  # matrices smaller than this are orthogonalised together, up to so many elements a rank

Axis = tuple[ProcessGroup, int | None]
"""Holds the ranks that share a matrix, and the dim along which it is cut over them; None: each holds what the others
hold."""


class Muon(Optimizer):
    """Updates the matrices in `groups` with Muon and what `adamw` was given with AdamW; `param_groups` and `state` hold
    both.

    Momentum is Nesterov's, weight decay decoupled. The factor 0.2 sqrt(max(rows, cols)) gives an update the RMS that
    AdamW's usually has, so that one lr and one weight decay serve both. The state of a matrix is `momentum`, of its
    shape.
    """

    def __init__(self, groups: list[dict], adamw: AdamW, config: OptimConfig, mesh: Mesh | None) -> None:
        """Takes groups of parameters with a `placement`, each a matrix or the matrices [experts, rows, columns] of
        experts. They are plain tensors, equal over data-parallel ranks, or DTensors sharded over them on dim 0; or
        DeepSpeed puts a flat tensor into each group later, see `_update_packed`. A mesh of None: one process."""
        defaults = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.muon_momentum}
        super().__init__([{**group, "number": number} for number, group in enumerate(groups)], defaults)
        self.adamw, self.mesh = adamw, mesh
        self.matrices = [list(group["params"]) for group in groups]  # by the number of the group
        self.param_groups += adamw.param_groups
        self.state = adamw.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Makes one update of all parameters; a collective over the ranks that share them."""
        self.adamw.step()
        for group in self.param_groups:
            if "momentum" in group:
                matrices = self.matrices[group["number"]]
                packed = group["params"][0] is not matrices[0]
                self._update_packed(group, matrices) if packed else self._update(group)

    def _update(self, group: dict) -> None:
        taken = [p for p in group["params"] if p.grad is not None]
        for p in filter(_of_experts, taken):
            direction, weight = self._direction(p, group["momentum"]), _local(p)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_(self._orthogonal(direction, p), alpha=_scale(p) * group["lr"])
        for batch in self._batches(p for p in taken if not _of_experts(p)):
            stack = torch.stack([_padded(self._direction(p, group["momentum"]), p) for p in batch])
            for p, update in zip(batch, orthogonalize(stack, _axes(batch[0], self.mesh)), strict=True):
                weight = _local(p)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update[: len(weight)], alpha=_scale(p) * group["lr"])

    def _update_packed(self, group: dict, matrices: list[nn.Parameter]) -> None:
        """Updates at ZeRO stages 1 and 2, where DeepSpeed has put this rank's piece of all matrices, one after the
        other, in place of them. The pieces of the ranks are gathered, and while the update lasts every rank holds what
        the others hold."""
        (flat,), ranks = group["params"], self.mesh.groups[_copies(matrices[0])]
        directions = all_gather(self._direction(flat, group["momentum"]), 0, ranks)
        starts = itertools.accumulate((p.numel() for p in matrices), initial=0)
        place = {p: slice(start, start + p.numel()) for p, start in zip(matrices, starts, strict=False)}
        for p in filter(_of_experts, matrices):
            update = self._orthogonal(directions[place[p]].view(p.shape), p)
            directions[place[p]] = _scale(p) * update.flatten()
        for batch in self._batches(p for p in matrices if not _of_experts(p)):
            stack = torch.stack([directions[place[p]].view(p.shape) for p in batch])
            for p, update in zip(batch, orthogonalize(stack, _axes(batch[0], self.mesh)), strict=True):
                directions[place[p]] = _scale(p) * update.flatten()
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        flat.sub_(directions.chunk(dist.get_world_size(ranks))[dist.get_rank(ranks)], alpha=group["lr"])

    def _orthogonal(self, experts: Tensor, p: nn.Parameter) -> Tensor:
        """Returns [experts, rows, columns] of a parameter, each orthogonalised, as many at once as `_batches` takes."""
        axes = _axes(p, self.mesh)
        ranks = math.prod(dist.get_world_size(group) for group, _ in axes)
        size = ranks * max(1, STACK_NUMEL // math.prod(p.shape[1:]))
        parts = [orthogonalize(part, axes) for part in experts.split(size)] if len(experts) else [experts]
        return torch.cat(parts)

    def _batches(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Yields matrices that are cut alike, as many as keep every rank busy without holding more than a few of them
        whole."""
        alike = defaultdict(list)
        for p in parameters:
            alike[p.placement.global_shape, p.placement.tp_dim].append(p)
        for (shape, _), members in alike.items():
            ranks = math.prod(dist.get_world_size(group) for group, _ in _axes(members[0], self.mesh))
            size = ranks * max(1, STACK_NUMEL // math.prod(shape))
            yield from (members[i : i + size] for i in range(0, len(members), size))

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        """Returns this rank's piece of the averaged gradient."""
        if "momentum" not in self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p)
        grad, average = _local(p.grad), _local(self.state[p]["momentum"])
        average.lerp_(grad, 1 - momentum)
        return grad.lerp(average, momentum).to(_dtype(p.device))


def orthogonalize(stack: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Maps [k, a, b], this rank's pieces of k matrices, to its pieces of the orthogonalised ones.

    Every axis gives each of its ranks a share of the matrices, whole along one more dim, so that each matrix is
    orthogonalised once; then everything goes back.
    """
    if not axes:
        return newton_schulz(stack)
    (group, dim), *inner = axes
    size = dist.get_world_size(group)
    padded = F.pad(stack, (0, 0, 0, 0, 0, -len(stack) % size))
    if dim is None:
        share = padded.chunk(size)[dist.get_rank(group)]
        return all_gather(orthogonalize(share, inner), 0, group)[: len(stack)]
    share = _exchange(padded, 0, dim + 1, group)
    return _exchange(orthogonalize(share, inner), dim + 1, 0, group)[: len(stack)]


def newton_schulz(x: Tensor) -> Tensor:
    """Moves each matrix of [k, rows, cols] towards the nearest orthogonal one: U V^T of its singular value
    decomposition, up to singular values of 0.7 to 1.2, by a quintic Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    wide = x.size(1) <= x.size(2)
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _dtype(device: torch.device) -> torch.dtype:
    """Returns bf16 on a GPU, which multiplies it many times faster and whose rounding the iteration tolerates; a CPU
    gains little, and fp32 lets the tests compare layouts there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _axes(p: nn.Parameter, mesh: Mesh | None) -> list[Axis]:
    """Returns who shares a matrix, in any order: permuted rows orthogonalise to permuted rows, and go back where they
    were."""
    if mesh is None:
        return []
    if isinstance(p, DTensor):
        placed = zip(p.device_mesh.get_all_groups(), p.placements, strict=True)
        axes = [(group, placement.dim if placement.is_shard() else None) for group, placement in placed]
    else:
        axes = [(mesh.groups[_copies(p)], None)]
    if _of_experts(p):  # cut between experts alone, over data-parallel and tensor-parallel ranks
        axes = [(group, dim) for group, dim in axes if dim is None]
    else:
        axes.append((mesh.groups["tp"], p.placement.tp_dim))
    return [axis for axis in axes if dist.get_world_size(axis[0]) > 1]


def _copies(p: nn.Parameter) -> str:
    """Names the group whose ranks hold the same piece of a plain parameter."""
    return "expert_grad" if p.placement.expert else "grad"


def _of_experts(p: nn.Parameter) -> bool:
    return len(p.placement.global_shape) == 3


def _scale(p: nn.Parameter) -> float:
    """Returns the factor that gives an update the RMS that AdamW's usually has, see `Muon`."""
    return 0.2 * math.sqrt(max(p.placement.global_shape[-2:]))


def _padded(piece: Tensor, p: nn.Parameter) -> Tensor:
    """Returns the piece with zero rows up to the largest piece: they stay zero."""
    return F.pad(piece, (0, 0, 0, _largest_piece(p) - len(piece)))


def _largest_piece(p: nn.Parameter) -> int:
    """Returns the rows of the first piece of a DTensor, which no other exceeds; of a plain tensor its own."""
    if not isinstance(p, DTensor):
        return len(p)
    ranks = math.prod(p.device_mesh.size(i) for i, placement in enumerate(p.placements) if placement.is_shard())
    return -(-len(p) // ranks)


def _exchange(x: Tensor, cut: int, join: int, group: ProcessGroup) -> Tensor:
    """Exchanges all-to-all: rank r gets the r-th part along `cut` of every rank's tensor, joined along `join`."""
    sent = torch.stack(x.chunk(dist.get_world_size(group), cut))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), join)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
