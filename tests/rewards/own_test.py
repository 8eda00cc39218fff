"""Rewards of the user's own, rows that cannot be rewarded, sums, errors and the share at which a run stops."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.config.load import ConfigError, dump, load
from llmtrain.config.schema import RewardConfig
from llmtrain.rewards import (
    RewardsFail,
    Score,
    build_reward,
    check_rows,
    count_failures,
    reward_metrics,
    scorer_of,
    stop_if_failing,
)
from llmtrain.rules.check import check
from llmtrain.types import Group, Sample

ROOT = Path(__file__).parents[2]
FUNCTIONS = """
import os, socket, time
SEEN = []
def length(completion, example):
    return len(completion) / example["most"]
def odd(completion, example):
    if completion == "slow": time.sleep(60)
    if completion == "text": return "much"
    if completion == "crash": os._exit(1)
    return {"nan": float("nan"), "huge": 10**400, "none": None, "true": True}[completion]
def peeks(completion, example):
    return len(open(completion).read())
def connects(completion, example):
    socket.socket()
    return 1
def counts(completion, example):
    SEEN.append(completion)
    return len(SEEN)
"""


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., RewardConfig]:
    """own(function, **keys) -> the configuration of a reward of a file."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return lambda function, **keys: RewardConfig(function=f"{tmp_path}/mine.py:{function}", **keys)


def groups_of(*texts: str, **example: object) -> list[Group]:
    """One group of samples whose ids are the characters of a text."""
    return [
        [
            Sample([1], list(map(ord, text)), [True] * len(text), [0.0] * len(text), [0] * len(text), True)
            for text in texts
        ]
    ]


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_weights_are_summed_and_parts_kept(own: Callable[..., RewardConfig]) -> None:
    rewards = [own("length", weight=2.0), RewardConfig(name="first_integer", weight=0.5)]
    groups = groups_of("42", "421", "ab")
    for sample in groups[0]:
        sample.example = {"most": 4, "answer": "42"}
    build_reward(rewards, decode)(groups)
    assert [sample.reward for sample in groups[0]] == [1.5, 1.5, 1.0]
    assert [sample.parts for sample in groups[0]] == [
        {"length": 0.5, "first_integer": 1.0},
        {"length": 0.75, "first_integer": 0.0},
        {"length": 0.5, "first_integer": 0.0},
    ]
    assert reward_metrics(groups) == {
        "reward_errors": 0,
        "reward/length": pytest.approx(1.75 / 3),
        "reward/first_integer": pytest.approx(1 / 3),
    }
    groups[0][0].parts = {"length": 1.0, "won": 3.0}  # as where another round of a step has parts of an environment
    assert reward_metrics(groups)["reward/won"] == 1.0


@pytest.mark.parametrize(
    ("scores", "weight", "counted"),
    [
        ([-3.0, -1.0], 1.0, -3.0),  # 0 would be the best of all
        ([0.0, 1.0], 1.0, 0.0),
        ([0.5, 2.0], 1.0, 0.0),
        ([0.5, 2.0], -1.0, 2.0),  # of a penalty the largest
        ([-3.0, -1.0], -1.0, 0.0),
        ([], 1.0, 0.0),
    ],
)
def test_a_failure_counts_the_worst_of_what_was_sampled(
    own: Callable[..., RewardConfig], scores: list[float], weight: float, counted: float
) -> None:
    """The samples lie in two groups; a second reward with weight 0.5 gives 4 to each."""
    rewards = [own("odd", weight=weight), RewardConfig(name="first_integer", weight=0.5)]
    (samples,) = groups_of(*["a"] * len(scores), "b")
    for sample, score in zip(samples, [*scores, 0.0], strict=True):
        sample.parts = {"odd": score, "first_integer": 4.0}
        sample.reward = weight * score + 2.0
    samples[-1].errors = {"odd": "broke"}
    count_failures(rewards, [samples[:1], samples[1:]])
    assert [sample.parts["odd"] for sample in samples] == [*scores, counted]
    assert [sample.reward for sample in samples] == [weight * each + 2 for each in [*scores, counted]]
    assert {sample.parts["first_integer"] for sample in samples} == {4.0}


def test_a_failure_counts_nothing_and_is_told(own: Callable[..., RewardConfig]) -> None:
    texts = ["slow", "text", "crash", "nan", "huge", "none", "other", "true"]
    groups = groups_of(*texts)
    build_reward([own("odd", deadline_s=1.0)], decode)(groups)
    told = {text: sample.errors.get("odd", "") for text, sample in zip(texts, groups[0], strict=True)}
    assert told.pop("true") == "" and [s.reward for s in groups[0]] == [0.0] * 7 + [1.0]
    assert told == {
        "slow": "took longer than 1 s",
        "text": "returned 'much', which is no finite number",
        "crash": "ended without a reply (exit code 1)",
        "nan": "returned nan, which is no finite number",
        "huge": told["huge"],
        "none": "returned None, which is no finite number",
        "other": "KeyError: 'other'",
    }
    assert told["huge"].startswith("returned 1000") and len(told["huge"]) < 120
    assert reward_metrics(groups) == {"reward_errors": 7, "reward/odd": 1 / 8}


