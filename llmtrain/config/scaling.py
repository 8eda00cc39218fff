"""Defines the keys of the section scaling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from llmtrain.config.section import Section, UserPath

Column = Literal["params", "tokens", "flops", "loss", "reward"]
Method = Literal["parabolas", "parametric", "projection", "kaplan", "sigmoid"]


class ScalingConfig(Section):
    """Configures `llmtrain scaling`, which fits laws to the results of runs; see docs/scaling.md."""

    points: UserPath | None = None  # CSV or .jsonl; columns params, tokens, loss, flops; sigmoid: flops, reward
    fields: dict[Column, str] = Field({})  # names of your columns by ours, as {flops: budget_flops}
    method: list[Method] = Field(["parabolas", "parametric"], min_length=1)  # side by side; sigmoid stands alone
    axis: Literal["params", "tokens"] = "params"  # what the parabolas are drawn over, as a logarithm
    min_tokens_per_param: PositiveFloat | None = None  # points with fewer are left out; null = none
    bootstrap: int = Field(200, ge=0, le=10_000)  # times that the points are drawn again for intervals of 95 %
    target_flops: list[PositiveFloat] = Field([])  # budgets whose best size and tokens are told
    held_out: bool = True  # also fit without the largest budget, and compare its prediction with it

    @model_validator(mode="after")
    def _alone(self) -> ScalingConfig:
        if "sigmoid" in self.method and len(self.method) > 1:
            raise ValueError(
                "has sigmoid, of reward against compute, among laws of loss; give it a document of its own"
            )
        return self
