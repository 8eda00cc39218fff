"""Estimates how long a step takes whose models take turns: sampling, scoring, updating, one after the other.

Lengths are the longest there can be, so that real steps are shorter. Sampling reads the weights and the cache once a
token (or computes, where that takes longer). Everything else runs at the same share of the peak as a training step;
messages, rewards and the sync of weights are left out.
"""

from __future__ import annotations

from llmtrain.arch.hardware import peak_flops
from llmtrain.arch.resolve import active_parameter_count, parameter_count
from llmtrain.config.recipes import Recipe
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.scaling.plan import Plan
from llmtrain.scaling.steptime import REACHED
from llmtrain.scaling.turns import Models, kv_cache_bytes, slots_of, value_bytes
from llmtrain.scaling.work import work_of


def turn_seconds(config: Config, model: ModelConfig, recipe: Recipe, p: Plan, models: Models) -> dict[str, float]:
    """Returns the seconds of each turn of a step."""
    assert p.hardware is not None
    rate = peak_flops(p.hardware, config.engine.precision) * (p.hardware.reached_share or REACHED)
    trainers, tokens = p.ranks - p.rollout_ranks, scored_tokens(config, recipe)
    seconds = {"sampling": sampling_seconds(config, model, recipe, p, rate)} if recipe.samples else {}
    scorers = [*models.frozen, *([model] if recipe.samples else []), *models.critics]
    if scorers:
        forwards = sum(_forward(config, each) for each in scorers)
        seconds["scoring"] = tokens * forwards / (trainers * rate)
    trained = sum(work_of(each, config.train.seq_len, config.engine).hardware for each in (model, *models.critics))
    seconds["updating"] = epochs_of(config, recipe) * tokens * trained / (trainers * rate)
    return seconds


def _forward(config: Config, model: ModelConfig) -> float:
    work = work_of(model, config.train.seq_len, config.engine)
    return work.blocks + work.attention + work.head


def epochs_of(config: Config, recipe: Recipe) -> int:
    """Returns how often what a step has sampled is gone through."""
    return getattr(getattr(config, recipe.name, None), "epochs", 1)


def scored_tokens(config: Config, recipe: Recipe) -> int:
    """Returns the most tokens of a step that models score and are trained on: completions, and each prompt once."""
    size, r = recipe.step_size(config).tokens, config.rollout
    if not recipe.samples:
        return size
    prompts = -(-size // (r.group_size * r.max_new_tokens))
    return size + prompts * max(0, config.train.seq_len - r.max_new_tokens)


def sampling_seconds(config: Config, model: ModelConfig, recipe: Recipe, p: Plan, rate: float) -> float:
    """Returns the seconds until one rank has sampled its share, all completions being as long as they may."""
    assert p.hardware is not None
    r, slots, value = config.rollout, slots_of(config, recipe, p), value_bytes(config)
    seqs = recipe.step_size(config).tokens // r.max_new_tokens
    rounds = -(-seqs // (slots * (p.rollout_ranks or p.ranks)))
    read = value * parameter_count(model) + kv_cache_bytes(model, slots, config.train.seq_len, value)
    each = max(read / (p.hardware.memory_gb_per_s * 1e9), slots * 2 * active_parameter_count(model) / rate)
    return rounds * r.max_new_tokens * each
