"""What DPO hands to the engine and its reference, in absolute values. The losses have tests of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrain.data.mix import MixSettings
from llmtrain.data.packing import TextRows
from llmtrain.data.pairs import Pairs
from llmtrain.recipes import dpo
from llmtrain.rules.check import violations
from llmtrain.trainer import pairs as trainer_pairs
from llmtrain.trainer import precomputed
from llmtrain.trainer.job import Job
from llmtrain.types import IGNORE, Batch, Scores
from tests.recipes.conftest import run_steps
from tests.recipes.stubs import LR, NORM, StubScorer, shifted

STEPS, PAIRS = 3, 4  # pairs a step


def by_branch(chosen: float, rejected: float) -> Callable[[Batch], Scores]:
    """Returns scores that give each token of a chosen answer one log-prob, each of a rejected one another."""

    def scores(batch: Batch) -> Scores:
        each = torch.where(batch.branch_ids == 1, chosen, rejected)
        return Scores(logprobs=torch.where(batch.loss_mask, each, 0.0))

    return scores


class Run:
    """DPO with stubs on 10 pairs; an answer is one digit and the end, so two tokens."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job, self.steps, self.totals, self.noted, self.wanted = job, [], [], [], []
        self.reference = StubScorer(by_branch(-2.0, -2.0))
        job.engine.scores = by_branch(-1.0, -3.0)
        monkeypatch.setattr(dpo, "build_engine", lambda job, total_updates: self.totals.append(total_updates))
        monkeypatch.setattr(dpo, "build_reference", self.build)
        monkeypatch.setattr(dpo, "train", run_steps(self.steps))
        monkeypatch.setattr(trainer_pairs, "note_evaluation", lambda job, scores: self.noted.append((job.step, scores)))

    def build(self, job: Job, wanted: bool, waits: bool) -> StubScorer | None:
        self.wanted.append(wanted)
        self.waits = waits
        return self.reference if wanted else None

    def go(self) -> Run:
        dpo.run(self.job)
        return self

    def pairs_of(self, step: int) -> list[tuple[int, ...]]:
        """The trained tokens of each pair of a step, sorted."""
        found = []
        for batch in self.job.engine.updates[step][0]:
            for row, segments in zip(batch.labels, batch.segment_ids, strict=True):
                ids = [row[(segments == s) & (row != IGNORE)].tolist() for s in segments.unique().tolist() if s >= 0]
                found += [tuple(each) for each in ids if each]
        return sorted(found)


@pytest.fixture
def start(stub_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """start(*overrides) -> Run, ready to go."""
    rows = [{"prompt": f"say {i}:", "chosen": str(i), "rejected": str(9 - i)} for i in range(10)]
    for name, chosen in {"train": rows, "held_out": rows[:5]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    files = [f"data.{name}={tmp_path / name}.jsonl" for name in ("train", "held_out")]

    def make(*overrides: str) -> Run:
        sizes = (f"train.steps={STEPS}", f"train.global_batch_seqs={PAIRS}", "rollout.temperature=0.5")
        return Run(stub_job("dpo", *files, *sizes, *overrides), monkeypatch)

    return make


def expected_pairs(run: Run, step: int) -> list[tuple[int, ...]]:
    """The next pairs in the order of the seed (1)."""
    pairs = Pairs(run.job.config.data.train, run.job.tokenizer, 64, seed=1)
    groups = pairs.groups(range(step * PAIRS, (step + 1) * PAIRS))
    return sorted(tuple(token for sample in group for token in sample.ids) for group in groups)


def test_a_step_takes_the_next_pairs_and_divides_by_their_number(start: Callable[..., Run]) -> None:
    run = start().go()
    assert run.totals == [STEPS] and run.wanted == [True]
    for step in range(STEPS):
        batches, denominator, _ = run.job.engine.updates[step]
        assert denominator == PAIRS and run.pairs_of(step) == expected_pairs(run, step)
        assert {batch.temperature for batch in batches} == {1.0}  # not that of rollout
        tokens = sum(int((batch.segment_ids >= 0).sum()) for batch in batches)
        assert run.steps[step][1] == tokens
    assert sum(map(len, run.reference.scored)) == sum(len(update[0]) for update in run.job.engine.updates)


def test_the_loss_and_its_metrics_by_hand(start: Callable[..., Run]) -> None:
    """An answer has two tokens: gained +2 and -2, rewards 0.2 and -0.2, a lead of 0.4."""
    run = start().go()
    for metrics, _ in run.steps:
        assert metrics == {
            **{"loss": pytest.approx(math.log1p(math.exp(-0.4))), "grad_norm": NORM, "lr": LR, "accuracy": 1.0},
            **{"margin": pytest.approx(0.4), "chosen_reward": pytest.approx(0.2)},
            **{"rejected_reward": pytest.approx(-0.2), "chosen_logprob": -2.0},
        }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("dpo.beta=0.5",), math.log1p(math.exp(-2))),
        (("dpo.label_smoothing=0.25",), 0.75 * math.log1p(math.exp(-0.4)) + 0.25 * math.log1p(math.exp(0.4))),
        (("dpo.length_normalized=true",), math.log1p(math.exp(-0.2))),
        (("dpo.nll_coef=5",), math.log1p(math.exp(-0.4)) + 5 * 1.0),
        (("dpo.loss=hinge",), 0.6),
        (("dpo.loss=ipo",), (4 - 5) ** 2),
        (("dpo.loss=ipo", "dpo.beta=0.25", "dpo.length_normalized=true"), 0.0),
        (("dpo.loss=simpo",), math.log1p(math.exp(-(2.5 * 2 - 1.375)))),
        (("dpo.loss=simpo", "dpo.beta=2", "dpo.gamma=1"), math.log1p(math.exp(-3))),
    ],
)
def test_every_key_of_the_section(start: Callable[..., Run], settings: tuple[str, ...], expected: float) -> None:
    run = start("train.steps=1", *settings).go()
    assert run.steps[0][0]["loss"] == pytest.approx(expected, abs=1e-6)
    assert run.wanted == ["dpo.loss=simpo" not in settings]
    assert ("nll" in run.steps[0][0]) == ("dpo.nll_coef=5" in settings)


