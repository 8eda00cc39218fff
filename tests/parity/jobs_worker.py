"""Trains a job of three models on one mesh, a policy and a critic that are trained and a frozen reference, and compares
it with the same job in one plain process. Runs on several ranks with a JSON list of cases; prints one JSON line a case:
worst errors.

Each model's scores go into another one's loss, as in PPO: what one gets wrong, the others do.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config.schema import EngineConfig, ParallelConfig
from llmtrain.engine.base import Engine, LossFn, Scorer
from llmtrain.engine.build import Role, build_frozen
from llmtrain.engine.optim import learning_rate
from llmtrain.losses.distill import distillation_loss, forward_kl
from llmtrain.losses.reduce import masked_sum
from llmtrain.model.decoder import Decoder, parameter_shapes
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.types import Batch, Metrics, Scores, StepStats
from tests.json_output import print_json
from tests.parity import layouts_worker as parity
from tests.parity.meshes import mesh_of

STEPS, ROWS, TOP_K = 4, 2, 6
SCALAR = {"head": "scalar", "hidden_size": 48, "ffn_size": 64}
MODELS = {
    "policy": {"num_layers": 3},
    # eps: AdamW makes a full update of a gradient that is hardly more than rounding, which the next steps show
    "critic": {"num_layers": 2, "tied": False, "lr": 3e-3, "eps": 1e-4, "grad_clip": 5.0, "model": SCALAR},
    "reference": {"num_layers": 3},
}
FACTORS = {
    "policy": 1.0,
    "critic": 1.0,
    "reference": 0.9,
}  # factor of the weights at the start: the reference differs


def policy_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    """Returns a loss of advantages, a squared distance to the reference, and the KL from its likeliest tokens."""
    distance = (scores.logprobs - batch.extra["reference"]) ** 2
    loss = masked_sum(0.1 * distance - batch.extra["advantages"] * scores.logprobs, batch.loss_mask)
    return loss + distillation_loss(scores, batch, forward_kl, teachers=1, whole=False)[0], {}


def critic_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    return masked_sum((scores.values - batch.extra["targets"]) ** 2, batch.loss_mask), {}


LOSSES: dict[str, LossFn] = {"policy": policy_loss, "critic": critic_loss}


def step_rows(step: int, rows: int) -> Batch:
    batch, g = parity.global_rows(step, rows), torch.Generator().manual_seed(500 + step)
    batch.extra["returns"] = 1 + torch.randn(batch.labels.shape, generator=g)
    return batch


def one_step(models: Mapping[str, Scorer], batches: Sequence[Batch], denominator: Tensor) -> dict[str, StepStats]:
    """Takes one step of the job, in one process as on many."""
    scores = {name: model.score(batches) for name, model in models.items()}
    likeliest = models["reference"].score([replace(batch, top_k=TOP_K) for batch in batches])
    for batch, said in zip(batches, likeliest, strict=True):
        batch.candidates = said.candidate_ids.cpu()
        batch.extra |= {"teacher_0": said.candidates.cpu(), "share_0": torch.ones(batch.labels.shape)}
    for batch, policy, critic, reference in zip(batches, *scores.values(), strict=True):
        batch.extra["reference"] = reference.logprobs.cpu()
        batch.extra["advantages"] = batch.extra["returns"] - critic.values.cpu()
        batch.extra["targets"] = batch.extra["returns"] + 0.1 * policy.logprobs.cpu()
    return {name: models[name].train_step(batches, loss, denominator) for name, loss in LOSSES.items()}


class Plain:
    """Trains a model in one process with torch's own AdamW and clipping."""

    def __init__(self, layout: dict, factor: float) -> None:
        config, self.optim = parity.model_config(layout), parity.optim_config(layout)
        self.model, self.history = Decoder(config), list[dict]()
        for key, held in [*self.model.named_parameters(), *self.model.named_buffers()]:
            held.data.copy_(parity.initial(key, tuple(held.shape), config) * factor)
        self.optimizer = parity.plain_optimizer(self.model, self.optim)

    @torch.no_grad()
    def score(self, batches: Sequence[Batch]) -> list[Scores]:
        return [parity.scores_of(self.model, batch) for batch in batches]

    def train_step(self, batches: Sequence[Batch], loss: LossFn, denominator: Tensor) -> StepStats:
        (batch,) = batches
        value = loss(parity.scores_of(self.model, batch), batch)[0] / denominator
        self.model.zero_grad()
        value.backward()
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.grad_clip).item()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(len(self.history), self.optim, parity.STEPS) / group.get("divided_by", 1)
        self.optimizer.step()
        self.history.append({"loss": value.item(), "norm": norm, "grads": grads})
        return StepStats(value.item(), norm, 0.0)


