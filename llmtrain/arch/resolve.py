"""Resolves the shape of a model from presets, weights on disk and written fields, and counts its parameters."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llmtrain.arch.families import FAMILIES, family_of, presets
from llmtrain.arch.families.base import classifier_hf, head_of, key_of, without_aliases
from llmtrain.arch.parameters import (
    has_experts,
    kinds_of,
    layer_shapes,
    layer_type,
    numel,
    outer_shapes,
    padded_vocab_size,
)
from llmtrain.config.load import load
from llmtrain.config.ramp import trained_model
from llmtrain.config.schema import EngineConfig, MlaConfig, ModelConfig, MoeConfig, RunConfig, Section

SHAPE = tuple(name for name in ModelConfig.model_fields if name not in ("preset", "init_from"))
RESOLVED = set(SHAPE) - {"head"}  # written by every run; those from before `head` was there have language models
# Fields that may differ from those of the weights: they concern training, padding, or which weights are used.
FREE = ("lora", "vocab_multiple", "mtp_coef", "mtp_layers")
FREE_MOE = ("balance", "bias_rate", "aux_coef", "z_coef")


def resolve_model(model: ModelConfig, earlier: Mapping[str, ModelConfig | None] | None = None) -> ModelConfig:
    """Returns the model with every field filled in. Resolving twice gives the same model.

    Fields written by the user override those of `preset` and `family`, but may not contradict those of `init_from`
    (weights that exist). `earlier` maps run directories that do not exist yet (the earlier stages of this run) to their
    models. Raises ValueError for an unknown preset or family, unreadable weights or a contradiction.
    """
    if model.head == "scalar" and model.tie_embeddings and "tie_embeddings" in model.model_fields_set:
        raise ValueError(
            "model.tie_embeddings=true: not with model.head=scalar, whose weights [1, hidden_size] cannot be the "
            "embedding's; remove it, or set model.head=lm"
        )
    if model.model_fields_set >= RESOLVED and model.head_dim:
        return model  # resolved before: its sources need not exist any more
    if model.preset and model.init_from:
        raise ValueError(f"model.preset={model.preset}: model.init_from already gives the shape; remove model.preset")
    written = {name: getattr(model, name) for name in SHAPE if name in model.model_fields_set}
    base = {name: field.get_default() for name, field in ModelConfig.model_fields.items() if name in SHAPE}
    base |= family_of(model.family).fields
    if model.preset:
        base |= _preset(model.preset, written)
    if model.init_from:
        base |= fields_from_directory(model.init_from, earlier or {})
        _check_agreement(model.init_from, base, written)
    filled = {name: _over(base[name], written[name]) if name in written else base[name] for name in SHAPE}
    return ModelConfig(preset=model.preset, init_from=model.init_from, **_completed(filled))


def _over(base: Any, written: Any) -> Any:
    """Returns the written value laid over the base value; a section keeps the base's values of fields not written."""
    if isinstance(base, Section) and isinstance(written, Section):
        return base.model_copy(update={name: getattr(written, name) for name in written.model_fields_set})
    return written


