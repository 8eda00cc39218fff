"""Defines the keys of data.curriculum: which prompts a recipe that samples takes, by how difficult they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveInt

from llmtrain.config.section import Section, Share


class CurriculumConfig(Section):
    """Chooses prompts by difficulty: easy ones first, by a column of the rows, and none that the policy always or never
    solves. Both can be set."""

    column: str | None = None  # field of the rows with a number, by which they are ordered; None = no order
    easy: Literal["low", "high"] = "low"  # which values of the column are easy; high: pass rates
    start: float = Field(0.2, gt=0.0, le=1.0)  # share of the easiest rows that the first prompts come from
    full_at: float = Field(0.5, gt=0.0, le=1.0)  # share of the run from which on all rows are taken
    min_pass_rate: Share = 0.0  # rows of which a smaller share of the last group was solved are skipped
    max_pass_rate: Share = 1.0  # rows of which a larger share was solved are skipped
    solved_reward: float = 1.0  # a sample with this reward or more counts as solved
    skip_epochs: PositiveInt = 1  # epochs for which a row is skipped; then it is tried again

    @property
    def filters(self) -> bool:
        """Says whether rows are skipped."""
        return self.min_pass_rate > 0 or self.max_pass_rate < 1

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the section, `key=value: rule; remedy`."""
        low, high = self.min_pass_rate, self.max_pass_rate
        if low > high:
            yield f"data.curriculum.min_pass_rate={low:g}: must be at most max_pass_rate={high:g}; lower it"
        if self.column is None and not self.filters:
            yield (
                "data.curriculum: neither orders rows (column) nor skips some (min_pass_rate, max_pass_rate); set one "
                "of them, or remove it"
            )
        for name in ("easy", "start", "full_at") if self.column is None else ():
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                yield f"data.curriculum.{name}={getattr(self, name)}: needs column, by which rows are ordered; set it"
