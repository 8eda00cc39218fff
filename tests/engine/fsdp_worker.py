"""Checks what FSDP2 does beside the parity layouts. Runs on 4 ranks; prints one JSON line a case."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from llmtrain.arch.mesh import AXES
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.save import save_checkpoint
from llmtrain.config.schema import ParallelConfig
from llmtrain.engine.base import Engine
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import parameter_shapes
from llmtrain.parallel.mesh import Mesh, init_mesh, trainer_mesh
from llmtrain.types import StepStats
from tests.json_output import print_json
from tests.parity import layouts_worker as parity

ACCUMULATION = 3


def start(**layout: object) -> Engine:
    layout = {"backend": "fsdp", "num_layers": 2, **layout}
    parallel = parity.settings_of(layout)[0]
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    mesh = trainer_mesh(sizes, torch.device("cpu"), timedelta(seconds=60), schedule=parallel.schedule)
    return parity.build(layout, mesh)


def step(engine: Engine, number: int) -> StepStats:
    """Takes one step on this rank's share of the rows of that step."""
    mesh: Mesh = engine.mesh
    whole = parity.global_rows(number, 2 * ACCUMULATION * mesh.dp_size)
    firsts = [2 * (i * mesh.dp_size + mesh.dp_rank) for i in range(ACCUMULATION)]
    batches = [parity.rows_of(whole, slice(first, first + 2)) for first in firsts]
    return engine.train_step(batches, token_loss, whole.loss_mask.sum())


def weights(engine: Engine) -> dict[str, Tensor]:
    """Returns this rank's pieces, with the optimizer's state."""
    return {f"{p.placement.name} {key}": t for p in engine.parameters for key, t in held(engine, p)}


def held(engine: Engine, p: torch.nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    yield "weight", p.to_local().detach().clone()
    yield from ((key, t.to_local().clone()) for key, t in engine.optimizer.state[p].items() if t.dim())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def reductions(**layout: object) -> dict:
    """Counts the reductions over ranks in one step, and how many one backward needs: a block each, and one for the
    rest."""
    engine = start(**layout)
    step(engine, 0)
    with mock.patch.object(_fsdp_param_group, "foreach_reduce", side_effect=_fsdp_param_group.foreach_reduce) as reduce:
        step(engine, 1)
    return {"reductions": reduce.call_count, "needed": sum(1 + len(part.layers) for part in engine.parts)}


def left_out() -> dict:
    """Checks that a step that is not admitted changes nothing, and neither does scoring."""
    one, two = start(dp_shard=2, tp=2, reshard=False), start(dp_shard=2, tp=2, reshard=False)
    losses = [[step(engine, 0).loss] for engine in (one, two)]
    before = weights(two)
    two.admit = lambda loss, broken: False
    step(two, 1)
    two.score([parity.global_rows(9, 2)])
    unchanged = same(before, weights(two)) and two.step == 1
    two.admit = one.admit
    for engine, history in zip((one, two), losses, strict=True):
        history.append(step(engine, 2).loss)
    return {"unchanged": unchanged, "same": losses[0] == losses[1] and same(weights(one), weights(two))}


def resumed(directory: str, **layout: object) -> dict:
    """Takes three steps, a checkpoint, two more; and those two again in another engine that loads it."""
    one = start(**layout)
    for number in range(3):
        step(one, number)
    path = save_checkpoint(
        directory, one, {"step": 3, **one.extra_state()}, one.mesh, 1, parameter_shapes(one.parts[0].config)
    )
    two = start(**layout)
    step(two, 7)  # it must forget this
    two.score([parity.global_rows(9, 2)] * 2)
    reader = CheckpointReader(path)
    two.load_fragments(reader.read, 3)
    two.load_extra_state({key: reader.state[key] for key in one.extra_state()})
    losses = [[step(engine, number).loss for number in (3, 4)] for engine in (one, two)]
    pieces = sum(p.to_local().numel() == 0 for p in one.parameters)
    return {"same": losses[0] == losses[1] and same(weights(one), weights(two)), "empty_pieces": pieces}


def mixed(precision: str) -> dict:
    """Compares with fp32: returns the largest relative difference of a loss; and the dtypes of weights and hidden
    states."""
    seen, layout = set(), {"pp": 2, "dp_shard": 2, "sequence_parallel": False}
    exact, rounded = start(**layout), start(**layout, precision=precision, loss_scale_window=2)
    rounded.parts[0].register_forward_hook(lambda part, args, out: seen.add(str(out.dtype)) if part.embed else None)
    pairs = [[step(engine, number).loss for number in range(4)] for engine in (exact, rounded)]
    full = {str(w.dtype) for _, w in rounded.full_weights()}
    return {
        "error": max(abs(a - b) / a for a, b in zip(*pairs, strict=True)),
        "hidden": sorted(seen),
        "masters": sorted({str(t.dtype) for t in weights(rounded).values()}),
        "working": sorted(full),
        "steps": rounded.step,
    }


def overflow() -> dict:
    """Starts from an absurd loss scale: updates are left out until it fits, nothing is broken on the way."""
    engine = start(dp_replicate=2, dp_shard=2, precision="fp16", loss_scale_window=100)
    step(engine, 0)
    before, engine.scaler.scale = weights(engine), 2.0**24
    tries = [step(engine, 1)]
    unchanged = same(before, weights(engine)) and engine.step == 1
    while engine.step == 1:
        tries.append(step(engine, 1))
    return {
        "unchanged": unchanged,
        "scales": [math.log2(stats.metrics["loss_scale"]) for stats in tries],
        "skipped": [stats.metrics["skipped"] for stats in tries],
        "norms": [str(stats.grad_norm) for stats in tries],
        "finite": all(bool(t.isfinite().all()) for t in weights(engine).values()),
    }


def cases(directory: str) -> Iterator[tuple[str, Callable[[], dict]]]:
    yield "accumulate", lambda: reductions(dp_shard=2, tp=2)
    yield "accumulate, pipeline", lambda: reductions(pp=2, dp_replicate=2, reshard=False)
    yield "left out", left_out
    yield "bf16", lambda: mixed("bf16")
    yield "fp16", lambda: mixed("fp16")
    yield "overflow", overflow
    # the 2 rows of k and v lie on the first two ranks, the 50 of gate and up do not divide by 4
    odd = {"ffn_size": 50, "num_kv_heads": 1, "head_dim": 2}
    shape = parity.model_config
    parity.model_config = lambda layout: shape(layout).model_copy(update=odd)
    yield "resumed", lambda: resumed(os.path.join(directory, "a"), dp_shard=4, precision="bf16")
    parity.model_config = shape
    copies = {"dp_replicate": 2, "dp_shard": 1, "tp": 2, "precision": "fp16", "offload": "params"}
    yield "resumed, copies", lambda: resumed(os.path.join(directory, "b"), **copies)


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for name, case in cases(sys.argv[1]):
        everyone = mesh.all_gather_json(case())
        if mesh.rank == 0:
            print_json({"case": name, "ranks": everyone})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
