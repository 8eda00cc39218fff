"""What pretraining hands to the engine, in absolute values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmtrain.data.mix import MixSettings
from llmtrain.data.packing import TextRows
from llmtrain.recipes import pretrain
from llmtrain.trainer.job import Job
from tests.recipes.conftest import run_steps
from tests.recipes.stubs import LR, NORM, shifted

RAMPS = (
    "train.batch_ramp=[{from_tokens: 1024, global_batch_seqs: 16}]",
    "train.seq_ramp=[{from_tokens: 1024, seq_len: 128, rope_theta: 50000.0}]",
)


@pytest.fixture
def run(stub_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Job, list, list]]:
    """run(*overrides, rewinds=[]) -> (job, what each step returned, evaluations as (step, loss))."""

    def go(*overrides: str, rewinds: list[list[int]] | None = None, step: int = 0) -> tuple[Job, list, list]:
        job, steps, noted = stub_job("pretrain", "train.steps=3", *overrides), [], []
        job.guard.rewinds, job.step = rewinds or [], step
        job.engine.scores = shifted(-2.0)
        job.engine.parts = [SimpleNamespace(config=job.model)]
        monkeypatch.setattr(pretrain, "join", lambda config, recipe: job)
        monkeypatch.setattr(pretrain, "train", run_steps(steps))
        monkeypatch.setattr(pretrain, "build_engine", lambda job, total_updates: steps.append(total_updates))
        monkeypatch.setattr(pretrain, "note_evaluation", lambda job, scores: noted.append((job.step, scores["loss"])))
        score, job.scored_with = job.engine.score, []
        job.engine.score = lambda b: job.scored_with.append(job.engine.parts[0].config.rope_theta) or score(b)
        monkeypatch.setattr(pretrain, "shutdown", lambda: None)
        train_step, job.thetas = job.engine.train_step, []
        job.engine.train_step = lambda *args: (
            job.thetas.append(job.engine.parts[0].config.rope_theta) or train_step(*args)
        )
        pretrain.main(job.config)
        return job, steps, noted

    return go


def rows_taken(job: Job, step: int) -> list[list[int]]:
    return [row for batch in job.engine.updates[step][0] for row in batch.input_ids.tolist()]


def text(job: Job, samples: range, seq_len: int = 64, longest: int = 64) -> list[list[int]]:
    rows = TextRows(job.config.data.path, "train", longest, 1, True, mix=MixSettings())  # the document's seed
    return rows.batch(samples, seq_len).input_ids.tolist()


def test_a_step_takes_the_next_rows_and_divides_by_their_trained_tokens(run: Callable) -> None:
    job, (total_updates, *steps), noted = run()
    assert total_updates == 3 and noted == [(0, pytest.approx(2.0)), (3, pytest.approx(2.0))]
    for step, (metrics, tokens) in enumerate(steps):
        batches, denominator, _ = job.engine.updates[step]
        assert [batch.input_ids.shape for batch in batches] == [(2, 64)] * 4
        assert rows_taken(job, step) == text(job, range(8 * step, 8 * step + 8))
        assert denominator == sum(int(batch.loss_mask.sum()) for batch in batches) > 0
        shape = {"seq_len": 64, "global_batch_seqs": 8}
        assert metrics == {"loss": pytest.approx(2.0), "grad_norm": NORM, "lr": LR, **shape} and tokens == 512


def test_evaluations_are_taken_when_they_are_due(run: Callable) -> None:
    _, _, noted = run("train.steps=5", "train.eval_every_steps=2")
    assert [step for step, _ in noted] == [0, 2, 4, 5]


def test_rows_that_a_rewind_skipped_are_not_taken_again(run: Callable) -> None:
    job, _, _ = run(rewinds=[[1, 2, 1024]])  # from step 1 on, 1,024 tokens = 16 rows are skipped
    assert rows_taken(job, 0) == text(job, range(8))
    assert rows_taken(job, 1) == text(job, range(24, 32)) and rows_taken(job, 2) == text(job, range(32, 40))


def test_ramps_change_batch_rows_and_rope_together(run: Callable) -> None:
    """Two steps of 8 x 64 tokens, then one of 16 x 128, which begins with token 1,024."""
    job, (_, *steps), _ = run(*RAMPS)
    assert [tokens for _, tokens in steps] == [512, 512, 2048] and job.thetas == [10000.0, 10000.0, 50000.0]
    assert rows_taken(job, 1) == text(job, range(8, 16), 64, 128)
    assert rows_taken(job, 2) == text(job, range(8, 24), 128, 128)
    assert [m["seq_len"] for m, _ in steps] == [64, 64, 128] and steps[2][0]["global_batch_seqs"] == 16


def test_a_resumed_run_evaluates_with_the_rope_of_its_weights(run: Callable) -> None:
    job, _, noted = run(*RAMPS, "train.steps=4", "train.eval_every_steps=3", step=3)  # step 2 was the first of 50000
    assert [step for step, _ in noted] == [3, 4] and set(job.scored_with) == {50000.0}


@pytest.mark.parametrize("workers", [1, 4])
def test_rows_that_were_read_ahead_are_the_same(run: Callable, workers: int) -> None:
    job, (_, *steps), _ = run(f"data.loader_workers={workers}", *RAMPS)
    assert rows_taken(job, 1) == text(job, range(8, 16), 64, 128)
    assert rows_taken(job, 2) == text(job, range(8, 24), 128, 128) and len(steps) == 3


def test_rewinds_and_workers(run: Callable) -> None:
    job, _, _ = run("data.loader_workers=2", rewinds=[[1, 2, 1024]])
    assert rows_taken(job, 1) == text(job, range(24, 32)) and rows_taken(job, 2) == text(job, range(32, 40))


def test_shares_are_noted_where_lines_are_written(run: Callable, tmp_path: Path, small_data: Path) -> None:
    """Three rows of each of two sources, and from step 2 on one alone; a line every second step."""
    shards = tmp_path / "shards"
    shards.mkdir()
    manifest = json.loads((small_data / "shards" / "shards.json").read_text())
    counts = manifest["sources"]["topics"]
    for name in ("a", "b"):
        for file in (small_data / "shards").glob("topics-*"):
            shutil.copy(file, shards / file.name.replace("topics", name))
    (shards / "shards.json").write_text(json.dumps(manifest | {"sources": {"a": counts, "b": counts}}))
    sources = "[{name: a, type: topics, weight: 3.0}, {name: b, type: topics}]"
    anneal = "data.anneal=[{from_step: 2, weights: {b: 1.0}}]"
    _, (_, *steps), _ = run(
        f"data.path={shards}", f"data.sources={sources}", anneal, "train.steps=4", "log.every_steps=2"
    )
    noted = [{name: value for name, value in metrics.items() if name.startswith("share/")} for metrics, _ in steps]
    assert noted == [{}, {"share/a": 0.75, "share/b": 0.25}, {}, {"share/a": 0.375, "share/b": 0.625}]


def test_a_source_that_does_not_last_is_refused_before_the_model_is_built(run: Callable) -> None:
    with pytest.raises(ValueError, match=r"max_epochs leaves [\d,]+ rows, and the run takes 8,000; raise max_epochs"):
        run("data.sources=[{name: topics, type: topics, max_epochs: 1.0}]", "train.steps=1000")
