"""An environment between a recipe and its generator: what is asked, what is rewarded, and what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.chat import CHATML
from llmtrain.recipes import grpo
from llmtrain.rewards import RewardsFail
from llmtrain.trainer import rollouts
from llmtrain.trainer.job import Job
from llmtrain.trainer.rollouts import build_source, read_prompts, rollout_metrics
from tests.envs.talk import Script
from tests.recipes.conftest import run_steps

OWN = str(Path(__file__).parents[1] / "envs" / "own.py")
TOOLS = (
    'rollout.environment={"tools": ["calculator"], "calls": "plain"}',
    *("rewards=[{name: first_integer}]", "rollout.group_size=2", "rollout.max_new_tokens=30", "train.seq_len=200"),
    *("grpo.prompts_per_step=2", "train.steps=1"),
)


class Local(Script):
    """Is a generator on this rank."""

    def wake(self) -> None: ...

    def sleep(self) -> None: ...

    def close(self) -> None: ...

    def load_weights(self, weights: Any, version: int) -> None:
        self.version = version


@pytest.fixture
def talking(stub_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Provides talking(says, rows, *overrides) -> a job whose generator says that."""

    def make(says: Callable[[str, int], str], rows: list[dict], *overrides: str) -> Job:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "chatml.jinja").write_text(CHATML)
        job = stub_job("grpo", *overrides, f"data.train={tmp_path / 'rows.jsonl'}")
        job.tokenizer.template = str(tmp_path / "chatml.jinja")
        monkeypatch.setattr(rollouts, "local_generator", lambda job: Local(job.tokenizer, says))
        return job

    return make


def calls_first(context: str, number: int) -> str:
    """Sample 0 calls the calculator and repeats its result, sample 1 guesses 7."""
    if "<|im_start|>tool" in context:
        return context.rpartition("tool\n")[2].partition("<")[0]
    return "7" if number else "calculator: " + context.partition("user\n")[2].partition("<")[0]


PRODUCTS = [{"prompt": "6*7", "answer": "42"}, {"prompt": "70*700", "answer": 49000}]


def test_rewards_read_the_last_turn(talking: Callable[..., Job]) -> None:
    job = talking(calls_first, PRODUCTS, *TOOLS)
    source = build_source(job, read_prompts(job), 2)
    source.publish([], 5)
    groups = source.take(0)
    assert {sample.example["prompt"] for group in groups for sample in group} == {"6*7", "70*700"}
    for called, guessed in groups:
        assert called.parts == {"first_integer": 1.0} and guessed.parts == {"first_integer": 0.0}
        assert [own for own, _ in called.turns()] == [True, False, True] and called.finished
        assert job.tokenizer.decode(called.last_turn) == str(called.example["answer"])
        assert set(called.versions) == set(guessed.versions) == {5}
    found = rollout_metrics(groups)
    heard = sum(len(s.ids) - s.written_tokens for group in groups for s in group)
    assert found["turns_mean"] == 1.5 and found["environment_tokens_mean"] == heard / 4
    assert (
        found["reward_mean"] == 0.5
        and found["response_tokens_mean"] == sum(s.written_tokens for group in groups for s in group) / 4
    )


