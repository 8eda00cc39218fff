"""Registers the built-in model families, one file each."""

from __future__ import annotations

from llmtrain.arch.families import deepseek, gemma, gpt2, llama, mixtral, palm, qwen, qwen_moe
from llmtrain.arch.families.base import FAMILIES, Disk, Family, family_of, presets, register

BUILT_IN = (
    llama.FAMILY,
    mixtral.FAMILY,
    qwen_moe.FAMILY,
    gpt2.FAMILY,
    palm.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    gemma.GEMMA2,
    gemma.GEMMA3,
    deepseek.V2,
    deepseek.V3,
)
for _family in BUILT_IN:
    register(_family)

__all__ = ["BUILT_IN", "FAMILIES", "Disk", "Family", "family_of", "presets", "register"]
