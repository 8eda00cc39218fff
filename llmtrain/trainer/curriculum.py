"""Chooses which prompts a step takes (`data.curriculum`): easy ones first, and none that are always or never solved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmtrain.config.curriculum import CurriculumConfig
from llmtrain.data.faults import Faults
from llmtrain.data.prompts import PromptSet
from llmtrain.data.sampler import derive
from llmtrain.types import Group, attempts

State = dict[str, Any]
"""Holds what a checkpoint keeps, as JSON: `place`, how far the order of prompts was walked; `skipped`, how many of
them; `rates`, for each row that was sampled [share of its last group that was solved, place behind it]."""


class Curriculum:
    """Walks an order of all prompts, and leaves out those that the policy solves too often or too seldom.

    The order alone is a function of the seed and the place: see `at`. What is left out follows from the rewards, so it
    is the same on all trainers, and lies in `state`, which checkpoints hold.
    """

    def __init__(
        self, settings: CurriculumConfig, prompts: PromptSet, total_prompts: int, seed: int, state: State
    ) -> None:
        """`total_prompts` are those of the whole run. Raises ValueError for rows without a number in the column."""
        self.settings, self.prompts, self.seed, self.state = settings, prompts, seed, state
        self.ranked = ranked(prompts, settings) if settings.column else list(range(len(prompts)))
        self.grows_until = settings.full_at * total_prompts if settings.column else 0.0
        for name, value in (("place", 0), ("skipped", 0), ("rates", {})):
            state.setdefault(name, value)

    def choose(self, numbers: range) -> list[int]:
        """Returns the rows of the next prompts of the run, as many as `numbers`."""
        return [self._next() for _ in numbers]

    def note(self, rows: Sequence[int], groups: Sequence[Group]) -> None:
        """Keeps which share of the attempts at each row was solved: such as have a solved sample for their last row."""
        least, place = self.settings.solved_reward, self.state["place"]
        for row, group in zip(rows, groups, strict=True) if self.settings.filters else ():
            last = [rows[-1] for rows in attempts(group)]
            solved = sum(sample.reward >= least and not sample.errors for sample in last)
            self.state["rates"][str(row)] = [solved / len(last), place]

    def at(self, place: int) -> int:
        """Returns the row at a place of the order: at first drawn among the easiest, a share of the rows that rises as
        the square root of the run (competence, arXiv 1903.09848, equation 8); later each row once an epoch."""
        if place >= self.grows_until:
            return self.prompts.at(place, self.seed)
        start = self.settings.start
        share = math.sqrt(start**2 + (1 - start**2) * place / self.grows_until)
        return self.ranked[derive(self.seed, f"curriculum/{place}") % math.ceil(share * len(self.ranked))]

    def _next(self) -> int:
        """Returns the next row that is not left out; that after a whole epoch of such as are, whatever it is."""
        for _ in range(len(self.prompts)):
            row = self.at(self.state["place"])
            self.state["place"] += 1
            if not self._left_out(row):
                return row
            self.state["skipped"] += 1
        return row

    def _left_out(self, row: int) -> bool:
        rate, place = self.state["rates"].get(str(row), (None, 0))
        if rate is None or self.state["place"] - place > self.settings.skip_epochs * len(self.prompts):
            return False
        return not self.settings.min_pass_rate <= rate <= self.settings.max_pass_rate


def ranked(prompts: PromptSet, settings: CurriculumConfig) -> list[int]:
    """Returns the rows, easy ones first; equal ones in their order. Raises ValueError with the place of every row whose
    column holds no number."""
    faults, name = Faults("data.curriculum.column"), settings.column
    values = [example.get(name) for example in prompts.examples]
    for where, value in zip(prompts.places, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            shown = "is not there" if value is None else f"is {str(value)[:40]!r}"
            faults.add(where, f"{name} (data.curriculum.column) {shown}; it must be a number, which orders the rows")
    faults.raise_any()
    return sorted(range(len(values)), key=lambda i: values[i] if settings.easy == "low" else -values[i])
