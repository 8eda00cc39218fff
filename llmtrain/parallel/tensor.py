"""Implements tensor parallelism: modules of the plain decoder are replaced, by name, with ones that hold local shards.

With sequence parallelism (arXiv 2205.05198) activations between two sharded regions are slices of the sequence: a
region begins with a norm that gathers and ends with a row-parallel projection that scatters. A parameter that every
rank holds whole but applies to only a part of the sequence, or of the heads, has its gradient summed over the group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from llmtrain.arch.parameters import kind_of, tp_dim
from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import Attention
from llmtrain.model.heads import ScalarHead
from llmtrain.model.linear import Linear
from llmtrain.model.lora import Adapter
from llmtrain.model.mtp import Joint
from llmtrain.model.norm import Norm
from llmtrain.parallel.collectives import copy_to, gather_sequence, reduce_from, scatter_sequence


def shard(full: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """Returns this rank's slice of a global tensor. Raises ValueError if it does not divide."""
    if dim is None or size == 1:
        return full
    if full.size(dim) % size:
        raise ValueError(f"a dim of {full.size(dim)} is not divisible by parallel.tp={size}; choose another tp")
    return full.chunk(size, dim)[rank].contiguous()


def summed(parameter: Tensor | None, group: ProcessGroup) -> Tensor | None:
    """Returns the parameter; its gradient is summed over the group."""
    return None if parameter is None else copy_to(parameter, group)


class InnerNorm(Norm):
    """Normalises the residual stream, or a sublayer's output; a rank has its slice of the sequence, or all of it."""

    group: ProcessGroup
    sequence: bool

    def forward(self, x: Tensor) -> Tensor:
        if not self.sequence:
            return super().forward(x)
        return self.apply_with(x, summed(self.weight, self.group), summed(self.bias, self.group))


class EnteringNorm(InnerNorm):
    """Normalises in front of sharded matrices: gathers the sequence, or marks the input as replicated."""

    def forward(self, x: Tensor) -> Tensor:
        enter = gather_sequence if self.sequence else copy_to
        return enter(super().forward(x), self.group)


class ReplicaNorm(Norm):
    """Normalises with a replicated weight within a sharded region (of heads, of a latent)."""

    group: ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_with(x, summed(self.weight, self.group), summed(self.bias, self.group))


class ReplicaLinear(Linear):
    """Projects with a replicated weight within a sharded region."""

    group: ProcessGroup

    def weighted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else copy_to(bias, self.group)
        return F.linear(x, copy_to(self.weight, self.group), bias)


class SharedAdapter(Adapter):
    """Computes the adapter of a projection within a sharded region: B is sharded as the weight's rows are, A as its
    columns.

    The matrix that is not sharded has a partial gradient on each rank, from some heads or a part of the sum, to be
    summed.
    """

    group: ProcessGroup
    whole: tuple[bool, bool]  # A, B

    def forward(self, x: Tensor) -> Tensor:
        a, b = (copy_to(p, self.group) if whole else p for p, whole in zip((self.a, self.b), self.whole, strict=True))
        return self.apply_with(x, a, b)


class RowLinear(Linear):
    """Projects with a sharded inner dim: the partial products are summed over the group, then the whole bias is
    added."""

    group: ProcessGroup
    sequence: bool

    def forward(self, x: Tensor) -> Tensor:
        leave = scatter_sequence if self.sequence else reduce_from
        y = leave(self.product(x), self.group)
        if self.bias is None:
            return y
        return y + (copy_to(self.bias, self.group) if self.sequence else self.bias)


class JointRow(RowLinear):
    """Projects several inputs, concatenated and whole on each rank, row-parallel: a rank takes its columns."""

    rank: int

    def forward(self, *parts: Tensor) -> Tensor:
        return super().forward(torch.cat(parts, -1).chunk(self.group.size(), -1)[self.rank])


