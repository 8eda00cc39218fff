"""What a run measures beside its training, when, and where it is written, in absolute values."""

from __future__ import annotations

import json
import math
import random
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.group import LocalGroup
from llmtrain.commands.stage_files import read_paths
from llmtrain.config.load import load
from llmtrain.config.recipes import RECIPES
from llmtrain.observe.contents import Checksums
from llmtrain.rules.check import violations
from llmtrain.trainer import evaluating
from llmtrain.trainer.evaluating import Evaluation
from llmtrain.trainer.identity import Record as RunRecord
from llmtrain.trainer.identity import contents_of, differences, record_of
from llmtrain.trainer.job import Job, resolved
from llmtrain.trainer.record import Record
from llmtrain.types import Batch, Group, Prompt, Sampling, Scores
from tests.recipes.conftest import one_rank, stub_job  # noqa: F401  fixtures
from tests.recipes.stubs import StubGenerator, shifted

PROBLEMS = 4
SETTINGS = ("rewards=[{name: first_integer}]", f"eval.problems={PROBLEMS}", "eval.samples=2", "eval.text_seqs=3")


class Answers(StubGenerator):
    """Answers problem i rightly once greedily; sampled once rightly and once wrongly, of every second one both
    wrongly."""

    def sleep(self) -> None:
        self.slept = True

    def wake(self) -> None:
        self.slept = False


def answering(job: Job) -> Answers:
    encode = job.tokenizer.encode
    numbers = {tuple(encode(f"say {i}:", parse_special=False)): i for i in range(PROBLEMS + 1)}

    def answers(prompt: Prompt) -> list[list[int]]:
        number = numbers[tuple(prompt.ids)]
        right, wrong = (encode(text, parse_special=False) for text in (str(number), "99"))
        if generator.asked[-1][1].temperature == 0:
            return [right]
        return [right if number % 2 == 0 else wrong, wrong]

    generator = Answers(answers, job.tokenizer.eos_id)
    generator.loaded.append((0, 0))
    return generator


@pytest.fixture
def start(stub_job: Callable[..., Job], tmp_path: Path) -> Callable[..., Job]:  # noqa: F811
    """start(recipe, *overrides) -> a job whose log-probs are -2, with problems and a generator."""
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"say {i}:", "answer": str(i)} for i in range(PROBLEMS + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(recipe: str, *overrides: str) -> Job:
        job = stub_job(recipe, *SETTINGS, f"data.held_out={path}", *overrides)
        job.engine.scores = shifted(-2.0)
        job.generator = answering(job)
        return job

    return make


def measured(job: Job) -> dict[int, dict[str, float]]:
    """What each step of a run measures, by its number."""
    evaluation = Evaluation(job)
    found = {0: evaluation.at_start()}
    while job.step < job.config.train.steps:
        job.step += 1
        found[job.step] = evaluation.after_step()
    return {step: each for step, each in found.items() if each}


def test_the_measures_by_hand(start: Callable[..., Job]) -> None:
    """All greedy answers are right. Of two samples of the problems 0 to 3, one, none, one, none is: pass@1 1/4, pass@2
    1/2; the first of two answers that tie decides: majority 1/2. All log-probs of text are -2."""
    job = start("grpo", "eval.every_steps=3", "train.steps=3")
    found = measured(job)
    assert list(found) == [0, 3]
    values = found[3]
    assert values.pop("eval_s") >= 0 and values.pop("eval/bits_per_byte") > 0
    assert values == pytest.approx(
        {"eval/loss": 2.0, "eval/perplexity": math.exp(2), "eval/greedy": 1.0, "eval/pass@1": 0.25}
        | {"eval/pass@2": 0.5, "eval/maj@2": 0.5, "eval/entropy": 1.0, "eval/problems": 4, "eval/reward_errors": 0}
        | {"eval/avg@2": 0.25, "eval/tokens": (4 + 2 + 6 * 2) / 12, "eval/cut_off": 1.0}  # 99 is two tokens
    )
    assert sum(int(batch.loss_mask.sum()) for batch in job.engine.scored[0]) == 3 * 64  # eval.text_seqs rows
    assert [len(prompts) for prompts, _ in job.generator.asked] == [4, 4] * 2
    assert job.generator.slept is False and not job.generator.closed


@pytest.mark.parametrize(
    ("every_steps", "first", "expected"),
    [(0, 0, []), (2, 0, [0, 2, 4, 5]), (5, 0, [0, 5]), (9, 0, [0, 5]), (2, 2, [4, 5]), (2, 3, [4, 5]), (2, 5, [])],
)
def test_a_run_measures_at_its_steps_also_when_it_goes_on(
    start: Callable[..., Job], every_steps: int, first: int, expected: list[int]
) -> None:
    job = start("sft", f"eval.every_steps={every_steps}", "train.steps=5", "eval.problems=0")
    job.step = first
    assert list(measured(job)) == expected
    assert all(set(each) > {"eval/loss"} and "eval/pass@1" not in each for each in measured(job).values())


def test_nothing_is_left_behind(start: Callable[..., Job]) -> None:
    """Random streams go on where they were, whatever is drawn from them meanwhile, and the recipe's state stays."""

    def scores(batch: Batch) -> Scores:
        random.random()
        torch.rand(3)
        return shifted(-2.0)(batch)

    job = start("grpo", "eval.every_steps=1", "train.steps=2")
    job.engine.scores, job.state = scores, {"prompts": 8}
    random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), torch.rand(2).tolist()
    random.seed(3)
    torch.manual_seed(3)
    measured(job)
    assert (random.random(), torch.rand(2).tolist()) == expected
    assert job.state == {"prompts": 8} and job.engine.updates == [] and job.generator.loaded == [(0, 0)]


