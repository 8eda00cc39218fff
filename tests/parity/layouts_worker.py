"""Trains 5 steps, or so many as a layout says, on each layout and compares everything with one process. Runs on several
ranks with a JSON list of layouts.

Prints one JSON line a layout: the worst relative error of loss, metrics, gradient (by parameter), norm and weights.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load, save
from torch.distributed.tensor import DTensor

from llmtrain.arch.adapters import without_adapters
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import EngineConfig, ModelConfig, OptimConfig, ParallelConfig
from llmtrain.engine.auxiliary import routers_of, start_auxiliary
from llmtrain.engine.base import Engine, LossFn
from llmtrain.engine.build import Role, build_trained
from llmtrain.engine.optim import build_optimizer, learning_rate
from llmtrain.losses.token import token_loss
from llmtrain.model.balance import update_bias
from llmtrain.model.decoder import Decoder, init_tensor, parameter_shapes
from llmtrain.model.lora import merged
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.parallel.pipeline import inputs_of
from llmtrain.parallel.placement import Placement
from llmtrain.parallel.plan import parameters_of, slice_of, trained_of
from llmtrain.parallel.tensor import shard
from llmtrain.types import IGNORE, Batch, Scores
from tests.json_output import print_json
from tests.parity.meshes import mesh_of

ROUNDING = 1e-6  # a gradient that is 0 in exact arithmetic (a bias of all keys) is less than this of the norm
STEPS, ROWS, WIDTH, ACCUMULATION, SEED = 5, 2, 16, 2, 3


def model_config(layout: dict) -> ModelConfig:
    """Returns the model section, of which `layout["model"]` changes single fields."""
    usual = {
        "num_layers": layout.get("num_layers", 4),
        "hidden_size": 32,
        "ffn_size": 48,
        "num_heads": 4,
        "num_kv_heads": 4 if layout.get("tp", 1) == 4 else 2,
        "vocab_size": 64,
        "max_positions": 32,
        "tie_embeddings": layout.get("tied", True),
        "moe": layout.get("moe"),
    }
    return resolve_model(ModelConfig.model_validate({**usual, **layout.get("model", {})}))


def initial(name: str, shape: tuple[int, ...], config: ModelConfig) -> torch.Tensor:
    """Returns initial values, larger than the usual ones: with std 0.02 on so small a model, gradients are near the
    rounding noise."""
    value = init_tensor(name, shape, config, SEED)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if name.endswith((".lora.a", ".lora.b")):  # b not 0, or a has no gradient in the first step
        return value if name.endswith("a") else 0.1 * torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return value * 5
    return value + 0.1 * torch.randn(shape, generator=generator)  # a bias of 0 would hide one that is added twice


def optim_config(layout: dict) -> OptimConfig:
    clip = layout.get("grad_clip", 0.5)
    name = layout.get("optimizer", "adamw")
    lr, eps = layout.get("lr", 2e-3), layout.get("eps", 1e-6)
    return OptimConfig(name=name, lr=lr, min_lr=lr / 2, eps=eps, warmup_steps=2, weight_decay=0.1, grad_clip=clip)


def global_rows(step: int, rows: int) -> Batch:
    """Returns rows with unequal numbers of trained tokens (row 0 has none) and two documents each."""
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 64, (rows, WIDTH + 1), generator=g)
    trained = torch.randint(0, WIDTH + 1, (rows,), generator=g)
    trained[0], trained[1] = 0, WIDTH
    mask = torch.arange(WIDTH) < trained[:, None]
    cut = torch.randint(1, WIDTH, (rows, 1), generator=g)
    at = torch.arange(WIDTH).expand(rows, WIDTH)
    return Batch(
        ids[:, :-1].contiguous(),
        torch.where(mask, ids[:, 1:], IGNORE),
        mask,
        torch.where(at < cut, at, at - cut),
        (at >= cut).long(),
    )


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Returns some rows, of every field."""
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    cut = {name: value[rows] for name, value in found.items() if isinstance(value, torch.Tensor)}
    return replace(batch, **cut, extra={name: value[rows] for name, value in batch.extra.items()})


@dataclass(frozen=True)
class Task:
    """Says what is trained: `batch(step, rows)` gives all rows of a step, `rows` of which make a microbatch, and the
    sum of `loss` over all of them is divided by `denominator`."""

    loss: LossFn
    denominator: Callable[[Batch], torch.Tensor]
    batch: Callable[[int, int], Batch] = global_rows
    rows: int = ROWS


