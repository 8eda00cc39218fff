"""Exports the adapters of a run as a directory that `peft.PeftModel.from_pretrained` loads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import save_file

from llmtrain.arch.adapters import adapter_shapes, without_adapters
from llmtrain.arch.families import family_of
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import MANIFEST
from llmtrain.checkpoint.source import locate
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import parameter_shapes
from llmtrain.observe.owned import replacing

LEAVES = {"a": "lora_A", "b": "lora_B"}  # our names -> those of peft


def export_adapters(source: str, directory: str, dtype: torch.dtype) -> None:
    """Writes the adapters of a run or checkpoint: adapter_model.safetensors and adapter_config.json.

    Raises ValueError as `locate` does; when `source` has no adapters; when an adapted weight is only a part of a tensor
    in the family's Hugging Face form; and when the base weights do not exist as a Hugging Face directory.
    """
    place = locate(source)
    reader = CheckpointReader(place) if os.path.isfile(os.path.join(place, MANIFEST)) else None
    saved = {} if reader is None else reader.state.get("model", {})
    if reader is None or not saved.get("lora"):
        raise ValueError(f"export.adapter=true: {place} holds a whole model and no adapters; set export.adapter=false")
    model = ModelConfig.model_validate(saved)
    names = peft_names(model)
    config = adapter_config(model, base_directory(model))
    with replacing(directory, "llmtrain export (adapter)", place) as target:
        tensors = {theirs: reader.full(ours).to(dtype).contiguous() for ours, theirs in names.items()}
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def peft_names(model: ModelConfig) -> dict[str, str]:
    """Returns our name of each adapter's matrix -> peft's name.

    Raises ValueError where the adapted weight is only a part of a stored tensor, or the family has no Hugging Face
    form.
    """
    if family_of(model.family).to_hf is None:
        raise ValueError(
            f"export.adapter=true: model.family={model.family}: transformers has no such model, so peft cannot put "
            "adapters on it; keep the run directory instead"
        )
    names = {}
    for name in adapter_shapes(model):
        projection, leaf = name[: -len(".lora.a")], name[-1]
        disk = family_of(model.family).where(f"{projection}.weight", model)
        if disk.part or disk.stacked or len(disk.names) > 1:
            raise ValueError(
                f"export.adapter=true: {projection} is a part of {disk.names[0]} in a model of family {model.family}, "
                "where peft has no adapter for it alone; set export.adapter=false, which merges"
            )
        module = disk.names[0].removesuffix(".weight")
        names[name] = f"base_model.model.{module}.{LEAVES[leaf]}.weight"
    return names


def adapter_config(model: ModelConfig, base: str) -> dict[str, Any]:
    """Returns the content of adapter_config.json."""
    lora, family = model.lora, family_of(model.family)
    assert lora is not None
    targeted = {name[: -len(".lora.a")] for name in adapter_shapes(model)}
    modules: dict[bool, list[str]] = {True: [], False: []}  # Hugging Face names of modules with an adapter and without
    transposed = False
    for name in parameter_shapes(without_adapters(model)):
        disk, projection = family.where(name, model), name.removesuffix(".weight")
        modules[projection in targeted] += [theirs.removesuffix(".weight") for theirs in disk.names]
        transposed = transposed or (projection in targeted and disk.transpose)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "target_modules": distinguishing(modules[True], modules[False]),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }


def distinguishing(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """Returns the shortest suffixes of module names that match all `wanted` ones and none of the others.

    Example: (h.0.attn.c_proj) among (h.0.mlp.c_proj, h.0.mlp.c_fc) -> [attn.c_proj]
    """
    parts, others = [name.split(".") for name in wanted], list(others)
    for depth in range(1, max(map(len, parts)) + 1):
        ends = sorted({".".join(part[-depth:]) for part in parts})
        if not any(f".{other}".endswith(tuple(f".{end}" for end in ends)) for other in others):
            break
    return ends


def base_directory(model: ModelConfig) -> str:
    """Returns the Hugging Face directory of the weights that adapters were trained on: `init_from`, or that run's
    export."""
    base = str(model.init_from)
    for directory in (base, os.path.join(base, "export")):
        if os.path.isfile(os.path.join(directory, "config.json")):
            return directory
    raise ValueError(
        f"export.adapter=true: peft puts adapters on a Hugging Face directory, and {base} is a run without export/; "
        f"run `llmtrain export` with model.init_from={base} first"
    )