def test_a_recipe_trains_on_what_the_policy_wrote(talking: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    job = talking(calls_first, PRODUCTS, *TOOLS, "rollout.max_logprob_gap=1.0")
    monkeypatch.setattr(grpo, "build_engine", lambda job, total_updates: None)
    monkeypatch.setattr(grpo, "train", run_steps([]))
    grpo.run(job)
    (batches, _, _) = job.engine.updates[0]
    trained = [batch.labels[batch.loss_mask].tolist() for batch in batches]
    texts = job.tokenizer.decode([token for row in trained for token in row], skip_special=False)
    for text in ("calculator: 6*7", "calculator: 70*700", "42", "49000"):
        assert text in texts
    assert "im_start" not in texts  # what the template put between turns
    lines = [json.loads(line) for line in (Path(job.config.directory) / "samples.jsonl").read_text().splitlines()]
    turns = next(line["turns"] for line in lines if "turns" in line)
    assert [next(iter(turn)) for turn in turns] == ["policy", "environment", "policy"]
    assert turns[0]["policy"].startswith("calculator: ") and "tool" in turns[1]["environment"]


def test_an_environment_rewards_too(talking: Callable[..., Job]) -> None:
    own = f'rollout.environment={{"function": "{OWN}:Guess", "unsandboxed": true, "weights": {{"found": 3}}}}'
    rows = [{"number": 4}, {"number": 5}]
    more = (*TOOLS, own, "rewards=[]", "train.seq_len=900")
    job = talking(lambda context, number: "45"[number] if "no" not in context else "5", rows, *more)
    source = build_source(job, read_prompts(job), 2)
    source.publish([], 0)
    by_number = {group[0].example["number"]: group for group in source.take(0)}
    assert [(s.reward, s.parts, s.finished) for s in by_number[5]] == [(3.0, {"found": 1.0}, True)] * 2
    first, second = by_number[4]  # the second never finds it, in eight turns
    assert (first.reward, second.reward, second.finished) == (3.0, 0.0, False)
    assert sum(own for own, _ in second.turns()) == 8


REWRITES = """
from llmtrain.envs.base import Reply
class Sums:
    tools, role, players = (), "user", 1
    def start(self, example):
        self.turn = 0
        return [{"role": "user", "content": example["prompt"]}]
    def step(self, text):
        self.turn += 1
        if self.turn == 3 or text == "7":
            return Reply(done=True, parts={"turns": self.turn / 4})
        return Reply(history=[{"role": "user", "content": f"again: turn {self.turn}"}])
    def close(self):
        pass
"""


def test_an_episode_of_several_rows_is_rewarded_once(
    talking: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample 0 goes over three rows to the right answer, sample 1 is wrong at once: what was rewarded, counted and
    compared are two answers a prompt. The batch of the update has all rows."""
    (tmp_path / "sums.py").write_text(REWRITES)
    own = f'rollout.environment={{"function": "{tmp_path}/sums.py:Sums", "unsandboxed": true}}'

    def says(context: str, number: int) -> str:
        return "42" if "turn 2" in context else "8" if "turn 1" in context else "7" if number else "9"

    rows = [{"prompt": "6*7", "answer": "42"}, {"prompt": "7*6", "answer": "42"}]
    job = talking(says, rows, *TOOLS, own, "grpo.normalize_std=false", "rollout.max_logprob_gap=1.0")
    asked = []
    build = rollouts.build_reward

    def counting(rewards: Any, decode: Any) -> Any:
        reward = build(rewards, decode)
        return lambda groups: (asked.append([len(group) for group in groups]), reward(groups))

    monkeypatch.setattr(rollouts, "build_reward", counting)
    source = build_source(job, read_prompts(job), 2)
    source.publish([], 0)
    groups = source.take(0)
    assert asked == [[2, 2]]
    for group in groups:
        assert [s.attempt for s in group] == [0, 0, 0, 1]
        assert [s.reward for s in group] == [1.75] * 3 + [0.25]
        assert all(s.parts == {"first_integer": 1.0, "turns": 0.75} for s in group[:3])
    found = rollout_metrics(groups)
    assert (found["step_samples"], found["reward_mean"], found["rows_mean"], found["turns_mean"]) == (4, 1.0, 2.0, 2.0)
    assert found["reward/first_integer"] == 0.5 and found["reward/turns"] == 0.5 and found["finished_fraction"] == 1.0
    assert found["response_tokens_mean"] == sum(s.written_tokens for group in groups for s in group) / 4
    grpo.credit(groups, job.config.grpo)
    assert [s.columns["advantages"][-1] for group in groups for s in group] == [0.75, 0.75, 0.75, -0.75] * 2


def test_rows_that_an_environment_refuses_are_all_named(talking: Callable[..., Job], tmp_path: Path) -> None:
    job = talking(calls_first, [{"prompt": "1"}, {"answer": 3}, {"answer": 4}], *TOOLS)
    with pytest.raises(ValueError) as refused:
        read_prompts(job)
    told = str(refused.value).splitlines()
    assert [line.partition(": ")[0] for line in told[:2]] == [f"{tmp_path / 'rows.jsonl'}:{i}" for i in (2, 3)]
    assert told[2].endswith("2 faults")


def test_a_tokenizer_without_a_template_is_refused(talking: Callable[..., Job]) -> None:
    job = talking(calls_first, PRODUCTS, *TOOLS)
    job.tokenizer.template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        read_prompts(job)


def test_an_environment_that_fails_ends_the_run(talking: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    job = talking(calls_first, PRODUCTS, *TOOLS)
    source = build_source(job, read_prompts(job), 2)
    source.publish([], 0)
    monkeypatch.setattr("llmtrain.envs.tools.ToolEnvironment.step", lambda self, text: 1 / 0)
    with pytest.raises(RewardsFail, match=r"environment: failed on 4 of 4 completions, .* ZeroDivisionError"):
        source.take(0)
