"""Turns a validation fault into an error message: the place, the rule, and the key or value that was probably meant."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from llmtrain.config.document import Document, Keys, dotted

# What other frameworks call our keys; difflib would not find these.
SYNONYMS = {
    "tensor": "tp",
    "tensor_parallel": "tp",
    "tensor_parallel_size": "tp",
    "pipeline": "pp",
    "pipeline_parallel": "pp",
    "pipeline_parallel_size": "pp",
    "context": "cp",
    "context_parallel": "cp",
    "expert": "ep",
    "expert_parallel": "ep",
    "data_parallel": "dp_shard",
    "dp": "dp_shard",
    "learning_rate": "lr",
    "beta": "betas",
    "max_grad_norm": "grad_clip",
    "gradient_clipping": "grad_clip",
    "warmup": "warmup_steps",
    "zero": "zero_stage",
    "stage": "zero_stage",
    "dtype": "precision",
    "activation_checkpointing": "remat",
    "gradient_checkpointing": "remat",
    "recompute": "remat",
    "max_steps": "steps",
    "iterations": "steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "packing": "pack",
    "sequence_length": "seq_len",
    "max_seq_len": "seq_len",
    "context_length": "seq_len",
    "batch_size": "global_batch_seqs",
    "global_batch_size": "global_batch_seqs",
    "micro_batch_size": "micro_batch_seqs",
    "n_layers": "num_layers",
    "num_hidden_layers": "num_layers",
    "d_model": "hidden_size",
    "intermediate_size": "ffn_size",
    "n_heads": "num_heads",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "max_position_embeddings": "max_positions",
}


def explain(schema: type[BaseModel], document: Document, fault: dict[str, Any], prefix: Keys) -> str:
    """Returns one line for one fault that pydantic found at `fault["loc"]` of `schema`, written below `prefix`."""
    keys = (*prefix, *fault["loc"])
    if prefix and keys not in document.where:
        keys = fault["loc"]
    start = f"{document.place(keys)}: {dotted(document.as_written(keys))}"
    if fault["type"] == "extra_forbidden":
        near = nearest(schema, fault["loc"])
        if near is None:
            return f"{start}: unknown key; remove it"
        return f"{start}: unknown key, did you mean {dotted(document.as_written(near))}?"
    if fault["type"] == "missing":
        return f"{start}: is missing; add it"
    return f"{start}: value {_short(fault['input'])}: {_rule(fault)}{_example(schema, fault['loc'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _rule(fault: dict[str, Any]) -> str:
    kind = fault["type"]
    rules = {
        "int": "must be a whole number",
        "float": "must be a number",
        "bool": "must be true or false",
        "string": "must be text; put quotes around it",
        "list": "must be a list",
        "tuple": "must be a list",
        "dict": "must be a section of keys",
        "model": "must be a section of keys",
    }
    if kind == "literal_error":
        return f"must be one of {fault['ctx']['expected']}"
    if kind.endswith(("_type", "_parsing", "_from_float")):
        return rules.get(kind.split("_")[0], fault["msg"])
    return fault["msg"].removeprefix("Value error, ").replace("Input should", "must")


def _example(schema: type[BaseModel], keys: Keys) -> str:
    """Returns the default as a remedy, where there is one to show."""
    model = _section(schema, keys[:-1])
    known = model.model_fields.get(str(keys[-1])) if model else None
    default = known.get_default(call_default_factory=True) if known and not known.is_required() else None
    if default is None or isinstance(default, BaseModel | list):
        return ""
    shown = list(default) if isinstance(default, tuple) else default
    return f". The default is {json.dumps(shown)}"


def _section(schema: type[BaseModel], keys: Keys) -> type[BaseModel] | None:
    """Returns the model that describes `keys`; numbers (entries of lists) are skipped."""
    for key in keys:
        if isinstance(key, str):
            known = schema.model_fields.get(key)
            schema = next(_models(known.annotation), None) if known else None
            if schema is None:
                return None
    return schema


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yields the models inside an annotation such as `list[SourceConfig]` or `RopeScaling | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def nearest(schema: type[BaseModel], keys: Keys) -> Keys | None:
    """Returns the known key that the user most likely meant by the unknown one `keys`.

    It tries in this order: a synonym or similar name in the same section, the same name in another, a similar name
    anywhere.
    """
    word = str(keys[-1])
    meant = SYNONYMS.get(word, word)
    section = _section(schema, keys[:-1])
    siblings = list(section.model_fields) if section else []
    elsewhere = sorted((p for p in _leaves(schema) if p[-1] == meant and not _section(schema, p)), key=len)
    if meant not in siblings and elsewhere and len(elsewhere[0]) < min(map(len, elsewhere[1:]), default=99):
        return elsewhere[0]
    if close := [meant] if meant in siblings else difflib.get_close_matches(word, siblings, 1):
        return (*keys[:-1], close[0])
    names = {path[-1]: path for path in _leaves(schema)}
    return next((names[n] for n in difflib.get_close_matches(word, names, 1, 0.75)), None)


def _leaves(schema: type[BaseModel], keys: Keys = ()) -> Iterator[Keys]:
    for name, known in schema.model_fields.items():
        inner = next(_models(known.annotation), None)
        yield (*keys, name)
        if inner is not None:
            yield from _leaves(inner, (*keys, name))