def test_the_share_of_failures_at_which_a_run_stops(own: Callable[..., RewardConfig]) -> None:
    mine, math = own("odd"), RewardConfig(name="math")
    some = [{"odd": "KeyError: 'x'"}, {"odd": "late"}, {}, {"math": "late"}]
    stop_if_failing([mine, math], some)
    with pytest.raises(RewardsFail, match=r"reward odd: failed on 3 of 4 .* rewards.max_error_share=0.5; .*KeyError"):
        stop_if_failing([mine, math], [*some[:3], {"odd": "late"}])
    stop_if_failing([math], [{"math": "late"}] * 4)  # texts that it cannot read are no fault of the run
    with pytest.raises(RewardsFail, match="max_error_share=0;"):
        stop_if_failing([RewardConfig(name="math", max_error_share=0.0)], some)


def test_a_function_has_neither_files_nor_network_nor_a_memory(own: Callable[..., RewardConfig]) -> None:
    (file,) = scorer_of(own("peeks")).score([("/etc/passwd", {})])
    assert re.match("(PermissionError|FileNotFoundError)", file.error)
    assert "PermissionError" in scorer_of(own("connects")).score([("x", {})])[0].error
    assert scorer_of(own("counts")).score([("a", {}), ("b", {}), ("c", {})]) == [Score(1.0)] * 3


def test_outside_the_sandbox_it_has_all_of_them(own: Callable[..., RewardConfig]) -> None:
    assert scorer_of(own("peeks", unsandboxed=True)).score([("/etc/passwd", {})])[0].value > 0
    assert scorer_of(own("connects", unsandboxed=True)).score([("x", {})]) == [Score(1.0)]
    scores = scorer_of(own("counts", unsandboxed=True)).score([(str(n), {}) for n in range(8)])
    assert max(score.value for score in scores) >= 4  # two to four workers


def test_equal_completions_are_scored_once(own: Callable[..., RewardConfig]) -> None:
    row: dict = {}
    scores = scorer_of(own("counts", unsandboxed=True)).score([("a", row)] * 6)
    assert scores == [scores[0]] * 6


def test_the_majority_of_an_own_reward_compares_final_answers(own: Callable[..., RewardConfig]) -> None:
    texts = ["so\n#### 5", "Answer: 5", "6", "Answer: 7"]
    assert scorer_of(own("length")).classes(texts) == [0, 0, 1, 2]


def test_a_function_that_cannot_be_loaded_is_wrong_input(own: Callable[..., RewardConfig], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rewards: missing: cannot be loaded: AttributeError"):
        check_rows([own("missing")], [{}], ["f:1"])
    (tmp_path / "bad.py").write_text("def f(:")
    with pytest.raises(ValueError, match=r"cannot be loaded: SyntaxError(.|\n)*bad.py"):
        check_rows([RewardConfig(function=f"{tmp_path}/bad.py:f")], [{}], ["f:1"])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys\nsys.exit(3)", r"SystemExit: 3 \(.*bad.py:2\)"),
        ("import os\nos._exit(3)", "a worker ended while it imported the functions"),
        ("score = 5", "TypeError: score is of type int, no function"),
        ("def score(completion): pass", r"TypeError: score\(completion\) cannot be called with 2 arguments"),
        ("async def score(completion, example): pass", "TypeError: score is an async function or a generator"),
        ("def score(completion, example): yield 1", "TypeError: score is an async function or a generator"),
        ("def score(:", "SyntaxError: .*bad.py, line 1"),
        ("import nothing_of_this", "ModuleNotFoundError"),
    ],
)
@pytest.mark.parametrize("unsandboxed", [False, True])
def test_a_function_that_cannot_work_is_refused_in_one_line(
    source: str, reason: str, unsandboxed: bool, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "bad.py").write_text(source)
    reward = RewardConfig(function=f"{tmp_path}/bad.py:score", unsandboxed=unsandboxed)
    with pytest.raises(ValueError, match=f"^rewards: score: cannot be loaded: {reason}") as told:
        check_rows([reward], [{}], ["f:1"])
    assert "\n" not in str(told.value) and capfd.readouterr().err == ""


def test_a_deadline_is_a_day_at_most() -> None:
    with pytest.raises(ValueError, match="less than or equal to 86400"):
        RewardConfig(deadline_s=1e30)


