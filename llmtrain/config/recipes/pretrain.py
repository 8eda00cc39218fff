"""Describes pretraining."""

from llmtrain.config.recipes.base import Recipe

RECIPE = Recipe(
    name="pretrain",
    summary="train on text (starts under torchrun too)",
    main="llmtrain.recipes.pretrain:main",
    packs_text=True,
)
