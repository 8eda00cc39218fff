"""`llmtrain eval` on several ranks: the numbers of one process, and one line where it cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.load import load
from llmtrain.rules.check import violations

WORKER = Path(__file__).parents[1] / "several_runs.py"
MEASURES = ("eval.problems=5", "eval.samples=3", "eval.text_seqs=7", "rollout.temperature=1.2")


def evaluation(small: Path, run: Path, label: str, *more: str) -> list[str]:
    return ["eval", str(small), f"run_dir={run}", f"eval.label={label}", *MEASURES, *more]


def results(run: Path, label: str) -> tuple[dict, list[dict]]:
    place = run / "eval" / label
    lines = (place / "samples.jsonl").read_text().splitlines() if (place / "samples.jsonl").exists() else []
    samples, measures = [json.loads(line) for line in lines], json.loads((place / "eval.json").read_text())
    assert {each.pop("label") for each in (measures, *samples)} == {label}
    return measures, samples


def flat(measures: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the numbers of nested measures by their path. Example: {"text": {"a": 1}} -> {"text/a": 1}"""
    found = {}
    for name, value in measures.items():
        within = dict(enumerate(value)) if isinstance(value, list) else value
        found |= flat(within, f"{prefix}{name}/") if isinstance(within, dict) else {f"{prefix}{name}": value}
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / "run"


def test_two_ranks_measure_what_one_does(small: Path, trained: Path, forked: Callable) -> None:
    """Five problems and seven rows do not divide among two ranks. The answers are equal to the token; sums of text are
    added in another order, to 1e-5."""
    first = ["pretrain", str(small), f"run_dir={trained}", "train.steps=2", "optim.lr=1e-2"]
    alone = forked(1, WORKER, json.dumps([first, evaluation(small, trained, "one")]), timeout_s=120)
    assert alone.returncode == 0, alone.stdout[-3000:]
    shared = [
        evaluation(small, trained, "dp"),
        evaluation(small, trained, "tp", "parallel.tp=2", "eval.problems=0"),
    ]
    ranks = forked(2, WORKER, json.dumps(shared), timeout_s=120)
    assert "exit codes [0, 0]" in ranks.stdout, ranks.stdout[-3000:]
    (one, samples), (two, own) = results(trained, "one"), results(trained, "dp")
    assert own == samples and len(samples) == 5 * 4
    assert flat(two) == pytest.approx(flat(one), rel=1e-5)  # entropy too: log-probs round by their batch
    text = {name: one[name] for name in ("loss", "perplexity", "bits_per_byte", "text")}
    measures, none = results(trained, "tp")
    assert flat(measures) == pytest.approx(flat(text), rel=1e-5) and none == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["pp=2", "cp=2"], ["pp=2", "schedule=zbv", "virtual_stages=2", "dp_shard=2"]])
def test_a_model_that_four_ranks_share_is_measured_as_one_process_does(
    small: Path, tmp_path: Path, layout: list[str], forked: Callable
) -> None:
    keys, run = [f"parallel.{key}" for key in layout], tmp_path / "run"
    first = ["pretrain", str(small), f"run_dir={run}", "train.steps=2"]
    assert forked(1, WORKER, json.dumps([first, evaluation(small, run, "one", "eval.problems=0")])).returncode == 0
    done = forked(4, WORKER, json.dumps([evaluation(small, run, "four", *keys, "eval.problems=0")]), timeout_s=120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert flat(results(run, "four")[0]) == pytest.approx(flat(results(run, "one")[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "keys", "message"),
    [
        (4, ["parallel.tp=2"], "parallel.tp=2: must be 1 where eval samples, from a whole model on each rank; set it"),
        (4, ["parallel.pp=2", "eval.text=false"], "parallel.pp=2: must be 1 where eval samples"),
        (2, ["parallel.cp=2"], "parallel.cp=2: must be 1 where eval samples"),
        (
            3,
            ["parallel.tp=2", "eval.problems=0"],
            "parallel: pp 1 x dp_replicate 1 x dp_shard 1 x",
        ),
        (
            2,
            ["parallel.pp=8", "eval.problems=0"],
            "parallel: pp 8 x dp_replicate 1 x dp_shard 1 x",
        ),
        (3, ["parallel.tp=3", "eval.problems=0"], "train.seq_len=64: must be a multiple of parallel.tp=3"),
        (2, ["parallel.cp=2", "eval.problems=0", "train.seq_len=62"], "train.seq_len=62: must be a multiple of 4"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(small: Path, ranks: int, keys: list[str], message: str) -> None:
    found = violations(load(str(small), ["model.init_from=here", *keys]), ranks, "eval")
    assert any(line.startswith(message) for line in found), found


def test_one_process_does_not_read_the_layout(small: Path) -> None:
    found = violations(load(str(small), ["model.init_from=here", "parallel.tp=2", "parallel.pp=2"]), 1, "eval")
    assert found == ["model.init_from=here: does not exist; give the directory of a model or of an earlier stage"]