def test_a_recipe_that_samples_nothing_gets_a_whole_model_for_the_evaluation(
    start: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = start("pretrain", "eval.every_steps=2", "train.steps=2", "eval.text=false")
    generator, job.generator, made = job.generator, None, []
    monkeypatch.setattr(evaluating, "whole_model", lambda job: made.append(job.step) or generator)
    found = measured(job)
    assert made == [0, 2] and found[2]["eval/pass@1"] == 0.25 and "eval/loss" not in found[2]


class Workers:
    """Stands in for workers that sample ahead: what they are asked waits until `answer` is set."""

    def __init__(self, job: Job) -> None:
        self.job, self.local, self.answer, self.versions = job, job.generator, threading.Event(), []
        self.ranks = LocalGroup()
        job.generator, job.ahead = None, self

    def pinned(self) -> Workers:
        self.versions.append(self.job.step)
        return self

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        assert self.answer.wait(20)
        return self.local.generate(prompts, sampling)


def written(job: Job) -> list[tuple[int, bool, bool]]:
    """Of each line: its step, whether it has a loss on text, and whether it has answers, which must be right."""
    lines = [json.loads(line) for line in (Path(job.config.directory) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval/pass@1" in line:
            assert (line["eval/pass@1"], line["eval/greedy"], line["eval/problems"]) == (0.25, 1.0, 4)
            assert line["eval_beside_s"] >= 0
    return [(line["step"], "eval/loss" in line, "eval/pass@1" in line) for line in lines]


def test_problems_are_answered_beside_training(start: Callable[..., Job]) -> None:
    """What is found later stands in the line of the step whose weights were asked."""
    job, saves = start("grpo", "eval.every_steps=2", "train.steps=5", "log.every_steps=4"), []
    workers = Workers(job)
    evaluation = Evaluation(job)
    with Record(job) as record:
        record.write_start(evaluation.at_start())
        for job.step in range(1, 6):
            if job.step == 3:  # what step 2 asked is answered, what step 4 asks is not yet
                evaluation.beside.future.result(20)
            workers.answer.clear() if job.step in (1, 4) else workers.answer.set()
            record.write(job, {"loss": 1.0}, 10, 0.5, lambda *shown: None, evaluation.after_step())
            record.complete(job, evaluation.late())
            if job.step == 1:
                assert written(job) == [(0, True, False)]
            if job.step == 3:
                assert written(job) == [(0, True, True), (2, True, True)]
            if job.step == 4:  # it is saved at once: these weights are there when the run goes on from here
                record.complete(job, evaluation.before_save())
                assert written(job) == [(0, True, True), (2, True, True), (4, True, False)]
            if job.step == 5:  # the end
                saves.append(evaluation.beside.step)
                record.complete(job, evaluation.before_save())
    assert workers.versions == [0, 2, 4, 5] and saves == [5] and evaluation.beside.step is None
    assert written(job) == [(step, True, True) for step in (0, 2, 4, 5)]


def test_a_save_waits_for_what_earlier_weights_answer(start: Callable[..., Job]) -> None:
    job = start("grpo", "eval.every_steps=4", "train.steps=9", "eval.text=false")
    workers = Workers(job)
    evaluation = Evaluation(job)
    assert list(evaluation.at_start()) == ["eval_s"]
    job.step = 3
    assert evaluation.late() == {}
    threading.Timer(0.1, workers.answer.set).start()
    found = evaluation.before_save()
    assert list(found) == [0] and found[0]["eval/pass@1"] == 0.25 and evaluation.late() == {}


@pytest.mark.parametrize(("held", "asked"), [({}, [4]), ({"eval/problems": 4}, [])])
def test_a_run_that_goes_on_asks_again_what_was_not_answered(
    held: dict, asked: list[int], start: Callable[..., Job]
) -> None:
    job = start("grpo", "eval.every_steps=2", "train.steps=8", "eval.text=false")
    workers, path = Workers(job), Path(job.config.directory) / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "eval_s": 0.0, **held}) + "\n" for step in (0, 2, 4)))
    workers.answer.set()
    job.step = 4
    evaluation = Evaluation(job)
    assert evaluation.at_start() == {} and workers.versions == asked
    assert list(evaluation.beside.settle()) == asked
    job.step = 5
    assert Evaluation(job).at_start() == {} and workers.versions == asked  # nothing was due there


