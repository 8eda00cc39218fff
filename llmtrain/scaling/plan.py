"""What a configuration will need, by arithmetic: ranks, batch, memory of a rank, pipeline bubble. Starts nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.config.check import Earlier, mesh_sizes, planned_stages
from llmtrain.config.schema import Config, EngineConfig, ModelConfig, RunConfig
from llmtrain.config.shapes import block_parameters, parameter_count, resolve_model

TRAINING = ("pretrain", "sft", "grpo")


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one stage. Memory is of the fullest rank, in bytes."""

    ranks: int  # all of them
    rollout_ranks: int
    mesh: dict[str, int]
    parameters: int
    parameters_per_rank: int  # before ZeRO
    accumulation: float  # microbatches a step and data-parallel rank; not whole = the batch does not fit the ranks
    tokens_per_step: int
    total_tokens: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    bubble: float  # idle share of the pipeline's ideal time

    @property
    def memory_bytes(self) -> int:
        """Sum of the parts; temporary buffers and fragmentation come on top."""
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
        )


def plan(config: Config, world_size: int, rollout_ranks: int = 0, earlier: Earlier | None = None) -> Plan:
    """The arithmetic of training with `config` on `world_size` ranks, of which `rollout_ranks` only generate.

    Raises ValueError if the mesh does not fit the ranks or the model is not known yet.
    """
    model = resolve_model(config.model, earlier)
    mesh = mesh_sizes(config.parallel, world_size - rollout_ranks)
    train, engine, dp = config.train, config.engine, mesh["dp_replicate"] * mesh["dp_shard"]
    accumulation = train.global_batch_seqs / (train.micro_batch_seqs * dp)
    local = parameters_per_rank(model, mesh["pp"], mesh["tp"])
    weights, gradients, optimizer = zero_bytes(local, engine.zero_stage, dp, engine.precision)
    return Plan(
        ranks=world_size,
        rollout_ranks=rollout_ranks,
        mesh=mesh,
        parameters=parameter_count(model),
        parameters_per_rank=local,
        accumulation=accumulation,
        tokens_per_step=train.global_batch_seqs * train.seq_len,
        total_tokens=train.steps * train.global_batch_seqs * train.seq_len,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=0 if engine.offload == "optimizer" else optimizer,
        activations_bytes=activation_bytes(config, model, mesh, math.ceil(accumulation)),
        logits_bytes=logits_bytes(engine, model, mesh["tp"]),
        bubble=bubble(mesh["pp"], accumulation),
    )


def parameters_per_rank(model: ModelConfig, pp: int, tp: int) -> int:
    """Parameters on the fullest rank: the first stage (embedding, one layer more if they do not divide evenly) or the
    last (head, final norm). `model` is resolved. A tied embedding is held by both ends."""
    block = block_parameters(model, tp)
    matrix = model.vocab_size * model.hidden_size // tp
    first = math.ceil(model.num_layers / pp) * block + matrix
    if pp == 1:
        return first + (0 if model.tie_embeddings else matrix) + model.hidden_size
    last = model.num_layers // pp * block + matrix + model.hidden_size
    return max(first, last)


def zero_bytes(parameters: int, stage: int, ranks: int, precision: str) -> tuple[int, int, int]:
    """(weights, gradients, optimizer state) of one rank under ZeRO, arXiv 1910.02054, section 3 and figure 1.

    Mixed precision holds 2 + 2 + 12 bytes a parameter (the 12: fp32 weight and AdamW's two moments), fp32 4 + 4 + 8.
    Stage 1 shards the optimizer state over the data-parallel `ranks`, stage 2 gradients too, stage 3 weights too.
    """
    sizes = (4, 4, 8) if precision == "fp32" else (2, 2, 12)
    sharded_from = (3, 2, 1)
    return tuple(
        math.ceil(parameters * size / (ranks if stage >= least else 1))
        for size, least in zip(sizes, sharded_from, strict=True)
    )


def activation_bytes(config: Config, model: ModelConfig, mesh: dict[str, int], accumulation: int) -> int:
    """Activations kept for the backward pass on the first stage, which holds most microbatches under 1F1B: `pp`.

    Counted as arXiv 2205.05198, section 4, tensor by tensor. With recomputation each layer keeps its input, and one
    layer at a time is whole.
    """
    tp, sequence_parallel = mesh["tp"], config.parallel.sequence_parallel
    value = 4 if config.engine.precision == "fp32" else 2
    tokens = config.train.micro_batch_seqs * config.train.seq_len
    layers, in_flight = math.ceil(model.num_layers / mesh["pp"]), min(mesh["pp"], accumulation)
    block = tokens * value * block_activations(model, tp, sequence_parallel)
    if config.engine.remat == "none":
        return int(layers * in_flight * block)
    layer_input = tokens * value * model.hidden_size / (tp if sequence_parallel else 1)
    return int(layers * in_flight * layer_input + block)


