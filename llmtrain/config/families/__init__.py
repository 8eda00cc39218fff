"""Model families: one file each, registered when it is imported."""

from __future__ import annotations

from llmtrain.config.families import llama
from llmtrain.config.families.base import FAMILIES, Disk, Family, family_of, presets, register

BUILT_IN = (llama.FAMILY,)
for _family in BUILT_IN:
    register(_family)

__all__ = ["BUILT_IN", "FAMILIES", "Disk", "Family", "family_of", "presets", "register"]
