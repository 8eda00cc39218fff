from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.schema import RewardConfig, TaskConfig
from llmtrain.data.arithmetic import is_held_out
from llmtrain.data.faults import Faults
from llmtrain.data.files import read_rows
from llmtrain.data.tasks import write_task
from llmtrain.rewards import Score, reasoning, scorer_of


def lines(task: TaskConfig, directory: Path, seed: int = 0) -> dict[str, list[dict]]:
    write_task(task, str(directory), seed)
    return {
        s: [r for _, r in read_rows(str(directory / f"{task.name}-{s}.jsonl"), Faults(""))]
        for s in ("train", "held_out")
    }


def scored(records: list[dict]) -> list[Score]:
    """The scores of the records' own completions."""
    return scorer_of(RewardConfig(name="reasoning_gym")).score([(r["completion"], r) for r in records])


def test_chain_sum_demonstrations_score_and_splits_are_apart(tmp_path: Path) -> None:
    splits = lines(TaskConfig(name="sum", type="chain_sum", train=300, held_out=60), tmp_path)
    for split, records in splits.items():
        expressions = [r["entry"]["metadata"]["expression"] for r in records]
        assert len(set(expressions)) == len(records) == (300 if split == "train" else 60)
        assert {is_held_out(e) for e in expressions} == {split == "held_out"}
        for record, expression in zip(records, expressions, strict=True):
            assert record["prompt"] == f"State the final answer to the following arithmetic problem: {expression} ="
            assert eval(expression) == int(record["answer"])
        assert {score.value for score in scored(records)} == {1.0}
    assert {"+", "-"} == {r["entry"]["metadata"]["expression"].split()[1] for r in splits["train"]}


def test_chain_sum_errors(tmp_path: Path) -> None:
    task = TaskConfig(name="sum", type="chain_sum", train=1000, held_out=1, error_rate=0.15)
    records = lines(task, tmp_path)["train"]
    right = sum(score.value for score in scored(records)) / 1000
    assert right == pytest.approx(0.85**2, abs=0.05)
    assert all(reasoning.extract(r["completion"]).lstrip("-").isdigit() for r in records)


def test_largest(tmp_path: Path) -> None:
    splits = lines(TaskConfig(name="max", type="largest", train=200, held_out=50), tmp_path)
    keys = {}
    for split, records in splits.items():
        numbers = []
        for record in records:
            (message,) = record["messages"]
            a, b, c = (int(w.strip(",?")) for w in message["content"].split() if w.strip(",?").isdigit())
            assert message == {"role": "user", "content": f"Which is the largest number: {a}, {b} or {c}?"}
            assert record["answer"] == str(max(a, b, c))
            assert record["prefill"] == "The answer is "
            numbers.append(tuple(sorted((a, b, c))))
        keys[split] = set(numbers)
        assert len(keys[split]) == len(records)
    assert not keys["train"] & keys["held_out"]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    task = TaskConfig(name="max", type="largest", train=20, held_out=5)
    assert lines(task, tmp_path, 3) == lines(task, tmp_path, 3)
    assert lines(task, tmp_path, 3) != lines(task, tmp_path, 4)


def test_more_problems_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.data.tasks.draws", lambda task: 100_000)  # of 16,200 problems; else it takes 400,000
    with pytest.raises(ValueError, match=r"held_out=2500, but chain_sum yields only 2\d\d\d different"):
        write_task(TaskConfig(name="sum", type="chain_sum", train=10, held_out=2500), str(tmp_path), 0)
