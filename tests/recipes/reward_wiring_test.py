"""What a reward model's recipe hands to the engine, in absolute values. Pairs and losses have tests of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrain.data.pairs import Pairs
from llmtrain.recipes import reward
from llmtrain.rules.check import violations
from llmtrain.trainer import pairs as trainer_pairs
from llmtrain.trainer.job import Job
from llmtrain.types import Batch, Scores
from tests.recipes.conftest import run_steps
from tests.recipes.stubs import LR, NORM

STEPS, PAIRS = 3, 4  # pairs a step


def by_branch(batch: Batch) -> Scores:
    """Returns values of 3 and 2 at the last tokens of chosen and rejected answers, 99 elsewhere."""
    return Scores(values=torch.where(batch.loss_mask, 4.0 - batch.branch_ids, 99.0))


@pytest.fixture
def run(stub_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple]:
    """run(*overrides, rewinds=[], step=0) -> (job, what each step returned, what was noted)."""
    rows = [{"prompt": f"say {i}:", "chosen": str(i), "rejected": str(9 - i)} for i in range(10)]
    for name, chosen in {"train": rows, "held_out": rows[:5]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    files = [f"data.{name}={tmp_path / name}.jsonl" for name in ("train", "held_out")]

    def go(*overrides: str, rewinds: list[list[int]] | None = None, step: int = 0) -> tuple:
        job = stub_job("reward", *files, f"train.steps={STEPS}", f"train.global_batch_seqs={PAIRS}", *overrides)
        steps, noted = [], []
        job.engine.scores, job.guard.rewinds, job.step = by_branch, rewinds or [], step
        monkeypatch.setattr(reward, "build_engine", lambda job, total_updates: steps.append(total_updates))
        monkeypatch.setattr(reward, "train", run_steps(steps))
        monkeypatch.setattr(trainer_pairs, "note_evaluation", lambda job, scores: noted.append((job.step, scores)))
        reward.run(job)
        return job, steps, noted

    return go


def inputs_of(job: Job, step: int) -> list[list[int]]:
    """The tokens of all pairs of a step: each prompt once, then both answers whole."""
    found = []
    for batch in job.engine.updates[step][0]:
        for ids, segments in zip(batch.input_ids, batch.segment_ids, strict=True):
            found += [ids[segments == s].tolist() for s in segments.unique().tolist() if s >= 0]
    return sorted(found)


def expected(job: Job, step: int) -> list[list[int]]:
    """The next pairs in the order of the seed (1), laid out by hand."""
    pairs = Pairs(job.config.data.train, job.tokenizer, 64, seed=1)
    groups = pairs.groups(range(step * PAIRS, (step + 1) * PAIRS))
    return sorted([*c.prompt_ids[:-1], c.prompt_ids[-1], *c.ids, c.prompt_ids[-1], *r.ids] for c, r in groups)


def test_a_step_takes_the_next_pairs_and_divides_by_their_number(run: Callable) -> None:
    job, (total_updates, *steps), noted = run()
    assert total_updates == STEPS and noted == []
    for step, (metrics, tokens) in enumerate(steps):
        batches, denominator, _ = job.engine.updates[step]
        assert denominator == PAIRS and inputs_of(job, step) == expected(job, step)
        assert sum(int(batch.loss_mask.sum()) for batch in batches) == 2 * PAIRS
        assert all((batch.input_ids[batch.loss_mask] == job.tokenizer.eos_id).all() for batch in batches)
        assert tokens == sum(int((batch.segment_ids >= 0).sum()) for batch in batches)
        assert metrics == {
            **{"loss": pytest.approx(math.log1p(math.exp(-1)) + 0.01 * 25), "grad_norm": NORM, "lr": LR},
            **{"accuracy": 1.0, "margin": 1.0, "chosen_reward": 3.0, "rejected_reward": 2.0},
        }


def test_the_centring_has_a_key(run: Callable) -> None:
    _, (_, (metrics, _), *_), _ = run("reward.center_coef=0.1")
    assert metrics["loss"] == pytest.approx(math.log1p(math.exp(-1)) + 0.1 * 25)


def test_pairs_after_a_rewind_and_a_resume(run: Callable) -> None:
    job, *_ = run(rewinds=[[1, 2, 1024]])
    assert [inputs_of(job, step) for step in range(STEPS)] == [expected(job, step) for step in (0, 3, 4)]
    job, *_ = run(step=2)
    assert inputs_of(job, 0) == expected(job, 2)


def test_epochs_count_pairs(run: Callable) -> None:
    _, steps, _ = run("train.epochs=1.5")
    assert steps[0] == len(steps[1:]) == 4  # 15 pairs, 4 a step


def test_held_out_pairs_are_measured_while_it_trains(run: Callable) -> None:
    """The first 3 of 5; all are right: Wilson's interval of 3 of 3."""
    job, (_, *steps), noted = run("train.eval_every_steps=2", "train.eval_seqs=3")
    assert [step for step, _ in noted] == [0, 2, STEPS]
    for _, scores in noted:
        assert scores == {
            **{"loss": pytest.approx(math.log1p(math.exp(-1)) + 0.25), "accuracy": 1.0, "margin": 1.0, "pairs": 3},
            **{"accuracy_low": pytest.approx(0.4385, abs=1e-4), "accuracy_high": 1.0},
            **{"chosen_reward": 3.0, "rejected_reward": 2.0},
        }
    assert [metrics.get("held_out_accuracy_low") is not None for metrics, _ in steps] == [True, False, True]
    held_out = Pairs(job.config.data.held_out, job.tokenizer, 64, 1, at_end=True).groups(range(3))
    taken = [row for batch in job.engine.scored[0] for row in batch.input_ids[batch.segment_ids >= 0].tolist()]
    assert len(taken) == sum(len(c.prompt_ids) - 1 + len(c.ids) + len(r.ids) for c, r in held_out)


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("data.replay_seqs=2", "data.replay_seqs=2: must be 0 in reward, whose head predicts no text; remove it"),
        ("model.head=lm", "model.head=lm: reward trains a model with one number a position; set model.head=scalar"),
        ("model.lora={}", "model.lora: not with model.head=scalar"),
    ],
)
def test_what_does_not_go_with_it_is_refused(stub_job: Callable[..., Job], key: str, line: str) -> None:
    found = violations(stub_job("reward", "model.head=scalar", key).config, 1, "reward")
    assert any(each.startswith(line) for each in found), found
    found = violations(stub_job("reward", "model.head=scalar").config, 1, "reward")
    assert not any(each.startswith(line) for each in found), found
