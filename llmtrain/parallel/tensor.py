"""Tensor parallelism: modules of the plain decoder are replaced, by name, with ones that compute on local shards.

With sequence parallelism (arXiv 2205.05198) everything between two sharded regions lives on a slice of the sequence:
a region is entered by a norm that gathers and left by a row-parallel projection that scatters.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from llmtrain.model.decoder import RMSNorm
from llmtrain.parallel.collectives import copy_to, gather_sequence, reduce_from, scatter_sequence

# Canonical module name -> kind. `column` and `vocab` shard rows of the weight, `row` shards its columns.
PLAN = {
    r"embed": "vocab",
    r"layers\.\d+\.(attention|feedforward)_norm": "norm",
    r"layers\.\d+\.attention\.[qkv]": "column",
    r"layers\.\d+\.attention\.o": "row",
    r"layers\.\d+\.feedforward\.(gate|up)": "column",
    r"layers\.\d+\.feedforward\.down": "row",
    r"norm": "norm",
    r"head": "column",
}
TP_DIM = {"vocab": 0, "column": 0, "row": 1, "norm": None}


def kind_of(name: str) -> str | None:
    """The plan's entry for a module name."""
    return next((kind for pattern, kind in PLAN.items() if re.fullmatch(pattern, name)), None)


def tp_dim(parameter: str) -> int | None:
    """The dim along which a parameter is sharded, None if every rank holds it whole. Raises KeyError if unplanned."""
    return TP_DIM[kind_of(parameter.rpartition(".")[0])]


def shard(full: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """This rank's slice of a global tensor. Raises ValueError if it does not divide."""
    if dim is None or size == 1:
        return full
    if full.size(dim) % size:
        raise ValueError(f"a dim of {full.size(dim)} is not divisible by parallel.tp={size}; choose another tp")
    return full.chunk(size, dim)[rank].contiguous()


class EnteringNorm(RMSNorm):
    """Norm in front of sharded matrices: gathers the sequence, or marks the replicated input."""

    group: ProcessGroup
    sequence: bool

    def forward(self, x: Tensor) -> Tensor:
        if not self.sequence:
            return copy_to(super().forward(x), self.group)
        weight = copy_to(self.weight, self.group)  # each rank saw only its slice of the sequence
        return gather_sequence(F.rms_norm(x, (x.size(-1),), weight, self.eps), self.group)


class RowLinear(nn.Linear):
    """A sharded inner dim: the partial products are summed over the group."""

    group: ProcessGroup
    sequence: bool

    def product(self, x: Tensor) -> Tensor:
        """This rank's part of the sum."""
        return F.linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        leave = scatter_sequence if self.sequence else reduce_from
        return leave(self.product(x), self.group)


class VocabEmbedding(nn.Embedding):
    """A sharded vocabulary: a rank contributes zeros for tokens it does not hold."""

    group: ProcessGroup
    sequence: bool
    rank: int

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.size(0)
        local = ids - self.rank * rows
        mine = (local >= 0) & (local < rows)
        x = F.embedding(local.clamp(0, rows - 1), self.weight) * mine[..., None].to(self.weight.dtype)
        return (scatter_sequence if self.sequence else reduce_from)(x, self.group)


CLASSES = {"vocab": VocabEmbedding, "norm": EnteringNorm, "row": RowLinear}


def tensor_parallel(model: nn.Module, group: ProcessGroup | None, sequence: bool) -> None:
    """Cut every parameter along its `tp_dim`, a new attribute, and give the planned modules their parallel forward, in
    place. Meant for parameters without memory: `parallel.plan` fills what is left of them.

    Column-parallel modules need no other class: their input is whole and their output is what the rank owns.
    """
    for name, parameter in model.named_parameters():
        parameter.tp_dim = None if group is None else tp_dim(name)
    if group is None:
        return
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    for parameter in model.parameters():
        parameter.data = shard(parameter.data, parameter.tp_dim, rank, size)
    for name, module in list(model.named_modules()):
        cls = CLASSES.get(kind_of(name))
        if cls is not None:
            module.__class__ = cls
            module.group, module.sequence, module.rank = group, sequence, rank
