"""CSV files of points: columns in any order, and all faults of a bad file at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.scaling.laws.read import read_columns, read_points


def test_columns_in_any_order_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("\ufeffloss,note,C, N ,tokens\n2.5,a,6e18,1e9,1e9\n\n2.4,b,1.2e19,2e9,1e9\n")
    points = read_points(str(path), {"params": "N", "flops": "C"})
    assert points.params.tolist() == [1e9, 2e9] and points.flops.tolist() == [6e18, 1.2e19]
    assert points.loss.tolist() == [2.5, 2.4] and len(points) == 2


def test_flops_follow_from_sizes_where_there_are_none(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("params,tokens,loss\n10,20,3\n")
    assert read_points(str(path), {}).flops.tolist() == [1200]


def test_all_faults_at_once(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("params,tokens,loss\n-1,nan,3\n1,2\n1,inf,x\n1,2,3\n1,,3\n")
    with pytest.raises(ValueError) as error:
        read_points(str(path), {})
    lines = str(error.value).splitlines()
    assert [line.rpartition(".csv:")[2].split(":")[0] for line in lines[:-1]] == ["2", "2", "3", "4", "4", "6"]
    assert lines[0] == f"{path}:2: params='-1': must be a positive number, from 1e-30 to 1e+60; correct or remove it"
    assert lines[2] == f"{path}:3: has 2 fields, the header has 3; correct it"
    assert lines[-1] == f"{path}: 6 faults"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ":1: has no column params; its columns are none"),
        ("params,tokens,loss\n1e-293,2,3\n", ":2: params='1e-293': must be a positive number"),
        ("params,tokens,loss\n1,1e287,3\n", ":2: tokens='1e287': must be a positive number"),
        ("params,loss\n1,2\n", ":1: has no column tokens; its columns are params, loss"),
        ("params,tokens,loss,loss\n1,2,3,4\n", ":1: has two columns loss"),
        ("params,tokens,loss\n", ": has no points"),
        ('params,tokens,loss\n1,2,"3\n', ": is no CSV file in UTF-8"),
    ],
)
def test_what_is_no_table_of_points(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(ValueError) as error:
        read_points(str(tmp_path / "points.csv"), {})
    assert f"points.csv{words}" in str(error.value)


def test_a_column_that_is_named_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("params,tokens,loss\n1,2,3\n")
    with pytest.raises(ValueError, match=":1: has no column C;"):
        read_points(str(tmp_path / "points.csv"), {"flops": "C"})


def test_the_metrics_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "tokens": 10, "reward_mean": 0.25}\n{"tokens": 30, "step": 2, "reward_mean": -1}\n')
    found = read_columns(str(path), ("flops", "reward"), {"flops": "tokens", "reward": "reward_mean"})
    assert found["flops"].tolist() == [10, 30] and found["reward"].tolist() == [0.25, -1]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"flops": 1, "reward": 1}\n{"flops": 2}', r":2: reward='': must be a finite number"),
        ('{"flops": 1, "reward": null}', r":1: reward='None': must be a finite number"),
        ('{"flops": 1, "reward": 1}\n{"flops": 2, "rew', ":2: is no JSON object: .*; correct or remove the line"),
        ('{"flops": 1, "reward": 1}\n[]', ":2: is no JSON object: it is a list"),
        ("", ":1: has no column flops"),
    ],
)
def test_broken_lines_of_metrics(tmp_path: Path, lines: str, words: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=f"metrics.jsonl{words}"):
        read_columns(str(path), ("flops", "reward"), {})


def test_rewards_may_be_negative(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("flops,reward\n1,-0.5\n2,0\n")
    assert read_columns(str(tmp_path / "points.csv"), ("flops", "reward"), {})["reward"].tolist() == [-0.5, 0]
    (tmp_path / "points.csv").write_text("flops,reward\n1,nan\n")
    with pytest.raises(ValueError, match="reward='nan': must be a finite number"):
        read_columns(str(tmp_path / "points.csv"), ("flops", "reward"), {})