class SharedScalarHead(ScalarHead):
    """Maps whole hidden states to scalars, with its columns divided over the group: a rank multiplies its part of them.
    The gradient of that part is completed by the norm in front, as for every sharded matrix; a head that is whole on
    each rank would have it added up `tp` times."""

    group: ProcessGroup
    sequence: bool
    rank: int

    def product(self, hidden: Tensor) -> Tensor:
        own = hidden.chunk(self.group.size(), -1)[self.rank]
        return reduce_from(super().product(own), self.group)


class VocabEmbedding(nn.Embedding):
    """Embeds with a sharded vocabulary: a rank contributes zeros for tokens it does not hold."""

    group: ProcessGroup
    sequence: bool
    rank: int

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.size(0)
        local = ids - self.rank * rows
        mine = (local >= 0) & (local < rows)
        x = F.embedding(local.clamp(0, rows - 1), self.weight) * mine[..., None].to(self.weight.dtype)
        return (scatter_sequence if self.sequence else reduce_from)(x, self.group)


class PositionEmbedding(nn.Embedding):
    """Embeds learned positions, replicated, for the slice of the sequence that the rank has."""

    group: ProcessGroup
    sequence: bool
    rank: int

    def forward(self, positions: Tensor) -> Tensor:
        if not self.sequence:
            return super().forward(positions)
        own = positions.chunk(self.group.size(), 1)[self.rank]
        return F.embedding(own, copy_to(self.weight, self.group))


CLASSES: dict[tuple[str | None, type[nn.Module]], type[nn.Module]] = {
    ("vocab", nn.Embedding): VocabEmbedding,
    ("position", nn.Embedding): PositionEmbedding,
    ("norm", Norm): EnteringNorm,
    ("inner", Norm): InnerNorm,
    ("replica", Norm): ReplicaNorm,
    ("replica", Linear): ReplicaLinear,
    ("row", Linear): RowLinear,
    ("row", Joint): JointRow,
    ("column", ScalarHead): SharedScalarHead,
}
"""Each (kind in the plan, plain class) has its parallel form. Column-parallel projections need none: their input is
whole and their output is the rank's own part."""


def tensor_parallel(model: nn.Module, group: ProcessGroup | None, sequence: bool) -> None:
    """Shards every parameter along its `tp_dim` and gives the planned modules their parallel forward, in place.

    What is divided stands in `Parameter.placement`. Experts are left to `parallel.expert`. Meant for parameters on the
    meta device: `parallel.plan` fills what is left.
    """
    rank, size = (0, 1) if group is None else (torch.distributed.get_rank(group), group.size())
    for name, parameter in model.named_parameters():
        whole = group is None or kind_of(name.rpartition(".")[0]) == "expert"
        parameter.placement.tp_dim = None if whole else tp_dim(name, model.config, size)
        parameter.placement.cut = (rank, size)
        parameter.data = shard(parameter.data, parameter.placement.tp_dim, rank, size)
    if group is None:
        return
    for name, module in list(model.named_modules()):
        cls = CLASSES.get((kind_of(name), type(module)))
        if cls is not None:
            module.__class__ = cls
            module.group, module.sequence, module.rank = group, sequence, rank
        if isinstance(module, Adapter):
            module.__class__, module.group = SharedAdapter, group
            module.whole = module.a.placement.tp_dim is None, module.b.placement.tp_dim is None
        if isinstance(module, Attention) and model.config.num_kv_heads % size:
            share_kv_heads(module, model.config, group, rank)


def share_kv_heads(module: Attention, config: ModelConfig, group: ProcessGroup, rank: int) -> None:
    """Makes every rank project to all K/V heads, when there are fewer than ranks, and use the one its query heads
    share."""
    size = group.size()
    assert size % config.num_kv_heads == 0, "a rule of the configuration"
    head = rank * config.num_kv_heads // size
    module.kv_heads = slice(head, head + 1)
    for projection in (module.k, module.v):
        projection.__class__ = ReplicaLinear
        projection.group = group