def test_every_measure_has_its_line(start: Callable[..., Job]) -> None:
    """Also before the first step, and where log.every_steps leaves a step out. A run that starts anew writes the first
    line again."""
    job, bar = start("grpo", "log.every_steps=4"), []
    for _ in range(2):
        job.step = job.tokens = 0
        with Record(job) as record:
            record.write_start({"eval/pass@1": 0.5})
            for job.step in (1, 2, 3, 4):
                own = {"eval/pass@1": 0.75} if job.step == 2 else {}
                record.write(job, {"loss": 1.0}, 10, 0.5, lambda *shown: bar.append(shown), own)
    lines = [json.loads(line) for line in (Path(job.config.directory) / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("loss"), line.get("eval/pass@1")) for line in lines] == [
        (0, None, 0.5),
        (2, 1.0, 0.75),
        (4, 1.0, None),
    ]


@pytest.mark.parametrize(
    ("command", "keys", "message"),
    [
        ("sft", ["data.path=null", "eval.problems=0"], "eval.every_steps=2: has nothing to measure; set data.path for"),
        ("sft", ["data.path=null", "data.held_out=null"], "eval.every_steps=2: has nothing to measure; set data.path"),
        ("reward", [], "eval.every_steps=2: reward trains a model that writes no tokens; use train.eval_every_steps"),
        ("sft", ["data.held_out=no.jsonl"], "data.held_out=no.jsonl: does not exist"),
        ("pretrain", ["rewards=[]"], r"rewards=\[\]: must name at least one reward"),
        ("pretrain", ["rollout.max_new_tokens=64"], "rollout.max_new_tokens=64: must be less than train.seq_len=64"),
        ("sft", ["rewards=[{model: a/b}]"], "rewards.b.model=a/b: eval calls an answer right by its first reward"),
    ],
)
def test_what_cannot_be_measured_is_refused(small: Path, command: str, keys: list[str], message: str) -> None:
    found = violations(load(str(small), ["eval.every_steps=2", "model.init_from=null", *keys]), 1, command)
    assert any(re.match(message, line) for line in found), found
    off = violations(load(str(small), ["model.init_from=null", *keys]), 1, command)
    assert not any(re.match("eval.every_steps", line) for line in off)


def test_a_run_that_goes_on_measures_the_same(small: Path) -> None:
    """What is not measured may change: the keys are also those of `llmtrain eval`."""

    def record(*keys: str) -> RunRecord:
        return record_of(resolved(load(str(small), list(keys))), RECIPES["pretrain"], {})

    def other(was: list[str], now: list[str]) -> list[tuple]:
        return differences(record(*was), record(*now), RECIPES["pretrain"])

    on, more = "eval.every_steps=2", "eval.problems=5"
    assert other([on], [on, more]) == [("eval.problems", 256, 5)]
    assert (
        other([on], ["eval.every_steps=3"]) == other([], [on, more]) == other([on], [more]) == other([], [more]) == []
    )


def test_answers_are_sampled_and_judged_as_before(small: Path) -> None:
    """By the first reward, also where the recipe itself neither samples nor judges; where no problem is answered,
    nothing of it counts."""

    def other(*keys: str, shared: str = "eval.problems=4") -> list[str]:
        on = ("eval.every_steps=2", shared, "rewards=[{name: math}]")
        was, now = (record_of(resolved(load(str(small), [*on, *more])), RECIPES["sft"], {}) for more in ((), keys))
        return [key for key, *_ in differences(was, now, RECIPES["sft"])]

    changed = ("rollout.temperature=0.5", "rollout.max_new_tokens=4", "rewards=[{name: first_integer}]")
    assert other(*changed) == ["rollout.max_new_tokens", "rollout.temperature", "rewards"]
    assert other(*changed, shared="eval.problems=0") == other(*changed, "data.held_out=null") == []
    assert other("rollout.group_size=2", "rewards=[{name: math}, {name: first_integer}]") == []


def test_the_code_that_judges_the_answers_is_noted(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(): return 1")
    rewards = f"rewards=[{{function: {tmp_path}/mine.py:score}}]"

    def noted(*keys: str) -> list[str]:
        config = load(str(small), [rewards, *keys])
        found = contents_of(config, RECIPES["pretrain"], str(tmp_path), str(tmp_path), Checksums())
        return [key for key in found if key.startswith("rewards")]

    assert (
        noted("eval.every_steps=2")
        == ["rewards.score"]
        == [
            key
            for key, _ in read_paths("pretrain", load(str(small), [rewards, "eval.every_steps=2"]))
            if "rewards" in key
        ]
    )
    assert noted() == noted("eval.every_steps=2", "eval.problems=0") == []


def test_text_that_nothing_holds_out_is_refused(start: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "holds_out", lambda directory: False)
    with pytest.raises(ValueError, match=r"eval.every_steps=2: .* holds no text out .*; raise data.sources"):
        Evaluation(start("pretrain", "eval.every_steps=2", "eval.problems=0"))
