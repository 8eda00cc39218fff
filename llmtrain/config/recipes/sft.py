"""Describes supervised fine-tuning."""

from llmtrain.config.recipes.base import Recipe

RECIPE = Recipe(
    name="sft",
    summary="train on the answers of demonstrations (starts under torchrun too)",
    main="llmtrain.recipes.sft:main",
)