def test_labels_of_the_rows_reach_the_loss(start: Callable[..., Run]) -> None:
    run = start("train.steps=1")
    path = Path(run.job.config.data.train)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "label": 0.75, "margin": 0.4}) + "\n" for row in rows))
    loss = 0.75 * math.log(2) + 0.25 * math.log1p(math.exp(0.8))
    assert run.go().steps[0][0]["loss"] == pytest.approx(loss)


def test_pairs_that_a_rewind_skipped_are_not_taken_again(start: Callable[..., Run]) -> None:
    run = start()
    run.job.guard.rewinds = [[1, 2, 1024]]
    run.go()
    assert [run.pairs_of(step) for step in range(STEPS)] == [expected_pairs(run, step) for step in (0, 3, 4)]


def test_a_resumed_run_goes_on_with_the_next_pairs(start: Callable[..., Run]) -> None:
    run = start()
    run.job.step = 2
    run.go()
    assert run.pairs_of(0) == expected_pairs(run, 2)


def test_epochs_count_pairs(start: Callable[..., Run]) -> None:
    run = start("train.epochs=1.5").go()
    assert run.totals == [4]  # 15 pairs, 4 a step


def test_replay_brings_text_by_its_weight(start: Callable[..., Run]) -> None:
    run = start("data.replay_seqs=4", "data.replay_weight=0.25")
    own = run.job.engine.scores
    run.job.engine.scores = lambda b: shifted(-3.0)(b) if "replay" in b.extra else own(b)
    run.go()
    text = TextRows(run.job.config.data.path, "train", 64, 1, True, mix=MixSettings())
    for step, (metrics, tokens) in enumerate(run.steps):
        batches, denominator, _ = run.job.engine.updates[step]
        replayed = [row for b in batches if "replay" in b.extra for row in b.input_ids.tolist()]
        assert replayed == text.batch(range(4 * step, 4 * step + 4)).input_ids.tolist() and denominator == PAIRS
        assert metrics["loss"] == pytest.approx(math.log1p(math.exp(-0.4)) + 0.25 * 3.0, rel=1e-5)
        pairs = sum(int((b.segment_ids >= 0).sum()) for b in batches if "replay" not in b.extra)
        assert tokens == pairs + 4 * 64


def test_held_out_pairs_are_measured_while_it_trains(start: Callable[..., Run]) -> None:
    """The first 3 of 5; all are right: Wilson's interval of 3 of 3."""
    run = start("train.eval_every_steps=2", "train.eval_seqs=3", "dpo.nll_coef=1").go()
    assert [step for step, _ in run.noted] == [0, 2, STEPS]
    for _, scores in run.noted:
        assert scores["loss"] == pytest.approx(math.log1p(math.exp(-0.4)) + 1.0)
        assert scores["accuracy"] == 1.0 and scores["pairs"] == 3 and scores["nll"] == pytest.approx(1.0)
        assert (scores["accuracy_low"], scores["accuracy_high"]) == (pytest.approx(0.4385, abs=1e-4), 1.0)
    assert [metrics.get("held_out_accuracy") for metrics, _ in run.steps] == [1.0, None, 1.0]
    taken = [row for batch in run.job.engine.scored[0] for row in batch.labels[batch.labels != IGNORE].tolist()]
    held_out = Pairs(run.job.config.data.held_out, run.job.tokenizer, 64, seed=1)
    assert sorted(taken) == sorted(t for pair in held_out.groups(range(3)) for s in pair for t in s.ids)


