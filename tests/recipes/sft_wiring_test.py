"""What SFT hands to the engine, in absolute values."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.data.mix import MixSettings
from llmtrain.data.packing import Demonstrations, TextRows
from llmtrain.recipes import sft
from llmtrain.trainer.batches import demonstration_microbatches
from llmtrain.trainer.job import Job
from tests.recipes.conftest import run_steps
from tests.recipes.stubs import LR, NORM, shifted


@pytest.fixture
def run(stub_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Job, list]]:
    """run(*overrides, rewinds=[]) -> (job, what each step returned)."""

    def go(*overrides: str, rewinds: list[list[int]] | None = None) -> tuple[Job, list]:
        job, steps = stub_job("sft", "train.steps=3", *overrides), []
        job.guard.rewinds = rewinds or []
        job.engine.scores = shifted(-2.0)
        for name, stub in {"join": lambda config, recipe: job, "train": run_steps(steps)}.items():
            monkeypatch.setattr(sft, name, stub)
        monkeypatch.setattr(sft, "build_engine", lambda job, total_updates: steps.append(total_updates))
        monkeypatch.setattr(sft, "shutdown", lambda: None)
        sft.main(job.config)
        return job, steps

    return go


def rows_taken(job: Job, step: int) -> list[list[int]]:
    """The ids of all rows of a step, in order."""
    return [row for batch in job.engine.updates[step][0] for row in batch.input_ids.tolist()]


def expected_rows(job: Job, step: int, pack: bool = True) -> list[list[int]]:
    """Eight rows a step (train.global_batch_seqs), in the order of the seed (1), as wide as the longest needs."""
    rows, samples = Demonstrations(job.config.data.train, job.tokenizer, 64, 1, pack), range(8 * step, 8 * step + 8)
    longest = max(len(rows.row(sample)["labels"]) for sample in samples)
    return rows.batch(samples, -(-longest // 16) * 16).input_ids.tolist()


def test_a_step_takes_the_next_rows_and_divides_by_their_trained_tokens(run: Callable) -> None:
    job, (total_updates, *steps) = run()
    assert total_updates == 3
    for step, (metrics, tokens) in enumerate(steps):
        batches, denominator, _ = job.engine.updates[step]
        assert [batch.input_ids.shape for batch in batches] == [(2, 64)] * 4
        assert rows_taken(job, step) == expected_rows(job, step)
        assert denominator == sum(int(batch.loss_mask.sum()) for batch in batches) > 0
        assert tokens == 8 * 64
        assert metrics == {"loss": pytest.approx(2.0), "grad_norm": NORM, "lr": LR}


def test_rows_that_a_rewind_skipped_are_not_taken_again(run: Callable) -> None:
    job, _ = run(rewinds=[[1, 2, 1024]])  # from step 1 on, two steps are skipped
    assert [rows_taken(job, step) for step in range(3)] == [expected_rows(job, step) for step in (0, 3, 4)]


def test_replay_brings_text_by_its_weight(run: Callable) -> None:
    """All log-probs are -2: the mean loss is 2, and 0.25 x 2 for the text."""
    job, (_, *steps) = run("data.replay_seqs=4", "data.replay_weight=0.25", "train.steps=2")
    text = TextRows(job.config.data.path, "train", 64, 1, True, mix=MixSettings())
    for step, (metrics, tokens) in enumerate(steps):
        batches, denominator, _ = job.engine.updates[step]
        own, replayed = batches[:4], batches[4:]
        assert denominator == sum(int(batch.loss_mask.sum()) for batch in own)
        assert [row for b in replayed for row in b.input_ids.tolist()] == text.batch(
            range(4 * step, 4 * step + 4)
        ).input_ids.tolist()
        assert metrics["loss"] == pytest.approx(2.0 + 0.25 * 2.0, rel=1e-5)
        assert metrics["replay_loss"] == pytest.approx(2.0, rel=1e-5)
        assert tokens == (8 + 4) * 64


def test_epochs_are_as_many_steps_as_their_rows_take(run: Callable) -> None:
    """A document that gives epochs gives no steps; rows of several examples count as one."""
    job, (total_updates, *steps) = run("train.epochs=2.5")
    rows = len(Demonstrations(job.config.data.train, job.tokenizer, 64, seed=1))
    assert total_updates == len(steps) == -(-25 * rows // 80)
    taken = [ids for step in range(len(steps)) for ids in rows_taken(job, step)]
    assert len({tuple(ids) for ids in taken}) == rows


def test_each_example_has_its_own_row_without_packing(run: Callable) -> None:
    job, _ = run("data.pack=false", "train.steps=1", "train.seq_len=128")
    rows = Demonstrations(job.config.data.train, job.tokenizer, 128, seed=1, pack=False)
    assert len(rows) == 64 and rows_taken(job, 0) == expected_rows(job, 0, pack=False)
    assert len(rows_taken(job, 0)[0]) == 64  # rows are no longer than needed


def trained_tokens(job: Job) -> list[int]:
    batches, denominator, _ = job.engine.updates[0]
    labels = [x for batch in batches for x in batch.labels[batch.loss_mask].tolist()]
    assert denominator == len(labels)
    return sorted(labels)


def test_microbatches_by_tokens_have_the_same_rows_with_less_padding(run: Callable, tmp_path: Path) -> None:
    """One example a row, one of them long: else each of the eight rows is as wide as that one."""
    answers = ["9 " * 40, *(f"{i} " * 4 for i in range(7))]
    lines = [json.dumps({"prompt": "say:", "answer": answer}) + "\n" for answer in answers]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    settings = ("data.pack=false", "train.steps=1", "train.seq_len=192", f"data.train={tmp_path / 'rows.jsonl'}")
    rows, _ = run(*settings)
    before = sum(batch.input_ids.numel() for batch in rows.engine.updates[0][0])
    job, (_, (metrics, _)) = run(*settings, "train.micro_batch_tokens=192")
    batches = job.engine.updates[0][0]
    assert trained_tokens(job) == trained_tokens(rows)
    assert sum(batch.input_ids.numel() for batch in batches) < before / 2
    assert len({batch.input_ids.shape for batch in batches}) == 1 and batches[0].input_ids.numel() <= 192
    assert metrics["loss"] == pytest.approx(2.0)


def test_rows_that_text_is_mixed_with_have_its_width_in_a_pipeline(stub_job: Callable[..., Job]) -> None:
    job = stub_job("sft", "train.seq_len=128")
    rows = Demonstrations(job.config.data.train, job.tokenizer, 128, seed=1, pack=False)
    staged = replace(job.mesh, sizes={**job.mesh.sizes, "pp": 2})
    for mesh, with_text, width in ((job.mesh, True, 64), (staged, False, 64), (staged, True, 128)):
        batches = demonstration_microbatches(replace(job, mesh=mesh), rows, 0, with_text)
        assert {batch.input_ids.size(1) for batch in batches} == {width}


def test_held_out_demonstrations_are_measured_while_it_trains(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """All log-probs are -2: the mean loss is 2 whatever the padding, over the first `train.eval_seqs` rows."""
    noted = []
    monkeypatch.setattr(sft, "note_evaluation", lambda job, scores: noted.append((job.step, scores)))
    job, _ = run("train.eval_every_steps=2", "train.eval_seqs=3", "train.steps=5")
    assert [step for step, _ in noted] == [0, 2, 4, 5]
    assert all(scores == pytest.approx({"loss": 2.0, "perplexity": 7.389056}) for _, scores in noted)
    rows = Demonstrations(job.config.data.held_out, job.tokenizer, 64, seed=1)
    scored = [row for batch in job.engine.scored[0] for row in batch.input_ids.tolist()]
    assert scored[:3] == rows.batch(range(3)).input_ids.tolist()
    assert run()[0].engine.scored == [] and len(noted) == 4
