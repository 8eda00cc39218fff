"""Implements `llmtrain export`: writes a run's newest checkpoint as a Hugging Face directory, or its adapters for
peft."""

from __future__ import annotations

import os

import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.adapters import export_adapters
from llmtrain.checkpoint.export import export
from llmtrain.commands.weights import home, of_own_run
from llmtrain.config.schema import Config
from llmtrain.data.ends import generation_settings
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.observe.log import log
from llmtrain.trainer.job import tokenizer_dir

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(config: Config) -> None:
    """Runs the command as ExportConfig says."""
    config = of_own_run(config)
    source = config.model.init_from or config.directory
    dtype = DTYPES[config.export.dtype]
    if config.export.adapter:
        target = config.export.path or os.path.join(home(source), "adapter")
        export_adapters(source, target, dtype)
        log(f"adapters of {source}, for peft, in {target}")
        return
    target = config.export.path or os.path.join(home(source), "export")
    tokenizer = load_tokenizer(tokenizer_dir(config))
    model = resolve_model(config.model)
    generation = generation_settings(tokenizer, (source, tokenizer_dir(config)))
    eos_id = generation["eos_token_id"]
    export(source, target, model, tokenizer_dir(config), eos_id, dtype, tokenizer.pad_id, generation)
    log(f"Hugging Face model of {source} in {target}")