def _completed(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields with those filled in that follow from others."""
    if fields["attention"] == "mla" and fields["mla"] is None:
        fields["mla"] = MlaConfig()
    if fields["head"] == "scalar":
        fields["tie_embeddings"] = False
    mla, types = fields["mla"], fields["layer_types"]
    if fields["attention"] == "mla" and mla is not None:
        fields["head_dim"] = mla.nope_head_dim + mla.rope_head_dim
    fields["head_dim"] = fields["head_dim"] or max(1, fields["hidden_size"] // fields["num_heads"])
    fields["vocab_size"] = padded_vocab_size(fields["vocab_size"], fields["vocab_multiple"])
    if types:
        whole = [types[i % len(types)] for i in range(fields["num_layers"])]
        fields["layer_types"] = whole if "sliding" in whole else None
    return fields


def _preset(name: str, written: Mapping[str, Any]) -> dict[str, Any]:
    known = presets()
    if name not in known:
        raise ValueError(f"model.preset={name}: is not known; choose one of {', '.join(known)}")
    family = known[name]["family"]
    if written.get("family", family) != family:
        raise ValueError(f"model.family={written['family']}: model.preset={name} is of family {family}; remove it")
    return known[name]


def _check_agreement(source: str, found: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    if written.get("head") == "scalar":  # new where the weights are a language model's
        found = {**found, "head": "scalar", "tie_embeddings": False}
    wrong = [
        f"model.{name}={value}: the weights in {source} have {there}; remove the line"
        for name, value, there in contradictions(found, written)
    ]
    if wrong:
        raise ValueError("\n".join(wrong))


def contradictions(found: Mapping[str, Any], written: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (name, written value, value of the weights) of each written field that contradicts the existing
    weights."""
    wrong = []
    for name, value in written.items():
        grown = name == "vocab_size" and value > found[name]  # rows are added, see model.vocab
        if grown or name in FREE or value == found[name] or (name == "head_dim" and value is None):
            continue
        if isinstance(value, MoeConfig) and isinstance(found[name], MoeConfig):
            parts = ((part, getattr(value, part), getattr(found[name], part)) for part in value.model_fields_set)
            wrong += [(f"moe.{part}", ours, theirs) for part, ours, theirs in parts if part not in FREE_MOE]
            wrong = [entry for entry in wrong if entry[1] != entry[2]]
        else:
            wrong.append((name, value, found[name]))
    return wrong


def fields_from_directory(directory: str, earlier: Mapping[str, ModelConfig | None]) -> dict[str, Any]:
    """Returns the shape of the weights in a Hugging Face directory (config.json) or a run directory (config.yaml)."""
    hugging_face, run = (os.path.join(directory, name) for name in ("config.json", "config.yaml"))
    if os.path.isfile(hugging_face):
        with open(hugging_face, encoding="utf-8") as file:
            return _read_hf(hugging_face, file.read())
    if os.path.isfile(run):
        return _read_run(run)
    known = {os.path.normpath(path): model for path, model in earlier.items()}.get(os.path.normpath(directory))
    if known is None:
        raise ValueError(
            f"model.init_from={directory}: has neither config.json (Hugging Face) nor config.yaml (a run); "
            "give the directory of a model or of one finished stage"
        )
    return _shape(known)


def _shape(model: ModelConfig) -> dict[str, Any]:
    """Returns the shape of the weights that a run saves, without adapters: they are merged when the weights are
    read."""
    return {name: getattr(model, name) for name in SHAPE} | {"lora": None}


def _read_hf(path: str, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
        fields = fields_from_hf(config)
        ModelConfig(**fields)  # checks types and ranges
        return fields
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(key_of(config, str(part)) for part in fault["loc"])
        raise ValueError(f"{path}: {name}={fault['input']}: {fault['msg']}; use a complete config.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}; export the model again") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a key is missing or of a wrong type ({error}); use a complete config.json") from None
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _read_run(path: str) -> dict[str, Any]:
    config = load(path, [])
    if isinstance(config, RunConfig):
        raise ValueError(f"model.init_from: {path} is a run of several stages; give the directory of one of them")
    return _shape(trained_model(resolve_model(config.model), config.train, newest_step(os.path.dirname(path))))


def newest_step(run: str) -> int:
    """Returns the step of the newest checkpoint in a run directory, 0 if there is none."""
    folder = os.path.join(run, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return max((int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name)), default=0)


def fields_from_hf(config: dict[str, Any]) -> dict[str, Any]:
    """Returns all fields of ModelConfig, read from the content of a config.json.

    Raises ValueError for a `model_type` that no family has, and for options that the decoder does not implement.
    """
    kind = config.get("model_type")
    readers = [family for family in FAMILIES.values() if family.from_hf]
    known = {theirs: family for family in readers for theirs in (family.model_type, *family.wrappers)}
    if kind not in known:
        raise ValueError(f"model_type={kind}: is not known; use a model of one of {', '.join(sorted(known))}")
    family = known[kind]
    head = head_of(config, family)
    config = without_aliases(config["text_config"] if kind in family.wrappers else config, family.aliases)
    assert family.from_hf is not None
    defaults = {name: field.get_default() for name, field in ModelConfig.model_fields.items() if name in SHAPE}
    fields = _completed({**defaults, "family": family.name, **family.fields, **family.from_hf(config), "head": head})
    if fields["positions"] == "rope" and fields["attention"] == "gqa" and fields["head_dim"] % 2:
        raise ValueError(
            f"head_dim={fields['head_dim']}: must be even, RoPE rotates pairs (without it, it is hidden_size / "
            "num_attention_heads); use another model"
        )
    return fields


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """Returns the content of config.json from which transformers (and vLLM) build this model.

    Raises ValueError if transformers has no model of this family, or its config.json cannot express a field of `model`.
    """
    m = resolve_model(model)
    family = family_of(m.family)
    if family.to_hf is None:
        raise ValueError(f"model.family={m.family}: transformers has no such model; keep the run directory instead")
    if m.mtp_layers and "mtp.*.proj" not in family.modules:
        raise ValueError(
            f"model.mtp_layers={m.mtp_layers}: family {m.family} has no names for them on disk; set model.mtp_layers=0"
        )
    if m.head == "scalar" and family.classifier is None:
        raise ValueError(
            f"model.head=scalar: transformers has no classifier of family {m.family}; keep the run directory instead"
        )
    written = {**family.to_hf(m), "model_type": family.model_type}
    written |= classifier_hf(family) if m.head == "scalar" else {}
    unused = ("ffn_size",) if all(has_experts(m, layer) for layer in range(m.num_layers)) else ()
    for name, value in fields_from_hf(written).items():
        ours = getattr(m, name)
        if isinstance(ours, MoeConfig) and isinstance(value, MoeConfig):
            ours = ours.model_copy(update={part: getattr(value, part) for part in FREE_MOE})
        if name not in (*FREE, *unused) and value != ours:
            raise ValueError(
                f"model.{name}={ours}: a config.json of family {m.family} cannot say so, it would read {value}; choose "
                "another model.family"
            )
    return written


def parameter_count(model: ModelConfig) -> int:
    """Returns the number of parameters of the whole decoder, computed from shapes; a tied head counts once.

    Multi-token prediction modules and the selection bias of routers (updated without a gradient) do not count.
    """
    m = resolve_model(model)
    kinds = kinds_of(m, range(m.num_layers))
    blocks = sum(len(layers) * numel(_weights(layer_shapes(m, layers[0]))) for layers in kinds)
    return blocks + sum(numel(shapes.values()) for shapes in outer_shapes(m))


def active_parameter_count(model: ModelConfig) -> int:
    """Returns the number of parameters that take part in computing one token: all but those of the experts not
    chosen."""
    m = resolve_model(model)
    if m.moe is None:
        return parameter_count(m)
    idle = 3 * m.hidden_size * m.moe.expert_ffn_size * (m.moe.num_experts - m.moe.top_k)
    return parameter_count(m) - idle * sum(has_experts(m, layer) for layer in range(m.num_layers))


def multiplied_parameters(model: ModelConfig) -> int:
    """Returns the number of active parameters that a token is multiplied with: embeddings are only looked up, but for
    one that is the head too."""
    m = resolve_model(model)
    looked_up = numel(outer_shapes(m)[0].values()) - (m.vocab_size * m.hidden_size if m.tie_embeddings else 0)
    return active_parameter_count(m) - looked_up


def chunk_tokens(engine: EngineConfig, rows: int, gpu: bool) -> int:
    """Returns for how many tokens logits are held at a time, each `rows` wide (this rank's part of the vocabulary).

    Every chunk but the last is computed twice, and every chunk reads and writes the whole gradient of the head, so
    fewer chunks are faster (`python -m benchmarks.pretrain --chunks 256,1024,4096`). Compiled chunks may be larger, as
    they hold no fp32 copy of the logits.
    """
    if engine.logprob_chunk_tokens is not None:
        return engine.logprob_chunk_tokens
    if not gpu:
        return max(64, 2 ** (26 if engine.compile else 24) // rows)
    return max(1024, 2 ** (29 if engine.compile else 28) // rows)


def train_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Returns the FLOPs of a forward and backward pass per token (arXiv 2204.02311, appendix B).

    They are 6 for each active parameter that is multiplied (embeddings are only looked up), and attention over half of
    the row or of its window. Multi-token prediction modules are not counted.
    """
    m = resolve_model(model)
    assert m.head_dim is not None
    value_dim = m.mla.v_head_dim if m.attention == "mla" and m.mla else m.head_dim
    pairs = 0.0
    for layer in range(m.num_layers):
        window = m.sliding_window if layer_type(m, layer) == "sliding" and m.sliding_window else seq_len
        window = min(window, seq_len)
        pairs += window - window * (window - 1) / (2 * seq_len)  # keys that a query sees, on average
    return 6 * multiplied_parameters(m) + 6 * m.num_heads * (m.head_dim + value_dim) * pairs


def _weights(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [shape for name, shape in shapes.items() if not name.endswith("router.bias")]
