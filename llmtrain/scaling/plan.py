"""Computes what a configuration will need: ranks, batch, memory of a rank, pipeline bubble. Starts nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.arch.mesh import mesh_sizes
from llmtrain.arch.parameters import has_experts, numel
from llmtrain.arch.resolve import chunk_tokens, parameter_count, resolve_model
from llmtrain.config.ramp import Phase, microbatch_tokens, phases, total_tokens
from llmtrain.config.recipes import Recipe, StepSize, planned_recipes, recipe_of
from llmtrain.config.schema import Config, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llmtrain.rules.case import Earlier
from llmtrain.rules.check import planned_stages
from llmtrain.scaling.attention import attention_bytes
from llmtrain.scaling.communication import (
    CONTROL,
    GROUPS,
    Item,
    RankStep,
    Step,
    communication,
    evenly_loaded,
    moved_bytes,
)
from llmtrain.scaling.parts import rank_shapes
from llmtrain.scaling.states import States, state_bytes


@dataclass(frozen=True)
class Plan:
    """Holds the resource figures of one stage of a run. Memory is that of the fullest rank, in bytes."""

    ranks: int  # trainers and rollout workers
    rollout_ranks: int
    mesh: dict[str, int]
    parameters: int
    parameters_per_rank: int  # before ZeRO
    accumulation: float | None  # microbatches a step and data-parallel rank; None in RL: they depend on lengths
    tokens_per_step: int  # at the start; in RL the most that can be sampled
    total_tokens: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    buffers_bytes: int  # gathered weights, and gradients before they are reduced
    activations_bytes: int
    attention_bytes: int  # masks, and what context parallelism adds to the activations
    logits_bytes: int
    sent_bytes: dict[str, int] | None  # a step, by mesh axes, as a ring moves them; None in RL
    bubble: float | None  # idle share of the pipeline's ideal time; None in RL

    @property
    def memory_bytes(self) -> int:
        """Returns the sum of the parts; temporary buffers and fragmentation come on top."""
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.buffers_bytes
            + self.activations_bytes
            + self.attention_bytes
            + self.logits_bytes
        )


def plan(config: Config, world_size: int, recipe: Recipe | None = None, earlier: Earlier | None = None) -> Plan:
    """Returns the plan of a recipe on `world_size` ranks (None: the first of `planned_recipes`). `earlier`: see
    `rules.check.planned_stages`.

    Raises ValueError if the mesh does not fit the ranks or the model is not known yet.
    """
    model = resolve_model(config.model, earlier)
    recipe = recipe or planned_recipes(config)[0]
    workers, size = rollout_workers(config, recipe), recipe.step_size(config)
    mesh = mesh_sizes(config.parallel, world_size - workers)
    parallel = config.parallel.model_copy(update=mesh)
    accumulation = accumulation_of(config, size, mesh["dp_replicate"] * mesh["dp_shard"])
    states = fullest_states(config, model, parallel, accumulation)
    return Plan(
        ranks=world_size,
        rollout_ranks=workers,
        mesh=mesh,
        parameters=parameter_count(model),
        parameters_per_rank=max(numel(rank_shapes(model, parallel, rank)) for rank in range(parallel.pp)),
        accumulation=accumulation,
        tokens_per_step=size.tokens,
        total_tokens=config.train.steps * size.tokens if accumulation is None else total_tokens(config.train),
        weights_bytes=states.weights,
        gradients_bytes=states.gradients,
        optimizer_bytes=states.optimizer,
        buffers_bytes=states.gathered + states.unreduced,
        activations_bytes=activation_bytes(config, model, mesh, accumulation),
        attention_bytes=attention_bytes(config, model, mesh, kept_layers(config, model, mesh, accumulation)),
        logits_bytes=logits_bytes(config, model, mesh),
        sent_bytes=None if accumulation is None else sent_bytes(config, model, parallel, math.ceil(accumulation)),
        bubble=None
        if accumulation is None
        else bubble_share(config.parallel.schedule, mesh["pp"], config.parallel.virtual_stages, accumulation),
    )


def accumulation_of(config: Config, size: StepSize, dp: int) -> float | None:
    """Returns the microbatches a step and data-parallel rank, of full rows; None where lengths decide."""
    if size.seqs is None:
        return None
    train = config.train
    if train.micro_batch_tokens is not None:  # full rows, or fewer
        return float(max(config.parallel.pp, math.ceil(size.tokens / (train.micro_batch_tokens * dp))))
    return size.seqs / (train.micro_batch_seqs * dp)


def rollout_workers(config: Config, recipe: Recipe) -> int:
    """Returns the ranks that only generate."""
    return config.rollout.workers if recipe.samples and config.rollout.placement == "separate" else 0


def fullest_states(config: Config, model: ModelConfig, parallel: ParallelConfig, accumulation: float | None) -> States:
    """Returns the model states of the pipeline rank that holds most."""
    microbatches = 2 if accumulation is None else accumulation
    each = (
        state_bytes(model, parallel, config.engine, config.optim.name, microbatches, rank)
        for rank in range(parallel.pp)
    )
    return max(each, key=sum)


def sent_bytes(config: Config, model: ModelConfig, parallel: ParallelConfig, microbatches: int) -> dict[str, int]:
    """Returns the bytes by mesh axes (of more than one rank) that the busiest pipeline rank moves. Every token is
    trained."""
    train = config.train
    rows = (train.micro_batch_tokens or train.micro_batch_seqs * train.seq_len) // train.seq_len
    tokens = microbatches * rows * train.seq_len // parallel.cp
    step = Step(microbatches, rows, train.seq_len, tokens, int(config.data.mask_documents))
    rank_steps = (RankStep(model, parallel, config.engine, step, rank) for rank in range(parallel.pp))
    items = max((communication(evenly_loaded(rank_step)) for rank_step in rank_steps), key=moved_bytes)
    by_axes: dict[str, list[Item]] = {}
    for item in items:
        if item.what in CONTROL:
            continue
        axes = ["ep"] if item.axis == "ep" else [axis for axis in GROUPS[item.axis] if getattr(parallel, axis) > 1]
        by_axes.setdefault(" x ".join(axes), []).append(item)
    return {axes: moved_bytes(group) for axes, group in by_axes.items()}


def activation_bytes(config: Config, model: ModelConfig, mesh: dict[str, int], accumulation: float | None) -> int:
    """Returns the activations kept for the backward pass on the first pipeline stage, which holds most microbatches.

    Rows are the longest of the run. Counted as arXiv 2205.05198, section 4, tensor by tensor. With recomputation each
    layer keeps what `kept_activations` says, and one layer at a time is whole.
    """
    tp, sequence_parallel = mesh["tp"], config.parallel.sequence_parallel
    value = 4 if config.engine.precision == "fp32" else 2
    tokens = microbatch_tokens(config.train) // mesh["cp"]
    layers = kept_layers(config, model, mesh, accumulation)
    block = block_activations(model, tp, sequence_parallel)
    if config.engine.remat == "none":
        return int(tokens * value * layers * block)
    kept = kept_activations(model, tp, sequence_parallel, config.engine.remat)
    return int(tokens * value * (layers * kept + block))


def kept_layers(config: Config, model: ModelConfig, mesh: dict[str, int], accumulation: float | None) -> float:
    """Returns the layers of the first pipeline stage, times the microbatches that it holds."""
    return math.ceil(model.num_layers / mesh["pp"]) * in_flight(config.parallel, accumulation)


def in_flight(parallel: ParallelConfig, accumulation: float | None) -> float:
    """Returns how many microbatches the schedule lets the fullest pipeline rank hold activations of at a time."""
    most = parallel.pp
    if parallel.schedule == "interleaved_1f1b":  # P (v + 1) - 1 chunks of 1 / v, arXiv 2104.04473, 2.2.2
        most += (parallel.pp - 1) / parallel.virtual_stages
    return most if accumulation is None else min(most, math.ceil(accumulation))


def kept_activations(model: ModelConfig, tp: int, sequence_parallel: bool, remat: str) -> float:
    """Returns the values a token that one block keeps with recomputation.

    Full: its input. Selective: the inputs of attention and feed-forward layer and, sharded, q, k, v, attention's output
    and the results of the products in front of the activation.
    """
    hidden = model.hidden_size / (tp if sequence_parallel else 1)
    if remat == "full":
        return hidden
    return 2 * hidden + (attention_values(model) + (2 if model.gated else 1) * inner_width(model)) / tp


def block_activations(model: ModelConfig, tp: int, sequence_parallel: bool) -> float:
    """Returns the values a token that one block keeps without recomputation.

    They are its input and the norm's output, twice (whole on each rank without sequence parallelism), and, sharded: q,
    k, v, attention's output, gate, up, silu(gate) and their product. SwiGLU and grouped K/V replace the paper's GELU
    and full heads; there is no dropout, and attention scores are recomputed, not kept.
    """
    outside = 4 * model.hidden_size / (tp if sequence_parallel else 1)
    return outside + (attention_values(model) + (4 if model.gated else 2) * inner_width(model) + copies(model)) / tp


def attention_values(model: ModelConfig) -> int:
    """Returns the number of values of q, k, v and the output in all heads, a token; with latent attention also the
    latents."""
    assert model.head_dim is not None
    if model.mla is None:
        return 2 * model.head_dim * (model.num_heads + model.num_kv_heads)
    latents = (model.mla.q_rank or 0) + model.mla.kv_rank
    return 2 * model.num_heads * (model.head_dim + model.mla.v_head_dim) + latents


def inner_width(model: ModelConfig) -> float:
    """Returns the inner width of the feed-forward layers that a token passes, on average over the blocks."""
    e = model.moe
    if e is None:
        return model.ffn_size
    sparse = sum(has_experts(model, layer) for layer in range(model.num_layers)) / model.num_layers
    return sparse * (e.top_k * e.expert_ffn_size + e.shared_ffn_size) + (1 - sparse) * model.ffn_size


def copies(model: ModelConfig) -> float:
    """Returns the number of values in the copies of a token's hidden state, one for each of its experts."""
    if model.moe is None:
        return 0.0
    sparse = sum(has_experts(model, layer) for layer in range(model.num_layers)) / model.num_layers
    return sparse * model.moe.top_k * model.hidden_size


