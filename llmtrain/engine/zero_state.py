"""Reads and fills what a rank owns under DeepSpeed 0.19.8, without gathering.

DeepSpeed offers no public way to this for ZeRO stages 1 and 2, so private names are used here and nowhere else;
tests/recipes/pretrain_test.py (resume, bit for bit) is their guard.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.engine.base import FragmentReader
from llmtrain.engine.clip import owns
from llmtrain.engine.optim import initial_state, state_keys
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.plan import trained_of
from llmtrain.types import Address, Fragment

FLAT_BUFFERS = (  # of weights and masters; ZeRO stages 1 and 2, ZeRO stage 3
    *("bit16_groups_flat", "single_partition_of_fp32_groups"),
    *("fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat"),
)


def gradients_finite(engine: object) -> bool:
    """Tells whether this rank's reduced gradients are finite, before the update."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    else:
        grads = [g for group in optimizer.averaged_gradients.values() if group is not None for g in group]
        grads += [flat.grad for flat in _flats(optimizer) if flat.grad is not None]  # offload keeps them here
    # a norm reads them once, where `isfinite` makes five passes; in fp32, for that of fp16 gradients may overflow
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32).to(engine.device) for g in grads]
    return not norms or bool(torch.stack(norms).isfinite().all())


def count_experts(engine: object, mesh: Mesh) -> None:
    """Makes DeepSpeed's norm of gradients right where experts lie on different data-parallel ranks. DeepSpeed sums it
    over the model group, at ZeRO stages 1 and 2 once for each group of parameters, which pipeline stages need not have
    in common (the first ones may have no experts); at ZeRO stage 3 it leaves that group out for experts. All ranks
    together hold every piece once, so one sum over them is right."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer._grad_norm_counts_every_rank = lambda *args: False
    elif engine.zero_optimization_stage():
        optimizer.scaled_global_norm = lambda norm_type=2: _norm_over_all(optimizer, mesh)


def _norm_over_all(optimizer: object, mesh: Mesh) -> Tensor:
    """Returns the norm over all ranks, -1 where it is not finite, as DeepSpeed has it. Offloading keeps norms of
    parameters, not gradients."""
    total = torch.zeros((), device=mesh.device)
    for group, params in enumerate(optimizer.params_in_partition):
        if optimizer.cpu_offload:
            norms = optimizer.norm_for_param_grads
            kept = [(p, norms.get(optimizer.get_param_id(p))) for p in params]
            squares = [torch.as_tensor(norm).float().square() for p, norm in kept if norm is not None and _counts(p)]
        else:
            pairs = zip(optimizer.averaged_gradients[group], params, strict=False)  # behind them lies padding
            squares = [torch.linalg.vector_norm(g, dtype=torch.float32).square() for g, p in pairs if _counts(p)]
        total += sum(square.to(mesh.device) for square in squares)
    dist.all_reduce(total)
    norm = total.sqrt()
    return norm if norm.isfinite() else torch.full_like(norm, -1.0)


def _counts(p: nn.Parameter) -> bool:
    return p.tensor_model_parallel


def take_gradients_as_they_are(engine: object) -> None:
    """Skips the two copies through DeepSpeed's buckets: with one data-parallel rank there is nothing to sum."""
    engine.optimizer.reduce_ready_partitions_and_remove_grads = lambda param, group: None


def masters_are_weights(engine: object) -> None:
    """Lets the masters of ZeRO stages 1 and 2 share memory with the weights: in fp32 they are a second copy of this
    rank's part of them, and one will do."""
    optimizer = engine.optimizer
    partitions, groups = optimizer.parallel_partitioned_bit16_groups, optimizer.real_dp_process_group
    for master, parts, group in zip(optimizer.single_partition_of_fp32_groups, partitions, groups, strict=True):
        master.data = parts[dist.get_rank(group)]
    optimizer._link_all_hp_params()  # what parameters know of their masters


def drop_gradients(engine: object) -> None:
    """Forgets the reduced gradients as if the backward had not been: what DeepSpeed does when fp16 overflows."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        engine.zero_grad()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO stage 3
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(optimizer.loss_scale)
    else:
        optimizer.micro_step_id = -1  # its INITIAL_MICRO_STEP_ID; this file imports no deepspeed
        optimizer._offload_accumulated_param_ids = set()
        optimizer.zero_grad(set_to_none=True)
        optimizer.reset_cpu_buffers()
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        optimizer.all_grad_tensors = dict.fromkeys(optimizer.all_grad_tensors)


@torch.no_grad()
def set_masters(engine: object, originals: dict[nn.Parameter, Tensor]) -> None:
    """Gives the fp32 masters their unrounded start: DeepSpeed makes them from the bf16 weights. `originals`: whole
    parameters, at ZeRO stage 3 this rank's pieces."""
    for p, original in originals.items():
        piece = original if hasattr(p, "ds_id") else own_piece(p, original)
        if piece.numel():
            _write(engine, p, piece, "weight")


def own_piece(p: nn.Parameter, whole: Tensor) -> Tensor:
    """Returns a flat copy of what this rank owns of the local parameter."""
    start, numel = _range(p)
    return whole.flatten()[start : start + numel].clone()


