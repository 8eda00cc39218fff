"""Which rows a curriculum chooses, in absolute values."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from llmtrain.config.curriculum import CurriculumConfig
from llmtrain.data.sampler import permuted
from llmtrain.trainer.curriculum import Curriculum, ranked
from llmtrain.types import Group, Sample


class Prompts(SimpleNamespace):
    """Rows with a level each; None: without."""

    def __len__(self) -> int:
        return len(self.examples)


def prompts(values: list[Any]) -> Prompts:
    return Prompts(
        examples=[{"level": value} if value is not None else {} for value in values],
        places=[f"rows.jsonl:{i + 1}" for i in range(len(values))],
        at=lambda place, seed: permuted(place, len(values), seed),
    )


def curriculum(values: list[Any], total: int = 100, state: dict | None = None, **settings: Any) -> Curriculum:
    return Curriculum(CurriculumConfig(**settings), prompts(values), total, 7, {} if state is None else state)


def group(*rewards: float) -> Group:
    return [Sample([1], [2], [True], [0.0], [0], True, reward=reward) for reward in rewards]


def test_a_row_is_solved_by_attempts_not_by_their_rows() -> None:
    """Of two runs of a program the first has three rows; each is worth what its last row is."""
    order, runs = curriculum([1, 2], max_pass_rate=0.6), group(1.0, 1.0, 1.0, 0.0)
    for sample, attempt in zip(runs, (0, 0, 0, 1), strict=True):
        sample.attempt = attempt
    order.note([0], [runs])
    runs[1].reward, runs[2].reward = 0.0, 0.0
    order.note([1], [runs])
    assert order.state["rates"] == {"0": [0.5, 0], "1": [0.0, 0]}


def test_rows_are_ranked_by_their_column() -> None:
    easy_low = curriculum([3, 1, 2, 1], column="level")
    assert easy_low.ranked == [1, 3, 2, 0]
    assert curriculum([0.1, 0.9, 0.5], column="level", easy="high").ranked == [1, 2, 0]


def test_the_easiest_come_first_and_all_later() -> None:
    """Of 100 rows the easiest 20 at place 0; (0.2^2 + 0.96 * 20 / 50)^0.5 = 0.651 of them at place 20; all from place
    50 on, half of the run."""
    order = curriculum(list(range(100)), total=100, column="level")
    rows = order.choose(range(100))
    assert all(row < 20 for row in rows[:1]) and max(rows[:21]) < 66 and max(rows[:10]) < 48
    assert len({*rows[:50]}) > 25  # drawn, not always the same ones
    assert rows[50:] == [permuted(place, 100, 7) for place in range(50, 100)]


def test_the_share_at_a_place() -> None:
    order = curriculum(list(range(1000)), total=100, column="level", start=0.1, full_at=1.0)
    drawn = [row for place in range(50) for row in [order.at(place)]]
    for place, row in enumerate(drawn):
        assert row < 1000 * (0.01 + 0.99 * place / 100) ** 0.5 + 1


def test_solved_and_hopeless_rows_are_left_out_for_an_epoch() -> None:
    order = curriculum([0] * 4, min_pass_rate=0.25, max_pass_rate=0.75)
    first = order.choose(range(4))
    assert sorted(first) == [0, 1, 2, 3]
    rates = {0: (1, 1, 1, 1), 1: (0, 0, 0, 0), 2: (1, 0, 0, 0), 3: (1, 1, 1, 0)}  # 1, 0, .25 and .75
    order.note(first, [group(*rates[row]) for row in first])
    assert sorted(order.choose(range(2))) == [2, 3]
    assert order.state["skipped"] + 2 == order.state["place"] - 4
    later = order.choose(range(8))
    assert {0, 1} <= {*later}  # an epoch later they are tried again


def test_a_failed_reward_solves_nothing() -> None:
    order = curriculum([0, 0], max_pass_rate=0.5)
    (row, _) = order.choose(range(2))
    samples = group(1.0, 1.0)
    samples[0].errors = {"math": "too long"}
    order.note([row], [samples])
    assert order.state["rates"] == {str(row): [0.5, 2]}


def test_where_all_are_left_out_one_is_taken() -> None:
    order = curriculum([0, 0, 0], max_pass_rate=0.5, skip_epochs=1000)
    order.note(order.choose(range(3)), [group(1.0)] * 3)
    assert len(order.choose(range(2))) == 2 and order.state["skipped"] == 6


def test_a_restored_state_chooses_the_same() -> None:
    """The state goes through JSON, as a checkpoint's does."""
    whole = curriculum([0] * 9, max_pass_rate=0.5)
    halves = Counter()
    for _ in range(3):
        rows = whole.choose(range(4))
        whole.note(rows, [group(float(row % 2)) for row in rows])
        halves.update(rows)
    again = curriculum([0] * 9, state=json.loads(json.dumps(whole.state)), max_pass_rate=0.5)
    assert again.choose(range(20)) == whole.choose(range(20))


@pytest.mark.parametrize("value", [None, "7", True, float("nan"), [1]])
def test_rows_without_a_number_are_told_with_their_place(value: Any) -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl:2: level \(data.curriculum.column\)"):
        ranked(prompts([1, value, 2]), CurriculumConfig(column="level"))
