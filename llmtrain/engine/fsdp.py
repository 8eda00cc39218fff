"""Implements the engine on PyTorch FSDP2 (`fully_shard`; arXiv 2304.11277), also as HSDP: sharded over `shard`, copied
over `dp_replicate`.

FSDP2 holds fp32 shards, gathers whole weights in the compute precision block by block, and sums gradients in fp32.
Tensor-parallel shards are plain tensors to it: it never sees the tp axis. The microbatch loop, the pipeline schedule,
denominators, clipping, the loss scale and checkpoints are ours; tests/parity holds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from llmtrain.arch.pipeline import plan_stages
from llmtrain.config.schema import EngineConfig, OptimConfig, ParallelConfig
from llmtrain.engine.auxiliary import buffer_fragments, finish_auxiliary, load_buffers, start_auxiliary
from llmtrain.engine.base import Admit, FragmentReader, LossFn
from llmtrain.engine.clip import clip_gradients, local, owns
from llmtrain.engine.memory import keep_freed_memory
from llmtrain.engine.movable import Movable
from llmtrain.engine.optim import build_optimizer, initial_state, learning_rate, set_learning_rate, state_keys
from llmtrain.engine.precision import LossScaler, compute_dtype
from llmtrain.engine.step import admitted, backward, full_weights, sum_tied_gradients
from llmtrain.engine.tally import Tally, stop_if_not_finite
from llmtrain.model.decoder import Decoder
from llmtrain.model.experts import Experts
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import Pipeline
from llmtrain.parallel.placement import copy_placement
from llmtrain.parallel.plan import (
    compile_blocks,
    fill_buffers,
    parameters_of,
    slice_of,
    trained_of,
)
from llmtrain.parallel.scoring import score
from llmtrain.types import Address, Batch, Fragment, Scores, StepStats, WeightSource


def shard_part(part: Decoder, mesh: Mesh, config: EngineConfig) -> None:
    """Shards every block and, as the root, what is left (embedding, norm, head), in place. The meta parameters become
    fp32 DTensors, still to be filled, with the placements of the plain ones."""
    plain = dict(part.named_parameters())
    dtype = None if config.precision == "fp32" else compute_dtype(config.precision)
    settings = {
        "mesh": mesh.fsdp_mesh(),
        # Inputs stay as they are: positions, temperatures and masks are not to be rounded.
        "mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": offload_policy(config, mesh.device),
    }
    if mesh.ep > 1:  # only ranks with the same experts share them, multi-token modules' among them
        own = settings | {"mesh": mesh.fsdp_mesh(experts=True)}
        for experts in [m for m in part.modules() if isinstance(m, Experts)]:
            fully_shard(experts, reshard_after_forward=config.reshard, **own)
    for block in part.layers.values():
        fully_shard(block, reshard_after_forward=config.reshard, **settings)
    fully_shard(part, **settings)  # the root's weights serve both ends of a forward: kept for its backward
    for module in fsdp_modules(part):
        module.set_gradient_divide_factor(1.0)  # the loss has the global denominator
        module.set_force_sum_reduction_for_comms(True)  # else that factor becomes an operation that gloo lacks
    part.to_empty(device="cpu" if config.offload == "params" else mesh.device)
    for name, p in part.named_parameters():
        copy_placement(plain[name], p)


def fsdp_modules(part: nn.Module) -> Iterator[FSDPModule]:
    """Returns the root and the blocks; most of FSDP2's settings hold for one of them."""
    return (module for module in part.modules() if isinstance(module, FSDPModule))


def offload_policy(config: EngineConfig, device: torch.device) -> OffloadPolicy:
    """Returns where shards, their gradients and optimizer state lie: on the CPU, or all on the device."""
    return CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.offload == "params" else OffloadPolicy()


def mark_copies(parts: Sequence[Decoder], mesh: Mesh) -> None:
    """Marks the head of a tied model as a copy where one rank has the first and the last pipeline stage: each shards
    for itself what they had in common."""
    if len(parts) > 1 and parts[0].config.tie_embeddings and mesh.has_embedding and mesh.has_head:
        parts[-1].head.weight.placement.is_copy = True


@torch.no_grad()
def fill_shards(parts: Sequence[Decoder], mesh: Mesh, source: WeightSource) -> None:
    """Fills this rank's shards, one global tensor at a time."""
    for p in parameters_of(parts):
        address, whole = shard_address(p, mesh), slice_of(p, source).flatten()
        _flat(p).copy_(whole[address.start : address.start + address.numel])