def replayed_rows(step: int, rows: int) -> Batch:
    """Returns the same rows with experts that somebody else chose, two of eight in each of three layers, at three
    tokens of four."""
    batch, g = global_rows(step, rows), torch.Generator().manual_seed(step)
    chosen = torch.rand(rows, WIDTH, 3, 8, generator=g).argsort(-1)[..., :2].flatten(2)
    free = torch.rand(rows, WIDTH, 1, generator=g) < 1 / 4
    return replace(batch, experts=chosen.masked_fill(free, -1).short())


TASKS = {
    "tokens": Task(token_loss, lambda batch: batch.loss_mask.sum()),
    "replayed": Task(token_loss, lambda batch: batch.loss_mask.sum(), replayed_rows),
}
"""Maps the names that `layout["task"]` may have; it is tokens where there is none."""


def task_of(layout: dict) -> Task:
    return TASKS[layout.get("task", "tokens")]


def scores_of(model: Decoder, batch: Batch) -> Scores:
    """Returns the scores of a plain decoder."""
    output = model(batch.input_ids, **inputs_of(batch, True))
    if isinstance(output, torch.Tensor):
        return Scores(values=output)
    logprobs, entropies, *candidates = output
    return Scores(logprobs, entropies, None, *candidates)


def plain_optimizer(model: Decoder, optim: OptimConfig) -> torch.optim.Optimizer:
    """Returns torch's AdamW with decay on matrices, whose lr muP divides within blocks. Muon is our own in one process:
    torch's rounds to bf16 (tests/engine)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if optim.name == "muon":
        for name, p in model.named_parameters():
            p.placement = Placement(name, tuple(p.shape))
        return build_optimizer(model, optim, None)
    mup = model.config.mup
    m = 1 if mup is None else model.config.hidden_size / mup.base_hidden
    inner = {p for name, p in model.named_parameters() if name.startswith("layers.")}
    matrices = [p for p in trained if p.dim() > 1]
    groups = [
        {"params": [p for p in matrices if p not in inner], "weight_decay": optim.weight_decay},
        {"params": [p for p in matrices if p in inner], "weight_decay": optim.weight_decay * m, "divided_by": m},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)


def reference(layout: dict, rows: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Trains in one plain torch process: returns losses, metrics, norms, gradients by name, final weights with their
    adapters merged."""
    config, optim, task = model_config(layout), optim_config(layout), task_of(layout)
    model = Decoder(config)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        p.data.copy_(initial(name, tuple(p.shape), config))
    opt = plain_optimizer(model, optim)
    history = []
    for step in range(layout.get("steps", STEPS)):
        b = task.batch(step, rows)
        denominator = task.denominator(b)
        start_auxiliary([model], 1 / float(denominator))
        total, metrics = task.loss(scores_of(model, b), b)
        loss = total / denominator
        model.zero_grad()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or float("inf"))
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, optim, STEPS) / group.get("divided_by", 1)
        opt.step()
        for router in routers_of([model]).values():
            if "bias" in router.config.balance:
                router.bias.copy_(update_bias(router.bias, router.counts.load, router.config.bias_rate))
        found = {name: float(x if name.endswith("_max") else x / denominator) for name, x in metrics.items()}
        history.append({"loss": loss.item(), "norm": norm.item(), "grads": grads, "metrics": found})
    final = {name: p.detach() for name, p in [*model.named_parameters(), *model.named_buffers()]}
    return history, {name: merged(name, config, final.__getitem__) for name in final if ".lora." not in name}


def relative(a: torch.Tensor, b: torch.Tensor, nothing: float = 0.0) -> float:
    """Returns the relative error of a to b; a b smaller than `nothing` is rounding noise, and a must be no more."""
    size = b.float().norm()
    error = (a.cpu().float() - b.float()).norm() / (size + 1e-12 if size > nothing else nothing / ROUNDING)
    return error.nan_to_num(float("inf")).item()  # max() would lose a NaN


def gradient(engine: Engine, p: torch.nn.Parameter) -> torch.Tensor:
    """Returns the reduced gradient of the tensor-parallel shard, before the update (a collective over its shards)."""
    if isinstance(p, DTensor):
        return p.grad.full_tensor()
    return p.grad if engine.config.zero_stage == 0 else safe_get_full_grad(p) / engine.scaler.scale


