"""Exports any weights as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmtrain.arch.adapters import without_adapters
from llmtrain.checkpoint.source import weight_source
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import parameter_shapes
from llmtrain.model.hf_write import save_hf


def export(
    source: str,
    directory: str,
    config: ModelConfig,
    tokenizer_dir: str | None,
    eos_id: int | list[int] | None,
    dtype: torch.dtype,
    pad_id: int | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes the weights of `source` (see `weight_source`) to `directory` as transformers reads them, one at a time.

    Raises ValueError as `weight_source` does.
    """
    config = without_adapters(config)
    weight = weight_source(source, config)
    weights = ((name, weight(name)) for name in parameter_shapes(config))
    save_hf(
        directory, config, weights, dtype, tokenizer_dir, eos_id, pad_id=pad_id, generation=generation, source=source
    )