@torch.no_grad()
def fragments(engine: object, mesh: Mesh) -> Iterator[Fragment]:
    """Yields the pieces that this rank writes to a checkpoint: over all ranks every element once."""
    _make_state(engine, 0)
    _link(engine)
    for p, address in _pieces(engine, mesh):
        copies = mesh.groups["expert_grad" if p.placement.expert else "grad"]
        if owns(p, mesh.coords["tp"]) and (engine.zero_optimization_stage() or dist.get_rank(copies) == 0):
            yield Fragment(address, {key: _read(engine, p, address, key) for key in ("weight", *state_keys(p))})


@torch.no_grad()
def load(engine: object, mesh: Mesh, read: FragmentReader, step: int) -> None:
    """Fills master weights and optimizer state, then the working weights from them."""
    for state in _make_state(engine, step):
        if "step" in state:  # Muon counts none
            state["step"].fill_(step)  # an engine that has stepped already
    _link(engine)
    for p, address in _pieces(engine, mesh):
        for key, value in read(address).items():
            _write(engine, p, value.to(mesh.device), key)
    _refresh_working_weights(engine.optimizer)
    engine.global_steps = step


def held(engine: object) -> Iterator[Tensor]:
    """Yields what an engine holds between two steps beside its modules' parameters: shards and flat buffers of weights,
    masters, optimizer state, and the buffer of gradients of ZeRO stage 3."""
    optimizer = engine.optimizer
    yield from (p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor"))
    for name in FLAT_BUFFERS:
        yield from getattr(optimizer, name, ())
    inner = getattr(optimizer, "optimizer", optimizer)
    yield from (tensor for state in inner.state.values() for tensor in state.values() if tensor.dim())
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        yield optimizer.grad_partitions_flat_buffer


def scratch(engine: object) -> list[Tensor]:
    """Returns the buckets in which ZeRO stage 3 reduces gradients, empty between two steps. (Stages 1 and 2 free
    theirs.)"""
    buckets = getattr(engine.optimizer, "ipg_buckets", {})
    return [bucket.buffer for bucket in buckets.values() if isinstance(bucket.buffer, Tensor)]


def _make_state(engine: object, step: int) -> list[dict[str, Tensor]]:
    """Returns the state of each tensor that the optimizer updates. An optimizer makes its state at the first update;
    before that it is made here, as after `step` updates."""
    if engine.zero_optimization_stage():
        inner, tensors = engine.optimizer.optimizer, _flats(engine.optimizer)
        state = inner.state
        for group in inner.param_groups:
            for flat in group["params"]:
                flat.muon = "momentum" in group
    else:
        state, tensors = engine.optimizer.state, trained_of([engine.module])
    for t in tensors:
        if not state.get(t):
            state[t] = initial_state(t, step)
    return [state[t] for t in tensors]


def _refresh_working_weights(optimizer: object) -> None:
    if hasattr(optimizer, "update_lp_params"):  # ZeRO stages 1, 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "persistent_parameters"):  # ZeRO stage 3
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if kept := optimizer.persistent_parameters:
            kept[0].partition(kept)
            kept[0].all_gather(kept)


def _link(engine: object) -> None:
    """Links the optimizer state of all parameter groups: ZeRO stages 1 and 2 link only the first group's by
    themselves."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _flats(optimizer: object) -> list[Tensor]:
    """Returns the flat fp32 tensors that the inner optimizer updates: those of ZeRO stage 3, or of stages 1 and 2."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))


def _pieces(engine: object, mesh: Mesh) -> Iterator[tuple[nn.Parameter, Address]]:
    """Yields every non-empty piece of a trained parameter whose state lies on this rank."""
    for p in trained_of([engine.module]):
        start, numel = _range(p)
        if numel > 0:
            yield p, p.placement.address(start, numel)


def _range(p: nn.Parameter) -> tuple[int, int]:
    """Returns (start, numel) of what this rank owns in the flattened local parameter."""
    if hasattr(p, "ds_id"):
        width = p.ds_tensor.ds_numel
        start = dist.get_rank(p.ds_process_group) * width
        return start, min(width, p.ds_numel - start)
    if not hasattr(p, "_hp_mapping"):
        return 0, p.numel()
    if p._hp_mapping is None:
        return 0, 0
    address = p._hp_mapping.lp_fragment_address
    return address.start, address.numel


def _read(engine: object, p: nn.Parameter, address: Address, key: str) -> Tensor:
    if hasattr(p, "ds_id"):
        stage3 = p._z3_optimizer
        whole = stage3.get_local_fp32_param(p) if key == "weight" else stage3.get_local_fp32_param(p, key)
        whole = whole.clone() if stage3.swap_optimizer else whole  # a buffer that the next read fills anew
        return whole[: address.numel]
    if hasattr(p, "_hp_mapping"):
        return p._hp_mapping.get_hp_fragment(None if key == "weight" else key)
    return (p.detach() if key == "weight" else engine.optimizer.state[p][key]).flatten()


def _write(engine: object, p: nn.Parameter, value: Tensor, key: str) -> None:
    if hasattr(p, "ds_id"):
        padded = F.pad(value, (0, p.ds_tensor.ds_numel - value.numel()))
        p._z3_optimizer.set_local_hp_param(padded, p, *([] if key == "weight" else [key]))
    elif hasattr(p, "_hp_mapping"):
        p._hp_mapping.get_hp_fragment(None if key == "weight" else key).copy_(value)
    else:
        target = p if key == "weight" else engine.optimizer.state[p][key]
        target.copy_(value.view_as(target))
