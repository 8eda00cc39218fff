"""Computes what a rank holds while the models of a step take turns: sampling, scoring, updating.

    sampling   what samples, see `scaling.sampler`; the trainer's states wait beside it, or it has ranks of its own
    scoring    a frozen model with one block's weights whole, the policy's own log-probs; no gradients
    updating   policy or critic, as a training step; the other models wait

Frozen models (a reference, teachers) are sharded over all ranks in the compute precision; those that wait in host
memory (`reference_waits`, `teachers_wait`, `wait_on_host`) count in their own turn alone. Lengths are the longest there
can be: rows of `train.seq_len` tokens, completions of `rollout.max_new_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.arch.parameters import numel
from llmtrain.arch.resolve import resolve_model
from llmtrain.arch.start import with_scalar_head
from llmtrain.config.plan import HardwareConfig
from llmtrain.config.recipes import Recipe
from llmtrain.config.schema import Config, ModelConfig, ParallelConfig
from llmtrain.rules.case import Earlier
from llmtrain.scaling.activations import block_activations, logits_bytes
from llmtrain.scaling.memory import Memory, fullest_memory, rank_states
from llmtrain.scaling.parts import block_shapes, rank_shapes, value_bytes
from llmtrain.scaling.plan import Plan
from llmtrain.scaling.sampler import Turn, sampler_in_step

WAITING = ("reference_waits", "teachers_wait", "wait_on_host")  # keys of recipes


@dataclass(frozen=True)
class Models:
    """Holds the models of a job beside the policy, resolved."""

    frozen: list[ModelConfig]  # references and teachers, which score
    critics: list[ModelConfig]  # trained too


def other_models(config: Config, model: ModelConfig, recipe: Recipe, earlier: Earlier) -> Models:
    """Returns the models that a recipe has beside the policy.

    Those without a directory of their own have the policy's body: a reference, a critic. Raises ValueError when a
    directory is not there yet.
    """
    paths = dict(recipe.weights(config))
    own = {key: resolve_model(ModelConfig(init_from=path), earlier) for key, path in paths.items()}
    critics = [with_scalar_head(own.get(key, model)) for key in recipe.values]
    frozen = [each for key, each in own.items() if key not in recipe.values]
    references = len(recipe.other_models(config)) - len(frozen) - len(critics)
    return Models([*frozen, *[model.model_copy(update={"lora": None})] * references], critics)


def takes_turns(recipe: Recipe, models: Models) -> bool:
    """Tells whether a step has more turns than updates of a fixed number of rows: its lengths are not known, or other
    models take part."""
    return not recipe.fixed_batch or bool(models.frozen or models.critics)


def turns_of(config: Config, model: ModelConfig, recipe: Recipe, p: Plan, models: Models) -> dict[str, Turn]:
    """Returns the memory of the fullest rank in each turn, by part; of rollout workers, if there are, in a turn of
    their own. Empty for a recipe that neither samples nor has other models."""
    if not recipe.samples and not models.frozen and not models.critics:
        return {}
    parallel = config.parallel.model_copy(update=p.mesh)
    critics = [critic_memory(config, each, parallel_of(each, model, parallel)) for each in models.critics]
    frozen = sum(frozen_bytes(each, parallel, value_bytes(config.engine)) for each in models.frozen)
    held = {"policy": p.memory.weights + p.memory.optimizer}
    if not waits(config, recipe):
        held |= {"frozen models": frozen, "critics": sum(each.weights + each.optimizer for each in critics)}
    turns, rest = {}, {}
    sampler = sampler_in_step(config, model, recipe, p.sampling_ranks, p.hardware)
    if sampler is not None and p.rollout_ranks:
        turns["rollout workers"] = sampler.memory()
    elif sampler is not None:
        turns["sampling"], rest = held | sampler.memory(), sampler.resting()
    if models.frozen or recipe.samples:
        scoring = scoring_turn(config, [*models.frozen, model], model, p.mesh)
        turns["scoring"] = held | rest | {"frozen models": frozen} | scoring
    turns["updating"] = held | rest | updating_turn(p)
    if critics:
        turns["updating the critic"] = held | rest | critic_turn(critics)
    return {name: {part: size for part, size in turn.items() if size} for name, turn in turns.items()}


def parallel_of(model: ModelConfig, policy: ModelConfig, parallel: ParallelConfig) -> ParallelConfig:
    """Returns the layout of a model beside the policy, whose own layers `stage_layers` counts."""
    return parallel if model.num_layers == policy.num_layers else parallel.model_copy(update={"stage_layers": None})


def waits(config: Config, recipe: Recipe) -> bool:
    """Tells whether the other models lie in host memory while they have nothing to do."""
    section = getattr(config, recipe.name, None)
    return any(getattr(section, key, False) for key in WAITING)


def frozen_bytes(model: ModelConfig, parallel: ParallelConfig, value: int) -> int:
    """Returns the bytes of a frozen model's shard on the fullest rank."""
    layout = parallel.model_copy(update={"stage_layers": None})
    whole = max(numel(rank_shapes(model, layout, rank)) for rank in range(parallel.pp))
    return value * -(-whole // (parallel.dp_replicate * parallel.dp_shard * parallel.cp))


def unplanned(config: Config, recipe: Recipe, ranks: int, hardware: HardwareConfig | None) -> str | None:
    """Returns what samples in a way that a plan has no memory or time of; None: nothing does. `ranks`: with processes
    that sample ahead."""
    r = config.rollout
    if not recipe.samples or r.replay is not None:
        return None
    if r.generator == "vllm" and r.tp > 1:
        return f"rollout.tp={r.tp}: which GPUs the processes of a server take is not known; plan with rollout.tp=1"
    if r.placement != "ahead" or hardware is None:
        return None
    if hardware.device == "cpu":
        return f"rollout.placement=ahead: {r.workers} processes take cores from the trainers, and how much is not known"
    if ranks > hardware.gpus_per_node:
        return (
            f"rollout.workers={r.workers}: what samples ahead is planned on one machine, whose "
            f"{hardware.gpus_per_node} GPUs are too few for it and {ranks - r.workers} trainers, and how long it takes "
            "on shared GPUs is not known; lower plan.gpus or workers, or use separate"
        )
    return None


def scoring_turn(config: Config, scoring: Sequence[ModelConfig], model: ModelConfig, mesh: dict[str, int]) -> Turn:
    """Returns what a forward without gradients takes beside the shards of the models that score: weights and
    activations of a block, logits."""
    value, tp = value_bytes(config.engine), mesh["tp"]
    blocks = [numel(block_shapes(each, each.num_layers - 1, tp)) for each in scoring]
    block = block_activations(model, tp, config.parallel.sequence_parallel)
    rows = config.train.micro_batch_tokens or config.train.micro_batch_seqs * config.train.seq_len
    return {
        "gathered": 2 * value * max(blocks),
        "activations": int(value * rows // mesh["cp"] * block),
        "logits": logits_bytes(config, model, mesh) // 2,
    }


UPDATING = ("gradients", "buffers", "activations", "attention", "logits")


def updating_turn(p: Plan) -> Turn:
    """Returns what an update of the policy takes beside its weights and optimizer state."""
    return {part: getattr(p.memory, part) for part in UPDATING}


def critic_memory(config: Config, critic: ModelConfig, parallel: ParallelConfig) -> Memory:
    """Returns what a critic takes at the fullest moment of its update."""
    return fullest_memory(config, critic, parallel, None, rank_states(config, critic, parallel, None))


def critic_turn(critics: list[Memory]) -> Turn:
    """Returns what an update of the largest critic takes, beside the states of all."""
    largest = max(critics, key=lambda each: each.total)
    states = sum(each.weights + each.optimizer for each in critics)
    return {"critics": states, **{part: getattr(largest, part) for part in UPDATING}}


def heaviest(turns: dict[str, Turn]) -> tuple[str, int]:
    """Returns the turn that takes most, and its bytes."""
    name = max(turns, key=lambda turn: sum(turns[turn].values()))
    return name, sum(turns[name].values())
