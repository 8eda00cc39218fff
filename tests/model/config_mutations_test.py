"""Draws changes of a config.json: transformers and we read the same model, or we refuse it and name what was changed.

What transformers itself cannot load may be refused in any words, as long as it is a ValueError.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from tests.model.directories import BASES, TOLERANCE, our_logits, their_logits, write_config, write_model

NOT_THE_MODEL = {
    *("transformers_version", "architectures", "output_hidden_states", "return_dict", "id2label", "label2id"),
    *("problem_type", "chunk_size_feed_forward", "initializer_range", "use_cache", "output_router_logits", "dtype"),
    *("router_aux_loss_coef", "bos_token_id", "eos_token_id", "pad_token_id", "is_encoder_decoder"),
}
OTHER_KEYS = (  # of any model, old or new
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rope_interleave", "rotary_dim"),
    *("original_max_position_embeddings", "sliding_window", "sliding_window_pattern", "use_sliding_window"),
    *("max_window_layers", "layer_types", "attention_chunk_size", "no_rope_layers", "is_causal", "use_mrope"),
    *("head_dim", "qk_head_dim", "attention_bias", "mlp_bias", "qkv_bias", "use_qk_norm", "parallel_attn", "alibi"),
    *("num_experts", "num_local_experts", "norm_topk_prob", "scoring_func", "topk_method", "moe_layer_freq"),
    *("attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "embedding_multiplier", "torch_dtype"),
    *("attention_multiplier", "residual_multiplier", "attn_temperature_tuning", "num_nextn_predict_layers"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "n_embd", "n_ctx", "pretraining_tp", "rms_norm_eps"),
    "hidden_act",
)
ROPE = ("rope_parameters", "rope_scaling", "rope_theta")  # drawn more often
KEPT = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers", "n_embd", "n_layer")  # the defaults are large
WORDS = (
    *("gelu", "relu", "silu", "gelu_new", "gelu_pytorch_tanh", "softmax", "sigmoid", "greedy"),
    *("group_limited_greedy", "noaux_tc", "mish", "quick_gelu", "swish"),
)
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", None)
LAYERS = (
    ["full_attention"] * 3,
    ["sliding_attention", "full_attention", "sliding_attention"],
    ["sliding_attention"] * 3,
    ["full_attention"] * 2,
    ["chunked_attention"] * 3,
    None,
)
ROPE_VALUES: dict[str, tuple[float, tuple]] = {  # key: how often it is there, its values
    "factor": (0.85, (1.0, 2.0, 4.0, 8.0, 2)),
    "rope_theta": (0.5, (100.0, 10000.0, 500.0, 1e6)),
    "original_max_position_embeddings": (0.6, (16, 32, 64, 128)),
    "low_freq_factor": (0.7, (1.0, 2.0)),
    "high_freq_factor": (0.7, (4.0, 8.0)),
    "beta_fast": (0.3, (32, 16, 8.0)),
    "beta_slow": (0.3, (1, 2.0)),
    "mscale": (0.3, (1.0, 0.7, 0)),
    "mscale_all_dim": (0.3, (1.0, 0.7, 0)),
    "attention_factor": (0.15, (1.0, 0.5, None)),
    "truncate": (0.15, (True, False)),
    "partial_rotary_factor": (0.1, (0.5, 1.0)),
}


def rope(draw: random.Random) -> dict[str, Any]:
    kind = draw.choice(KINDS)
    drawn = {"rope_type": kind} if draw.random() < 0.85 else {}
    if draw.random() < 0.4:
        drawn["type"] = kind if draw.random() < 0.6 else draw.choice(KINDS)
    return drawn | {name: draw.choice(values) for name, (share, values) in ROPE_VALUES.items() if draw.random() < share}


def nested_rope(draw: random.Random) -> dict[str, Any]:
    kinds = [kind for kind in ("full_attention", "sliding_attention") if draw.random() < 0.85]
    return {kind: rope(draw) if draw.random() < 0.8 else None for kind in kinds}


def value(draw: random.Random, name: str, now: Any) -> Any:
    """Draws a value of the kind that the key has now."""
    if name == "rope_parameters":
        return draw.choice((rope, rope, nested_rope, lambda draw: None))(draw)
    if name == "rope_scaling":
        return rope(draw) if draw.random() < 0.85 else None
    if name in ("rope_theta", "rope_local_base_freq"):
        return draw.choice((77.0, 500.0, 10000, 1e6, None))
    if name == "layer_types":
        return draw.choice(LAYERS)
    if name in ("num_hidden_layers", "n_layer"):  # more of them enlarge rounding
        return draw.choice((1, 2, 3, 4, 6, None))
    choices = {
        bool: (True, False, None),
        int: (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 64, None),
        float: (0.0, 1e-2, 1e-5, 0.5, 1.0, 2.0, 30.0, None),
        str: WORDS,
        list: ([], [0], [1, 2], None),
    }
    return draw.choice(choices.get(type(now), (None, True, False, 1, 2, 8, 0.5, 30.0, "silu", "gelu", 16)))


def mutated(kind: str, seed: int) -> tuple[dict[str, Any], set[str]]:
    """Returns a config, and the keys of it that were changed or taken out."""
    draw, config, changed = random.Random(f"{kind}/{seed}"), {"model_type": kind, **BASES[kind]}, set()
    known = AutoConfig.for_model(kind)
    names = sorted({field.name for field in dataclasses.fields(known)} | set(OTHER_KEYS)) + list(ROPE) * 3
    names = [name for name in names if name not in NOT_THE_MODEL and not (kind == "gpt2" and name in ROPE)]
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3))):
        name = draw.choice(names)
        changed.add(name)
        if name in config and name not in KEPT and draw.random() < 0.15:
            del config[name]
        else:
            config[name] = value(draw, name, config.get(name, getattr(known, name, None)))
    return config, changed


def words(config: dict[str, Any], changed: set[str]) -> set[str]:
    """Returns the changed keys, and those inside them."""
    inner = [config[name] for name in changed if isinstance(config.get(name), dict)]
    inner += [each for outer in inner for each in outer.values() if isinstance(each, dict)]
    return changed | {name for each in inner for name in each}


def check(kind: str, seed: int, directory: Path) -> None:
    config, changed = mutated(kind, seed)
    try:
        write_model(directory, config)
        theirs = their_logits(directory, config)
        loaded = bool(theirs.isfinite().all())
    except Exception:  # whatever a library raises for a config that it cannot build
        loaded = False
    write_config(directory, config)
    if not loaded:
        try:
            resolve_model(ModelConfig(init_from=str(directory)))
        except ValueError as error:
            assert "\n" not in str(error)
        return
    try:
        ours = our_logits(directory, config)
    except ValueError as error:
        assert any(name in str(error) for name in words(config, changed)), (changed, error)
    else:
        assert (ours - theirs).abs().max() < TOLERANCE, {name: config.get(name) for name in changed}


@pytest.mark.parametrize("kind", BASES)
def test_the_same_model_or_a_word_on_what_was_changed(kind: str, tmp_path: Path) -> None:
    for seed in range(5):
        check(kind, seed, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", BASES)
def test_many_changes(kind: str, tmp_path: Path) -> None:
    for seed in range(5, 85):
        check(kind, seed, tmp_path / str(seed))