def logits_bytes(config: Config, model: ModelConfig, mesh: dict[str, int]) -> int:
    """Returns the bytes of one chunk of logits and its gradient on the last pipeline stage, on a GPU: fp32 if not
    compiled."""
    if model.head == "scalar":
        return 0
    rows, tokens = model.vocab_size // mesh["tp"], microbatch_tokens(config.train)
    value = 2 if config.engine.compile and config.engine.precision != "fp32" else 4
    return 2 * value * min(tokens // mesh["cp"], chunk_tokens(config.engine, rows, gpu=True)) * rows


def bubble_share(schedule: str, pp: int, virtual_stages: int, microbatches: float) -> float:
    """Returns the idle share of a step over the ideal time, from the start of the first rank to the end of the last.

    Pipeline stages are taken to be equal, and forward, input gradient and weight gradient to take equally long. 1F1B
    and interleaved: (P - 1) / (v m), arXiv 2104.04473, section 2.2. With a zero bubble weight gradients fill two thirds
    of it, arXiv 2401.10241, table 2 (ZB-H1); ZBV does so from 2 P - 1 microbatches on.
    """
    ideal = 3 * virtual_stages * max(1.0, microbatches)  # in units of a pipeline stage's forward
    idle = {
        "1f1b": 3 * (pp - 1),
        "interleaved_1f1b": 3 * (pp - 1),
        "interleaved_zero_bubble": pp - 1,
        "zbv": max(pp - 1, 4 * pp - 2 - 2 * microbatches),
    }
    return idle[schedule] / ideal


def main(config: Config) -> None:
    """Prints the plan of a stage, or of every training stage of a run. Raises ValueError when some cannot be planned,
    after the plans of the others; weights that are not there yet are no fault of the document, and said in its place.
    """
    faults: list[str] = []
    for recipe, staged, world_size, earlier in _stages(config):
        print(f"{staged.name} ({recipe.name})")
        try:
            lines = describe(staged, plan(staged, world_size, recipe, earlier), recipe)
        except ValueError as error:
            start, said = staged.model.init_from, str(error).splitlines()
            waits = start is not None and not os.path.exists(start)
            lines = ["cannot be planned yet", *said] if waits else ["cannot be planned"]
            faults += [] if waits else [f"{staged.name} ({recipe.name}): {line}" for line in said]
        print("\n".join(f"  {line}" for line in lines))
    if faults:
        raise ValueError("\n".join(faults))


def _stages(config: Config) -> Iterator[tuple[Recipe, Config, int, Earlier]]:
    """Yields (recipe, configuration, ranks, earlier stages) of every stage that trains."""
    if isinstance(config, RunConfig):
        for stage, staged, earlier in planned_stages(config):
            if (recipe := recipe_of(stage.command, staged)) is not None:
                yield recipe, staged, stage.ranks, earlier
    else:
        for recipe in planned_recipes(config):
            yield recipe, config, int(os.environ.get("WORLD_SIZE", least_ranks(config, recipe))), {}


def least_ranks(config: Config, recipe: Recipe) -> int:
    """Returns the smallest number of ranks that the mesh fits."""
    p = config.parallel
    return p.pp * p.dp_replicate * max(1, p.dp_shard) * p.cp * p.tp + rollout_workers(config, recipe)


def describe(config: Config, p: Plan, recipe: Recipe) -> list[str]:
    """Returns the lines of a plan as text."""
    engine, most = config.engine, "" if recipe.fixed_batch else " at most"
    axes = " x ".join(f"{axis} {size}" for axis, size in p.mesh.items())
    others = recipe.other_models(config)
    alone = f"; of the policy alone, beside it {' and '.join(others)}" if others else ""
    backend = f"ZeRO {engine.zero_stage}" if engine.backend == "deepspeed" else "FSDP2"
    return [
        f"ranks        {p.ranks}: {axes}" + (f", and {p.rollout_ranks} for rollouts" if p.rollout_ranks else ""),
        f"parameters   {p.parameters:,}, {p.parameters_per_rank:,} on the fullest rank before ZeRO or FSDP2",
        f"batch        {_batch_line(recipe.step_size(config), p)}",
        *_phase_lines(config.train),
        _total_line(config.train, p) + most,
        f"memory       {gigabytes(p.memory_bytes)} a rank: {_memory_line(p)}",
        f"             ({engine.precision}, {backend}, offload {engine.offload}, remat {engine.remat}{alone})",
        *_sent_lines(p),
        *([] if p.bubble is None else [f"bubble       {p.bubble:.1%} of the ideal time"]),
    ]


def _batch_line(size: StepSize, p: Plan) -> str:
    if p.accumulation is None:
        return size.words
    fits = "" if p.accumulation.is_integer() else " (not whole: training will refuse)"
    return f"{size.words}, accumulation {p.accumulation:g}{fits}"


def _phase_lines(train: TrainConfig) -> list[str]:
    """Returns the lines that say where batch size and row length change; none without ramps."""
    table = phases(train)
    return [_phase_line(phase, "phases" if i == 0 else "") for i, phase in enumerate(table) if len(table) > 1]


def _phase_line(phase: Phase, title: str) -> str:
    shape = f"{phase.global_batch_seqs} x {phase.seq_len} = {phase.tokens_per_step:,} tokens a step"
    theta = "" if phase.rope_theta is None else f", rope_theta {phase.rope_theta:g}"
    factor = "" if phase.rope_scaling is None else f", rope_scaling.factor {phase.rope_scaling.factor:g}"
    return f"{title:<13}from step {phase.first_step:,}, token {phase.first_token:,}: {shape}{theta}{factor}"


def _total_line(train: TrainConfig, p: Plan) -> str:
    if train.epochs is not None:
        return f"total        {train.epochs:g} epochs, whose steps follow from the number of rows"
    return f"total        {train.steps:,} steps, {p.total_tokens:,} tokens"


def _sent_lines(p: Plan) -> list[str]:
    """Returns the line that says what a ring moves over a rank's links in a step."""
    if not p.sent_bytes:
        return []
    each = ", ".join(f"{axes} {gigabytes(size)}" for axes, size in p.sent_bytes.items())
    return [f"sent         {gigabytes(sum(p.sent_bytes.values()))} a step and rank: {each}"]


def _memory_line(p: Plan) -> str:
    parts = ("weights", "gradients", "optimizer", "buffers", "activations", "attention", "logits")
    return ", ".join(f"{part} {gigabytes(getattr(p, f'{part}_bytes'))}" for part in parts)


def gigabytes(size: int) -> str:
    """Returns bytes in units of 1e9, as the papers do, of 1e12 or 1e6. Example: gigabytes(16_600_000_000) -> '16.6
    GB'"""
    if size >= 1e12:
        return f"{size / 1e12:.3g} TB"
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
