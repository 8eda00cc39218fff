"""Describes an algorithm from outside the package, as docs/recipes.md tells: the focal loss (arXiv 1708.02002)."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from llmtrain.config.recipes import Recipe, register
from llmtrain.config.schema import Config, Section


class FocalConfig(Section):
    """Configures SFT in which tokens that the model knows already weigh less."""

    gamma: float = Field(2.0, ge=0.0)  # a token weighs (1 - p)^gamma


def whole_gamma(config: Config) -> Iterator[str]:
    """Yields a line if gamma is not one that the toy has been tried with."""
    if config.focal.gamma > 5:
        yield f"focal.gamma={config.focal.gamma:g}: must be at most 5; lower it"


register(
    Recipe(
        name="focal",
        summary="fine-tune with the focal loss",
        main="tests.recipes.toy_loop:main",
        section=FocalConfig,
        rules=(whole_gamma,),
        same=("focal.gamma",),
    )
)