def grads_seen(engine: Engine, expected: dict[str, torch.Tensor], norm: float, scale: float, errors: dict) -> None:
    """Compares this rank's reduced gradients, parameter by parameter, before the update."""
    for p in trained_of(engine.parts):
        grad = gradient(engine, p)
        want = shard(expected[p.placement.name], p.placement.tp_dim, *p.placement.cut)
        nothing = ROUNDING * norm * scale
        error = relative(grad, want * scale, nothing) if grad is not None else float("inf")
        if error > errors["grad"]:
            errors["grad"], errors["worst"] = error, p.placement.name


def watch_updates(engine: Engine, look: Callable[[], None]) -> None:
    """Calls `look` before every update."""
    holder = engine.optimizer if hasattr(engine, "optimizer") else engine.engine
    take = holder.step

    def step(*args: object, **kwargs: object) -> None:
        look()
        return take(*args, **kwargs)

    holder.step = step


def settings_of(layout: dict) -> tuple[ParallelConfig, EngineConfig]:
    """Returns the sections that a layout sets; the rest are the defaults of fp32 on small rows."""
    parallel = {k: layout[k] for k in ParallelConfig.model_fields if k in layout}
    engine = {k: layout[k] for k in EngineConfig.model_fields if k in layout}
    return ParallelConfig(**{"dp_shard": 1, **parallel}), EngineConfig(
        **{"precision": "fp32", "logprob_chunk_tokens": 7, **engine}
    )


def build(layout: dict, mesh: Mesh, factor: float = 1.0) -> Engine:
    """Builds an engine that starts from the reference's values times `factor`."""
    parallel, settings = settings_of(layout)
    config = model_config(layout)
    shapes = parameter_shapes(config)

    def source(name: str) -> torch.Tensor:
        return initial(name, shapes[name], config) * factor

    return build_trained(Role("policy", config, parallel, settings, source, optim_config(layout), STEPS), mesh)


def clips_first(engine: Engine) -> bool:
    """Tells whether the gradient is already clipped when the optimizer is called."""
    return engine.config.backend == "fsdp" or engine.config.zero_stage == 0


