"""Computes what a rank holds while the models of a step take turns: sampling, scoring, updating.

    sampling   the generator's whole model, its KV cache, a prompt's forward; the trainer's states wait beside it
    scoring    a frozen model with one block's weights whole, the policy's own log-probs; no gradients
    updating   policy or critic, as a training step; the other models wait

Frozen models (a reference, teachers) are sharded over all ranks in the compute precision; those that wait in host
memory (`reference_waits`, `teachers_wait`, `wait_on_host`) count in their own turn alone. The KV cache is freed when
sampling ends. Lengths are the longest there can be: rows of `train.seq_len` tokens, completions of
`rollout.max_new_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.arch.attention import cache_row, round_up
from llmtrain.arch.parameters import numel
from llmtrain.arch.resolve import parameter_count, resolve_model
from llmtrain.arch.start import with_scalar_head
from llmtrain.config.recipes import Recipe
from llmtrain.config.schema import Config, ModelConfig, ParallelConfig
from llmtrain.rules.case import Earlier
from llmtrain.scaling.activations import block_activations, logits_bytes
from llmtrain.scaling.memory import Memory, fullest_memory, rank_states
from llmtrain.scaling.parts import block_shapes, rank_shapes, value_bytes
from llmtrain.scaling.plan import Plan

PREFILL_TOKENS = 8192  # prompt tokens in one forward of the generator, as `rollout.native` has it
WAITING = ("reference_waits", "teachers_wait", "wait_on_host")  # keys of recipes

Turn = dict[str, int]
"""Maps the parts of a rank's memory to bytes."""


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
    sampling = sampling_turn(config, model, recipe, p) if recipe.samples else {}
    generator = {"generator": sampling["generator"]} if recipe.samples and not p.rollout_ranks else {}
    turns = {}
    if recipe.samples:
        turns["rollout workers" if p.rollout_ranks else "sampling"] = sampling if p.rollout_ranks else held | sampling
    if models.frozen or recipe.samples:
        turns["scoring"] = held | generator | {"frozen models": frozen} | scoring_turn(config, models, model, p)
    turns["updating"] = held | generator | updating_turn(p)
    if critics:
        turns["updating the critic"] = held | generator | critic_turn(critics)
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


def sampling_turn(config: Config, model: ModelConfig, recipe: Recipe, p: Plan) -> Turn:
    """Returns what the generator holds: a whole model without adapters, its cache, one forward over prompts."""
    value, slots = value_bytes(config.engine), slots_of(config, recipe, p)
    tokens = min(PREFILL_TOKENS, slots * config.train.seq_len)
    whole = model.model_copy(update={"lora": None})
    return {
        "generator": value * parameter_count(whole),
        "KV cache": kv_cache_bytes(whole, slots, round_up(config.train.seq_len), value),
        "prompts": int(value * tokens * block_activations(whole, 1, False)) + 2 * 4 * slots * whole.vocab_size,
    }


def unplanned(config: Config) -> str | None:
    """Returns what samples in a way that the plan has no memory, messages or time of; None: nothing does."""
    r = config.rollout
    if r.placement == "ahead":
        return f"rollout.placement=ahead: {r.workers} processes beside the ranks sample while these train"
    if r.generator != "native":
        return f"rollout.generator={r.generator}: a server of its own holds the sampled model, its cache and its ranks"
    return None


def slots_of(config: Config, recipe: Recipe, p: Plan) -> int:
    """Returns the sequences that one rank decodes together; prompts are dealt out with all their samples."""
    r, sampling = config.rollout, p.rollout_ranks or p.ranks
    return min(r.max_batch_seqs, -(-recipe.step_size(config).prompts // sampling) * r.group_size)


def kv_cache_bytes(model: ModelConfig, seqs: int, tokens: int, value: int) -> int:
    """Returns the bytes of the KV cache of `seqs` sequences of at most `tokens`. `model` is resolved."""
    rows = (cache_row(model, layer, tokens) for layer in range(model.num_layers))
    return seqs * value * sum(row.heads * (row.key_dim + row.value_dim) * row.tokens for row in rows)


def scoring_turn(config: Config, models: Models, model: ModelConfig, p: Plan) -> Turn:
    """Returns what a forward without gradients takes beside the shards: weights and activations of a block, logits."""
    value, tp = value_bytes(config.engine), p.mesh["tp"]
    blocks = [numel(block_shapes(each, each.num_layers - 1, tp)) for each in (*models.frozen, model)]
    block = block_activations(model, tp, config.parallel.sequence_parallel)
    rows = config.train.micro_batch_tokens or config.train.micro_batch_seqs * config.train.seq_len
    return {
        "gathered": 2 * value * max(blocks),
        "activations": int(value * rows // p.mesh["cp"] * block),
        "logits": logits_bytes(config, model, p.mesh) // 2,
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