def test_all_faults_of_rows_are_told_at_once() -> None:
    rows = [{"answer": str(n)} if n % 2 else {"answer": f"{n}/7"} for n in range(60)]
    with pytest.raises(ValueError) as told:
        check_rows([RewardConfig(name="first_integer")], rows, [f"rows.jsonl:{n + 1}" for n in range(60)])
    lines = str(told.value).splitlines()
    assert len(lines) == 22
    assert lines[0].startswith(
        "rows.jsonl:1: reward first_integer: field 'answer' is '0/7': this reward reads integers"
    )
    assert lines[20:] == [
        "... and 10 more",
        "30 of 60 rows cannot be rewarded; docs/rewards.md says what each reward needs",
    ]


def test_rows_of_reasoning_gym() -> None:
    item = {"question": "", "answer": "", "metadata": {}}
    rows = [
        {"answer": "1"},
        {"source": 3, "entry": {}},
        {"source": "chain_sum", "entry": {"answer": "1"}},
        {"source": "chain_sums", "entry": item},
        {"source": "composite", "entry": item},
        {"source": "chain_sum", "entry": item},
    ]
    with pytest.raises(ValueError) as told:
        check_rows([RewardConfig()], rows, [f"f:{n}" for n in range(6)])
    lines = [line.removeprefix(f"f:{n}: reward reasoning_gym: ") for n, line in enumerate(str(told.value).splitlines())]
    assert [line[:50] for line in lines] == [
        "needs 'source' and 'entry'; add what reasoning-gym",
        "field 'source' is 3: must be the name of a generat",
        "field 'entry' must be an item of the generator, wi",
        "field 'source' is 'chain_sums', which reasoning-gy",
        "field 'source' is 'composite', which reasoning-gym",
        "5 of 6 rows cannot be rewarded; docs/rewards.md sa",
    ]


@pytest.mark.parametrize("row", [{}, {"answer": ""}, {"answer": None}, {"answer": [1]}, {"answer": "x #### "}])
def test_rows_of_math(row: dict) -> None:
    with pytest.raises(ValueError, match="f:1: reward math: field 'answer' is"):
        check_rows([RewardConfig(name="math")], [row], ["f:1"])


def test_the_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "rewards.md").read_text()
    python = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    yaml = re.search(r"```yaml\n(.*?)```", page, re.S).group(1)
    assert len(python.splitlines()) <= 5
    (tmp_path / "my_rewards.py").write_text(python)
    (tmp_path / "a.yaml").write_text(yaml)
    monkeypatch.chdir(tmp_path)
    config = load("a.yaml", ["rewards.score.weight=0.5"])
    groups = groups_of("\\boxed{4}", "the answer is 4", "5")
    for sample in groups[0]:
        sample.example = {"answer": "4", "most_words": 2}
    check_rows(config.rewards, [groups[0][0].example], ["f:1"])
    build_reward(config.rewards, decode)(groups)
    assert [sample.reward for sample in groups[0]] == [1.5, 1.0, 0.5]


def test_forms_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"

    def rewards(text: str, *overrides: str) -> list[tuple]:
        path.write_text(f"name: a\n{text}\n")
        config = load(str(path), list(overrides))
        again = tmp_path / "again.yaml"
        again.write_text(dump(config))
        assert load(str(again), []) == config
        return [(r.name, r.function, r.max_error_share, r.weight) for r in config.rewards]

    assert rewards("") == [("reasoning_gym", None, None, 1.0)]
    assert rewards("", "rewards.max_error_share=0.1") == [("reasoning_gym", None, 0.1, 1.0)]
    assert rewards("rewards: {name: math}") == [("math", None, None, 1.0)]
    assert rewards("rewards: {function: a.py:f}") == [("f", "a.py:f", None, 1.0)]
    assert rewards("rewards: [{function: a.b:f, name: g}]") == [("g", "a.b:f", None, 1.0)]
    both = "rewards: [{name: math}, {function: a.py:f, weight: 2}]"
    assert rewards(both, "rewards.max_error_share=0.1") == [("math", None, 0.1, 1.0), ("f", "a.py:f", 0.1, 2.0)]
    assert rewards(both, "rewards.math.weight=3")[0] == ("math", None, None, 3.0)
    assert rewards("grpo: {reward: math}", "rewards.max_error_share=0.1") == [("math", None, 0.1, 1.0)]
    for text, fault in {
        "rewards: [{function: a.py}]": "must be file.py:function or module:function",
        "rewards: [{name: maths}]": "must be one of 'reasoning_gym', 'first_integer' or 'math'",
        "rewards: [{name: math, max_error_share: 2}]": "must be less than or equal to 1",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(fault)):
            rewards(text)


def test_rules(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "rewards: [{function: no.py:f}, {name: math, unsandboxed: true}, {function: a.b:g, name: math}]\n"
        "eval: {text: false}\n"
    )
    with pytest.raises(ConfigError) as told:
        check(load(str(path), []), 1, "eval")
    assert "rewards.f.function=no.py:f: no.py is no file here; correct the path" in str(told.value)
    assert "rewards.math.unsandboxed=true: only a function of your own may run outside; remove it" in str(told.value)
    assert "rewards: math is named twice" in str(told.value)