def told_by_rank_0(layout: dict, rows: int, mesh: Mesh) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Returns the reference, computed once for all ranks."""
    steps = layout.get("steps", STEPS)
    data = torch.empty(0, dtype=torch.uint8)
    if mesh.rank == 0:
        history, weights = reference(layout, rows)
        tensors = {f"weight/{name}": value for name, value in weights.items()}
        for step, seen in enumerate(history):
            tensors |= {f"{step}/{name}": torch.tensor(seen[name], dtype=torch.float64) for name in ("loss", "norm")}
            tensors |= {f"{step}/grads/{name}": grad for name, grad in seen["grads"].items()}
            tensors |= {f"{step}/metrics/{name}": torch.tensor(x).double() for name, x in seen["metrics"].items()}
        data = torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)
    tensors = load(mesh.all_gather_bytes(data)[0].numpy().tobytes())

    def under(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    numbers = [{name: tensors[f"{step}/{name}"].item() for name in ("loss", "norm")} for step in range(steps)]
    for step, each in enumerate(numbers):
        metrics = {name: x.item() for name, x in under(f"{step}/metrics/").items()}
        each |= {"grads": under(f"{step}/grads/"), "metrics": metrics}
    return numbers, under("weight/")


def run(layout: dict, device: torch.device) -> dict:
    """Trains on a layout, on a GPU too; the reference is computed on the CPU."""
    with mesh_of(*settings_of(layout), device) as mesh:
        return compare(layout, mesh)


def compare(layout: dict, mesh: Mesh) -> dict:
    """Returns the worst error of all ranks, measure by measure."""
    parallel, sizes, task = settings_of(layout)[0], mesh.sizes, task_of(layout)
    accumulation = max(ACCUMULATION, sizes["pp"] * parallel.virtual_stages)
    rows = task.rows * accumulation * mesh.dp_size
    history, weights = told_by_rank_0(layout, rows, mesh)
    config, optim = model_config(layout), optim_config(layout)
    engine = build(layout, mesh)
    errors = {"loss": 0.0, "norm": 0.0, "grad": 0.0, "metric": 0.0, "dropped": 0.0, "worst": ""}

    def look() -> None:
        want = history[engine.step]
        clipped = clips_first(engine) and optim.grad_clip and want["norm"] > optim.grad_clip
        factor = optim.grad_clip / want["norm"] if clipped else 1.0
        grads_seen(engine, want["grads"], want["norm"], factor, errors)

    watch_updates(engine, look)
    for step, want in enumerate(history):
        batch = task.batch(step, rows)
        starts = [(a * mesh.dp_size + mesh.dp_rank) * task.rows for a in range(accumulation)]
        mine = [rows_of(batch, slice(start, start + task.rows)) for start in starts]
        stats = engine.train_step(mine, task.loss, task.denominator(batch))
        errors["loss"] = max(errors["loss"], abs(stats.loss - want["loss"]) / abs(want["loss"]))
        errors["metric"] = max([errors["metric"], *metric_errors(stats.metrics, want["metrics"])])
        errors["norm"] = max(errors["norm"], abs(stats.grad_norm - want["norm"]) / want["norm"])
        dropped = (abs(v) for name, v in stats.metrics.items() if name.startswith("load_dropped."))
        errors["dropped"] = max([errors["dropped"], *dropped])
    errors["weight"] = max(relative(full, weights[name]) for name, full in engine.full_weights())
    check_frozen(engine, config)
    errors["score"] = score_error(engine, mine, weights, config)
    everyone = mesh.all_gather_json(errors)
    worst = {k: max(e[k] for e in everyone) for k in errors if k != "worst"}
    worst["worst"] = max(everyone, key=lambda e: e["grad"])["worst"]
    return worst


def metric_errors(found: dict[str, float], expected: dict[str, float]) -> list[float]:
    """Returns the error of each, relative to it or, where it is small, to 1: each is of the order of log-probs."""
    return [abs(found.get(name, math.inf) - value) / max(1.0, abs(value)) for name, value in expected.items()]


def check_frozen(engine: Engine, config: ModelConfig) -> None:
    """Checks that what is not trained has the bits it had at the start."""
    shapes = parameter_shapes(config)
    for p in parameters_of(engine.parts):
        if not p.requires_grad:
            start = slice_of(p, lambda name: initial(name, shapes[name], config))
            held = engine._gather(p)
            assert torch.equal(held.cpu(), start.to(held.dtype)), p.placement.name


def without_padding(scores: Scores, batch: Batch) -> Scores:
    """Returns the scores with values of 0 at padding, where they mean nothing: what it attends to differs."""
    if scores.values is None or batch.segment_ids is None:
        return scores
    return replace(scores, values=scores.values.cpu().masked_fill(batch.segment_ids < 0, 0.0))


def score_error(engine: Engine, mine: list[Batch], weights: dict[str, torch.Tensor], config: ModelConfig) -> float:
    """Returns the largest difference of a score to that of a plain decoder with the reference's weights, where scores
    are larger than 1 as a share of the largest: fp32 holds a log-prob of -10 to 1e-6 alone."""
    plain = Decoder(without_adapters(config))
    tied = {"head.weight": weights["embed.weight"]} if config.tie_embeddings else {}
    plain.load_state_dict({**weights, **tied})
    with torch.no_grad():
        expected = [scores_of(plain, batch) for batch in mine]
    errors = []
    for batch, found, want in zip(mine, engine.score(mine), expected, strict=True):
        found, want = without_padding(found, batch), without_padding(want, batch)
        pairs = [(getattr(found, f.name), getattr(want, f.name)) for f in fields(Scores)]
        assert all((a is None) == (b is None) for a, b in pairs), "the same scores"
        errors += [difference(a.cpu(), b) for a, b in pairs if b is not None]
    return max(errors)


def difference(found: torch.Tensor, want: torch.Tensor) -> float:
    """Returns the largest difference, as a share of the largest number where that is more than 1."""
    return (found - want).abs().nan_to_num(math.inf).max().item() / max(1.0, want.abs().max().item())


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for layout in json.loads(sys.argv[1]):
        try:
            result = run(layout, mesh.device)
        except Exception as error:
            if os.environ.get("TRACE"):
                raise
            result = {"error": f"{type(error).__name__}: {error}"}
        if mesh.rank == 0 or "error" in result:
            print_json({"layout": layout, **result})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