def test_more_held_out_pairs_than_a_step_has_are_measured_in_turns(start: Callable[..., Run]) -> None:
    run = start("train.eval_every_steps=5", "train.eval_seqs=50", "train.steps=1").go()
    assert len(run.job.engine.scored) == 2 * 2 and run.noted[0][1]["pairs"] == 5  # 4 and 1 pairs, before and after


class Reference:
    """Stands for the model that `precompute` builds, and counts how often it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built, self.weights = 0, "weights"
        monkeypatch.setattr(precomputed, "start_model", self.build)
        monkeypatch.setattr(precomputed, "locate", lambda path, mesh: self.weights)
        monkeypatch.setattr(precomputed, "fingerprint", lambda place: f"fingerprint of {place}")

    def build(self, job: Job) -> StubScorer:
        self.built += 1
        return StubScorer(by_token)


def by_token(batch: Batch) -> Scores:
    """Returns log-probs that tell the tokens apart."""
    return Scores(logprobs=torch.where(batch.loss_mask, -batch.labels / 1000, 0.0))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Reference:
    return Reference(monkeypatch)


PRECOMPUTED = ("dpo.reference=precomputed", "train.steps=1")


def test_a_precomputed_reference_equals_a_live_one(start: Callable[..., Run], model: Reference) -> None:
    live = start("train.eval_every_steps=1")
    live.reference = StubScorer(by_token)
    live.go()
    run = start("train.eval_every_steps=1", "dpo.reference=precomputed").go()
    assert run.wanted == [False] and model.built == 1
    for here, there in zip(run.steps, live.steps, strict=True):
        assert here[0] == pytest.approx(there[0], rel=1e-5) and here[1] == there[1]
    assert run.noted == [(step, pytest.approx(scores, rel=1e-5)) for step, scores in live.noted]


def test_log_probs_are_kept_beside_what_they_were_made_from(
    start: Callable[..., Run], model: Reference, tmp_path: Path
) -> None:
    first = start(*PRECOMPUTED).go()
    kept = json.loads((tmp_path / "run" / "reference-train.json").read_text())
    pairs = Pairs(first.job.config.data.train, first.job.tokenizer, 64, seed=1).pairs
    expected = [[-sum(s.ids) / 1000 for s in pair] for pair in pairs]
    assert kept["logprobs"] == [pytest.approx(each, rel=1e-5) for each in expected]
    assert kept["made_from"]["weights"] == "fingerprint of weights" and kept["made_from"]["precision"] == "fp32"
    assert start(*PRECOMPUTED).go().steps == first.steps and model.built == 1  # read again


def test_log_probs_of_something_else_are_computed_again(
    start: Callable[..., Run], model: Reference, tmp_path: Path
) -> None:
    run = start(*PRECOMPUTED).go()
    model.weights = "others"
    start(*PRECOMPUTED).go()
    assert model.built == 2
    Path(run.job.config.data.train).write_text(json.dumps({"prompt": "q", "chosen": "2", "rejected": "3"}) + "\n")
    start(*PRECOMPUTED).go()
    assert model.built == 3
    (tmp_path / "run" / "reference-train.json").write_text('{"made_from": ')
    start(*PRECOMPUTED).go()
    assert model.built == 4


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("dpo.gamma=1", "dpo.gamma=1: is read with dpo.loss=simpo alone, not sigmoid; remove it, or change the loss"),
        ("dpo.reference=precomputed", "dpo.reference=precomputed: not with dpo.loss=simpo, which has no reference; "),
    ],
)
def test_keys_that_a_loss_does_not_read_are_refused(stub_job: Callable[..., Job], key: str, line: str) -> None:
    loss = [] if "gamma" in key else ["dpo.loss=simpo"]
    config = stub_job("dpo", key, *loss).config
    assert any(found.startswith(line) for found in violations(config, 1, "dpo"))
    assert not any(found.startswith("dpo.") for found in violations(stub_job("dpo", *loss).config, 1, "dpo"))


def test_a_reference_that_waits(start: Callable[..., Run], stub_job: Callable[..., Job]) -> None:
    assert not start("train.steps=1").go().waits and start("train.steps=1", "dpo.reference_waits=true").go().waits
    for other, why in (
        ("dpo.reference=precomputed", "there is none"),
        ("model.lora={rank: 4}", "with model.lora it is the policy without its adapters"),
    ):
        found = list(violations(stub_job("dpo", "dpo.reference_waits=true", other).config, 1, "dpo"))
        assert f"dpo.reference_waits=true: needs a reference with weights of its own; {why}; remove it" in found


def test_a_pair_lies_whole_in_one_row(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else chosen and rejected would be of different prompts, silently. Rows beside text must know of it."""
    asked = []
    lay_out = trainer_pairs.group_microbatches
    monkeypatch.setattr(
        trainer_pairs, "group_microbatches", lambda *a, **k: asked.append((a[3], k["whole"])) or lay_out(*a, **k)
    )
    start("train.steps=1").go()
    start("train.steps=1", "data.replay_seqs=2").go()
    assert asked == [(False, True), (True, True)]