def block_activations(model: ModelConfig, tp: int, sequence_parallel: bool) -> float:
    """Values a token that one block keeps: its input and the norm's output, twice (whole on each rank without sequence
    parallelism), and, sharded: q, k, v, attention's output, gate, up, silu(gate) and their product. SwiGLU and grouped
    K/V in place of the paper's GELU and full heads; no dropout, and attention scores are recomputed, not kept."""
    assert model.head_dim is not None
    outside = 4 * model.hidden_size / (tp if sequence_parallel else 1)
    attention = 2 * model.head_dim * (model.num_heads + model.num_kv_heads)
    return outside + (attention + 4 * model.ffn_size) / tp


def logits_bytes(engine: EngineConfig, model: ModelConfig, tp: int) -> int:
    """One chunk of fp32 logits and its gradient on the last stage."""
    return 2 * 4 * engine.logprob_chunk_tokens * model.vocab_size // tp


def bubble(pp: int, microbatches: float) -> float:
    """Idle share of 1F1B over the ideal time, (P - 1) / m (arXiv 2104.04473, section 2.2)."""
    return (pp - 1) / max(1.0, microbatches)


def main(config: Config) -> None:
    """Print the plan of a stage, or of every training stage of a run."""
    for title, staged, world_size, rollout_ranks, earlier in _stages(config):
        print(title)
        try:
            lines = describe(staged, plan(staged, world_size, rollout_ranks, earlier))
        except ValueError as error:
            lines = str(error).splitlines()
        print("\n".join(f"  {line}" for line in lines))


def _stages(config: Config) -> Iterator[tuple[str, Config, int, int, Earlier]]:
    """(title, configuration, ranks, of these only generating, stages before) of everything that trains."""
    if not isinstance(config, RunConfig):
        workers = _workers(config)
        yield config.name, config, _world_size(config, workers), workers, {}
        return
    for stage, staged, earlier in planned_stages(config):
        if stage.command in TRAINING:
            workers = _workers(staged) if stage.command == "grpo" else 0
            yield f"{stage.name} ({stage.command})", staged, stage.ranks, workers, earlier


def _workers(config: Config) -> int:
    return config.rollout.workers if config.rollout.placement == "separate" else 0


def _world_size(config: Config, workers: int) -> int:
    """Of the launcher, or else the least that the mesh fits."""
    p = config.parallel
    least = p.pp * p.dp_replicate * max(1, p.dp_shard) * p.cp * p.tp + workers
    return int(os.environ.get("WORLD_SIZE", least))


def describe(config: Config, p: Plan) -> list[str]:
    """A plan for reading."""
    train, engine = config.train, config.engine
    axes = " x ".join(f"{axis} {size}" for axis, size in p.mesh.items())
    fits = "" if p.accumulation.is_integer() else " (not whole: pretrain and sft will refuse)"
    parts = {
        "weights": p.weights_bytes,
        "gradients": p.gradients_bytes,
        "optimizer": p.optimizer_bytes,
        "activations": p.activations_bytes,
        "logits": p.logits_bytes,
    }
    memory = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
    return [
        f"ranks        {p.ranks}: {axes}" + (f", and {p.rollout_ranks} for rollouts" if p.rollout_ranks else ""),
        f"parameters   {p.parameters:,}, {p.parameters_per_rank:,} on the fullest rank before ZeRO",
        f"batch        {train.global_batch_seqs} x {train.seq_len} tokens = {p.tokens_per_step:,} a step, "
        f"accumulation {p.accumulation:g}{fits}",
        f"total        {train.steps:,} steps, {p.total_tokens:,} tokens",
        f"memory       {gigabytes(p.memory_bytes)} a rank: {memory}",
        f"             ({engine.precision}, ZeRO {engine.zero_stage}, offload {engine.offload}, remat {engine.remat})",
        f"bubble       {p.bubble:.1%} of the ideal time",
    ]


def gigabytes(size: int) -> str:
    """Bytes in units of 1e9, as the papers do. Example: gigabytes(16_600_000_000) -> '16.6 GB'"""
    return f"{size / 1e9:.3g} GB"
