"""Builds optimizers and computes learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrain.arch.parameters import is_block_matrix
from llmtrain.config.schema import OptimConfig
from llmtrain.engine.muon import Muon
from llmtrain.parallel.mesh import Mesh


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Returns the learning rate of the update that follows `step` finished ones, `total_steps` in all.

    The first `warmup_steps` updates rise linearly from lr / warmup_steps to lr. Of those that follow, the first has
    exactly lr and the last exactly min_lr (a single one: lr); `constant` stays at lr. `wsd` (warmup, stable, decay;
    arXiv 2404.06395) leaves lr with the last `wsd_decay_share` of all updates. Beyond the last update: min_lr.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    last, start = total_steps - 1, config.warmup_steps  # `start`: the last update at lr
    if config.schedule == "wsd":
        start = max(start, last - max(1, round(config.wsd_decay_share * total_steps)))
    done = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * left + config.min_lr * (1 - left)


def build_optimizer(
    model: nn.Module, config: OptimConfig, mesh: Mesh | None = None, experts: str | None = None
) -> Optimizer:
    """Returns AdamW (arXiv 1711.05101), fused, over what is trained of `model`; with `name: muon` Muon for the matrices
    of blocks, those of each expert among them, and AdamW for the rest. Weight decay is on matrices, embeddings among
    them, not on norms and biases.

    Call it when the parameters have the form in which they are updated, plain tensors or FSDP2's DTensors, and the
    `placement` that `parallel.placement.place` sets. A mesh of None: one process. Engines call `set_learning_rate` on
    its `param_groups` before a step. `experts`: a name that DeepSpeed finds in groups of parameters that not all
    data-parallel ranks have.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]  # whose shape says nothing: ZeRO-3 empties them
    for p in parameters:
        p.muon = config.name == "muon" and is_block_matrix(p.placement.name, p.placement.global_shape)
    matrices = [p for p in parameters if len(p.placement.global_shape) > 1 and not p.muon]
    vectors = [p for p in parameters if len(p.placement.global_shape) <= 1]
    groups = [
        group
        for params, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        for group in _by_factor(params, decay)
    ]
    groups = [part for group in groups for part in _experts_apart(group, experts)]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    if config.name == "adamw":
        return adamw
    return Muon(_experts_apart({"params": [p for p in parameters if p.muon]}, experts), adamw, config, mesh)


def _by_factor(parameters: list[nn.Parameter], decay: float) -> list[dict]:
    """Returns a group for each factor of the learning rate (muP). Weight decay, which AdamW multiplies by it, is
    divided by the factor."""
    alike: dict[float, list[nn.Parameter]] = {}
    for p in parameters:
        alike.setdefault(p.placement.lr_factor, []).append(p)
    return [
        {"params": params, "weight_decay": decay / factor} | ({} if factor == 1.0 else {"lr_factor": factor})
        for factor, params in alike.items()
    ]


def set_learning_rate(groups: Iterable[dict], lr: float) -> None:
    """Sets the learning rate of all groups of an optimizer, in place, before a step."""
    for group in groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def _experts_apart(group: dict, name: str | None) -> list[dict]:
    """Returns the group as it is, or in two: with and without parameters that lie on some data-parallel ranks only."""
    apart = [p for p in group["params"] if name and p.placement.expert]
    if not apart:
        return [group]
    rest = [p for p in group["params"] if not p.placement.expert]
    return [{**group, "params": rest}] * bool(rest) + [{**group, "params": apart, "moe": True, "name": name}]


def state_keys(parameter: Tensor) -> tuple[str, ...]:
    """Returns the names of what the optimizer keeps of a parameter, as tensors of its shape: the keys of its fragments
    beside `weight`. A flat tensor into which an engine has packed parameters is marked as they are, or counts as
    AdamW's."""
    return ("momentum",) if getattr(parameter, "muon", False) else ("exp_avg", "exp_avg_sq")


def initial_state(parameter: Tensor, step: int) -> dict[str, Tensor]:
    """Returns the optimizer's state of a parameter before its first update, counting `step` updates: to be filled from
    a checkpoint, or written to one."""
    zeros = {key: torch.zeros_like(parameter) for key in state_keys(parameter)}
    count = {} if "momentum" in zeros else {"step": torch.tensor(float(step), device=parameter.device)}
    return {**count, **zeros}