def plain_job(layouts: Mapping[str, dict], rows: int, count: int) -> dict[str, Plain]:
    """Takes `count` steps."""
    models = {name: Plain(layout, FACTORS[name]) for name, layout in layouts.items()}
    for step in range(count):
        batch = step_rows(step, rows)
        one_step(models, [batch], batch.loss_mask.sum())
    return models


def frozen(layout: dict, mesh: Mesh, factor: float) -> Scorer:
    config = parity.model_config(layout)
    shapes = parameter_shapes(config)

    def source(name: str) -> Tensor:
        return parity.initial(name, shapes[name], config) * factor

    return build_frozen(Role("reference", config, *parity.settings_of(layout), source), mesh)


def watch(engine: Engine, plain: Plain, errors: dict) -> None:
    """Compares every gradient before each update."""

    def look() -> None:
        want = plain.history[engine.step]
        clip = plain.optim.grad_clip
        factor = clip / want["norm"] if parity.clips_first(engine) and want["norm"] > clip else 1.0
        parity.grads_seen(engine, want["grads"], want["norm"], factor, errors)

    parity.watch_updates(engine, look)


def compare(case: dict, mesh: Mesh) -> dict:
    """Returns the worst errors of all models and ranks."""
    turns = max(2, mesh.sizes["pp"] * case["mesh"].get("virtual_stages", 1))
    rows = ROWS * turns * mesh.dp_size
    layouts = {name: {**model, **case["mesh"], **case.get(name, {})} for name, model in MODELS.items()}
    count = case.get("steps", STEPS)
    plain = plain_job(layouts, rows, count)
    models: dict[str, Scorer] = {name: parity.build(layouts[name], mesh) for name in LOSSES}
    models["reference"] = frozen(layouts["reference"], mesh, FACTORS["reference"])
    errors = {name: {"loss": 0.0, "norm": 0.0, "grad": 0.0, "worst": ""} for name in LOSSES}
    for name in LOSSES:
        watch(models[name], plain[name], errors[name])
    for step in range(count):
        whole = step_rows(step, rows)
        starts = [(turn * mesh.dp_size + mesh.dp_rank) * ROWS for turn in range(turns)]
        mine = [parity.rows_of(whole, slice(start, start + ROWS)) for start in starts]
        for name, stats in one_step(models, mine, whole.loss_mask.sum()).items():
            want, seen = plain[name].history[step], errors[name]
            size = max(1.0, abs(want["loss"]))  # terms of the order of a log-prob may cancel
            seen["loss"] = max(seen["loss"], abs(stats.loss - want["loss"]) / size)
            seen["norm"] = max(seen["norm"], abs(stats.grad_norm - want["norm"]) / want["norm"])
    for name, seen in errors.items():
        final = dict(plain[name].model.named_parameters())
        seen["weight"] = max(parity.relative(full, final[key].detach()) for key, full in models[name].full_weights())
    errors["scores"] = {name: score_error(models[name], plain[name], mine) for name in models}
    everyone = mesh.all_gather_json(errors)
    return {name: {key: max(e[name][key] for e in everyone) for key in errors[name]} for name in errors}


def score_error(model: Scorer, plain: Plain, mine: Sequence[Batch]) -> float:
    found, expected = (list(map(parity.without_padding, each.score(mine), mine)) for each in (model, plain))
    pairs = [
        (getattr(a, f.name), getattr(b, f.name))
        for a, b in zip(found, expected, strict=True)
        for f in fields(Scores)
    ]  # fmt: skip
    assert all((a is None) == (b is None) for a, b in pairs)
    return max((a.cpu() - b).abs().nan_to_num(math.inf).max().item() for a, b in pairs if b is not None)


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for case in json.loads(sys.argv[1]):
        try:
            with mesh_of(parity.settings_of(case["mesh"])[0], EngineConfig(backend="fsdp")) as own:
                result = compare(case, own)
        except Exception as error:
            if os.environ.get("TRACE"):
                raise
            result = {"error": f"{type(error).__name__}: {error}"}
        if mesh.rank == 0 or "error" in result:
            print_json({"case": case, **result})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