def shard_address(p: nn.Parameter, mesh: Mesh) -> Address:
    """Returns where this rank's shard lies. FSDP2 gives every rank as many rows as the first one, until there are none
    left."""
    group, rows = mesh.groups["expert_shard" if p.placement.expert else "shard"], p.size(0)
    first = min(rows, dist.get_rank(group) * -(-rows // dist.get_world_size(group)))
    start, numel = first * (p.numel() // rows), p.to_local().numel()
    return p.placement.address(start, numel)


def reshard(parts: Sequence[Decoder]) -> None:
    """Frees the whole weights that a forward without a backward leaves."""
    for module in (module for part in parts for module in fsdp_modules(part)):
        module.reshard()


class FsdpEngine(Movable):
    """Implements engine.base.Engine. `parts` are this rank's pipeline stages, from parallel.plan.parallelize."""

    def __init__(
        self,
        parts: list[Decoder],
        source: WeightSource,
        mesh: Mesh,
        parallel: ParallelConfig,
        config: EngineConfig,
        optim: OptimConfig,
        total_steps: int,
    ) -> None:
        self.parts, self.mesh, self.config, self.optim, self.total_steps = parts, mesh, config, optim, total_steps
        self.device = mesh.device
        self.plan, self.step = plan_stages(parts[0].config, parallel), 0
        self.admit: Admit = stop_if_not_finite
        self.scaler = LossScaler(config)
        for part in parts:
            shard_part(part, mesh, config)
        mark_copies(parts, mesh)
        self.parameters = parameters_of(parts)  # the sharded ones; during a step the modules hold whole ones
        self.trained = trained_of(parts)
        fill_shards(parts, mesh, source)
        fill_buffers(parts, mesh, source)
        if mesh.device.type == "cpu":
            keep_freed_memory()
        self.optimizer = build_optimizer(nn.ModuleList(parts), optim, mesh)
        if config.compile:
            compile_blocks(parts)
        self.pipeline = Pipeline(parts, self.plan, mesh) if mesh.sizes["pp"] > 1 else None

    def train_step(
        self, microbatches: Sequence[Batch], loss: LossFn, denominator: Tensor, position: int | None = None
    ) -> StepStats:
        """See Engine."""
        self.require_here()
        lr = learning_rate(self.step if position is None else position, self.optim, self.total_steps)
        set_learning_rate(self.optimizer.param_groups, lr)
        tally = Tally(float(denominator))
        start_auxiliary(self.parts, self.scaler.scale / tally.denominator)
        self._backward(microbatches, loss, tally)
        norm, finite = clip_gradients(self.trained, self.optim.grad_clip, self.mesh, self.mesh.groups["replica"])
        broken = tally.reduce(self.mesh, gradient_finite=finite)
        taken = admitted(self.scaler, tally, broken, self.admit)
        if taken:
            self.optimizer.step()
            self.step += 1
        tally.metrics |= finish_auxiliary(self.parts, self.mesh, tally.denominator, taken)
        self.optimizer.zero_grad()
        return StepStats(tally.loss, norm if taken else math.nan, lr, tally.metrics)

    def score(self, microbatches: Sequence[Batch]) -> list[Scores]:
        """See Engine."""
        self.require_here()
        scores = score(self.parts, self.pipeline, self.mesh, microbatches)
        reshard(self.parts)
        return scores

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine. Every rank must exhaust it."""
        self.require_here()
        return full_weights(self.parts, self.plan, self.mesh, compute_dtype(self.config.precision), self._gather)

    def fragments(self) -> Iterator[Fragment]:
        """See Engine."""
        self.require_here()
        if self.mesh.coords["dp_replicate"] > 0:
            return
        for p in self.trained:
            address = shard_address(p, self.mesh)
            if address.numel and owns(p, self.mesh.coords["tp"]):
                state = self.optimizer.state.get(p) or initial_state(p, 0)
                yield Fragment(address, {"weight": _flat(p), **{key: _flat(state[key]) for key in state_keys(p)}})
        yield from buffer_fragments(self.parts, self.mesh)

    @torch.no_grad()
    def load_fragments(self, read: FragmentReader, step: int) -> None:
        """See Engine."""
        self.require_here()
        for p in self.trained:
            self.optimizer.state[p] = initial_state(p, step)
            held = {"weight": p, **self.optimizer.state[p]}
            for key, value in read(shard_address(p, self.mesh)).items():
                _flat(held[key]).copy_(value)
        load_buffers(self.parts, read)
        self.step = step

    def replicas(self) -> Iterator[tuple[str, str, Tensor]]:
        """See Engine."""
        self.require_here()
        for p in self.parameters:
            yield "dp_replicate", p.placement.name, _flat(p)
            if p.placement.tp_dim is None:
                yield "tp", p.placement.name, _flat(p)

    def extra_state(self) -> dict[str, float]:
        """See Engine."""
        return self.scaler.state()

    def load_extra_state(self, state: dict[str, float]) -> None:
        """See Engine."""
        self.scaler.load(state)

    def held(self) -> Iterator[Tensor]:
        """See Movable."""
        yield from self.parameters
        for p in self.parameters:
            yield from (tensor for tensor in self.optimizer.state.get(p, {}).values() if tensor.dim())

    def _backward(self, microbatches: Sequence[Batch], loss: LossFn, tally: Tally) -> None:
        """Leaves the gradients in `grad` of the sharded parameters, summed over microbatches and ranks."""
        factor = self.scaler.scale / tally.denominator

        def scaled(scores: Scores, batch: Batch, i: int) -> Tensor:
            self._reduce_gradients(last=i == len(microbatches) - 1)
            return tally.add(i, *loss(scores, batch)) * factor

        backward(self.parts, self.pipeline, self.mesh, microbatches, scaled)
        sum_tied_gradients(self.parts, self.mesh, lambda p: local(p.grad))
        if self.scaler.scale != 1:
            torch._foreach_mul_([local(p.grad) for p in self.trained], 1 / self.scaler.scale)

    def _reduce_gradients(self, last: bool) -> None:
        """Sets whether the coming backward ends in the reduction over ranks. A pipeline schedule sees to that by
        itself."""
        if self.pipeline is None:
            self.parts[0].set_requires_gradient_sync(last)
            self.parts[0].set_reshard_after_backward(last or self.config.reshard)

    def _gather(self, p: nn.Parameter) -> Tensor:
        return p.detach().to(self.mesh.device, compute_dtype(self.config.precision)).full_tensor()


def _flat(x: Tensor) -> Tensor:
    return local(x.detach()).flatten()
