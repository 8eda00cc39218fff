"""What RAFT hands to engine, generator and gate, in absolute values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.mix import MixSettings
from llmtrain.data.packing import TextRows
from llmtrain.data.sampler import derive, permuted
from llmtrain.recipes import raft
from llmtrain.rules.check import violations
from llmtrain.trainer import rollouts
from llmtrain.trainer.gate import Disagreement
from llmtrain.trainer.job import Job
from llmtrain.types import IGNORE, Group, Prompt, Sample
from tests.recipes.conftest import run_steps
from tests.recipes.stubs import LR, StubEngine, StubGenerator, replays, shifted

SETTINGS = (
    *("raft.prompts_per_step=4", "raft.minibatches=2", "rollout.group_size=3", "rollout.max_new_tokens=7"),
    *("rollout.temperature=0.8", "rewards=[{name: first_integer}]", "train.steps=2", "rollout.max_logprob_gap=1.0"),
)
RIGHT = {0: (True, False, True), 1: (False, True, False), 2: (True, True, True), 3: (False, False, False)}
TOKENS = {True: 5, False: 3}  # of a right answer, of a wrong one


class Run:
    """RAFT with stubs on 12 problems `say <i>:`, of whose three answers those are right that RIGHT[i % 4] says."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job, self.steps, self.totals = job, [], []
        encode = job.tokenizer.encode
        self.numbers = {tuple(encode(f"say {i}:", parse_special=False)): i for i in range(12)}
        self.generator = StubGenerator(self.answers, job.tokenizer.eos_id)
        self.engine: StubEngine = job.engine
        monkeypatch.setattr(raft, "build_engine", lambda job, total_updates: self.totals.append(total_updates))
        monkeypatch.setattr(raft, "train", run_steps(self.steps))
        monkeypatch.setattr(rollouts, "build_generator", lambda job: self.generator)

    def number(self, prompt: Prompt) -> int:
        return self.numbers[tuple(prompt.ids)]

    def answers(self, prompt: Prompt) -> list[list[int]]:
        number = self.number(prompt)
        own, other, pad = (self.job.tokenizer.encode(text, parse_special=False) for text in (str(number), "99", "x"))
        right = [*own, *(pad * (4 - len(own))), self.job.tokenizer.eos_id]
        return [right if good else [*other, *pad][:3] for good in RIGHT[number % 4]]

    def kept(self, step: int, keep: Callable[[tuple[bool, ...]], tuple[int, ...]]) -> list[list[list[int]]]:
        """The answers of each prompt of a step that are kept, those of prompts without any left out."""
        asked = self.generator.asked[step][0]
        chosen = [[self.answers(p)[i] for i in keep(RIGHT[self.number(p) % 4])] for p in asked]
        return [answers for answers in chosen if answers]

    def go(self) -> Run:
        raft.run(self.job)
        return self


def all_right(right: tuple[bool, ...]) -> tuple[int, ...]:
    return tuple(i for i, good in enumerate(right) if good)


def first_right(right: tuple[bool, ...]) -> tuple[int, ...]:
    return all_right(right)[:1]


def mixed(right: tuple[bool, ...]) -> tuple[int, ...]:
    return (0, 1, 2) if len({*right}) == 2 else ()


@pytest.fixture
def start(stub_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """start(*overrides) -> Run, ready to go."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"say {i}:", "answer": str(i)}) + "\n" for i in range(12)))

    def make(*overrides: str) -> Run:
        return Run(stub_job("raft", *SETTINGS, f"data.train={problems}", *overrides), monkeypatch)

    return make


def labels_of(update: Any) -> list[int]:
    """All trained labels of an update, sorted."""
    return sorted(x for batch in update[0] for x in batch.labels.flatten().tolist() if x != IGNORE)


def tokens_of(groups: list[list[list[int]]]) -> list[int]:
    return sorted(x for answers in groups for ids in answers for x in ids)


def test_what_is_asked_of_the_generator(start: Callable[..., Run]) -> None:
    run = start("raft.epochs=3").go()
    assert {(s.num_samples, s.max_new_tokens, s.temperature) for _, s in run.generator.asked} == {(3, 7, 0.8)}
    asked = [tuple(prompt.ids) for prompts, _ in run.generator.asked for prompt in prompts]
    assert len(asked) == 8 == len({*asked})  # each round has prompts of its own
    assert [version for version, _ in run.generator.loaded] == [0, 1, 2] and run.generator.closed
    assert run.totals == [2 * 3 * 2]  # rounds x epochs x minibatches: what the learning rate is laid out for
    assert all(updates == len(run.engine.updates) * version // 2 for version, updates in run.generator.loaded[2:])


def test_a_resumed_run_goes_on_with_its_prompts_and_positions(start: Callable[..., Run]) -> None:
    whole, resumed = start("train.steps=3").go(), start("train.steps=3")
    resumed.job.step = 2
    resumed.go()
    assert resumed.generator.asked == whole.generator.asked[2:]
    assert [version for version, _ in resumed.generator.loaded] == [2, 3]
    assert resumed.engine.positions == [p for p in whole.engine.positions if p >= 4]
    later = [labels_of(u) for u, p in zip(whole.engine.updates, whole.engine.positions, strict=True) if p >= 4]
    assert [labels_of(u) for u in resumed.engine.updates] == later


@pytest.mark.parametrize(
    ("settings", "keep"),
    [
        ((), all_right),
        (("raft.keep=best",), first_right),
        (("raft.variant=raft++",), all_right),
        (("raft.variant=reinforce-rej",), mixed),
        (("raft.min_reward=0.5",), all_right),
    ],
)
def test_updates_are_a_partition_of_what_is_kept(
    start: Callable[..., Run], settings: tuple[str, ...], keep: Callable
) -> None:
    run = start(*settings, "raft.epochs=2").go()
    assert run.totals == [8]
    for step in range(2):
        kept = [ids for answers in run.kept(step, keep) for ids in answers]
        size = len(kept)
        for epoch in (2 * step, 2 * step + 1):
            seed = derive(1, f"raft/{epoch}")  # the document's seed; each epoch of the run has an order of its own
            order = [kept[permuted(i, size, seed)] for i in range(size)]
            for i, part in enumerate((order[0::2], order[1::2])):  # samples, not groups, are dealt out
                update = run.engine.updates[run.engine.positions.index(2 * epoch + i)]
                assert labels_of(update) == tokens_of([part])
                assert update[1] == len(tokens_of([part]))  # the denominator: tokens of this minibatch alone
    assert {batch.temperature for update in run.engine.updates for batch in update[0]} == {0.8}


def test_the_losses_by_hand(start: Callable[..., Run]) -> None:
    """log p_old = -1 and ratio 1.5: -log p = 1 - log 1.5; clipped at 1.3 where A = 1; 1.5 where A = -1."""
    run = start("raft.epochs=1")
    run.engine.scores = shifted(math.log(1.5))
    run.go()
    assert run.engine.updates
    for _, _, stats in run.engine.updates:
        assert stats.loss == pytest.approx(1 - math.log(1.5), rel=1e-5)
        assert stats.metrics["kl_old"] == pytest.approx(0.5 - math.log(1.5), rel=1e-5)
        assert stats.metrics["logprob_gap_max"] == pytest.approx(math.log(1.5), rel=1e-5)
        assert stats.metrics["entropy"] == pytest.approx(2.0) and "clip_fraction" not in stats.metrics
    plus = start("raft.variant=raft++", "raft.clip_high=0.3", "raft.clip_low=0.1")
    plus.engine.scores = shifted(math.log(1.5))
    plus.go()
    assert {round(stats.loss, 5) for _, _, stats in plus.engine.updates} == {-1.3}
    assert {stats.metrics["clip_fraction"] for _, _, stats in plus.engine.updates} == {1.0}
    plus = start("raft.variant=raft++", "raft.clip_high=0.3", "raft.clip_low=0.1")
    plus.engine.scores = shifted(math.log(0.5))
    plus.go()
    assert {round(stats.loss, 5) for _, _, stats in plus.engine.updates} == {-0.5}  # the smaller of 0.5 and 0.9


def test_reinforce_rej_by_hand(start: Callable[..., Run]) -> None:
    run = start("raft.variant=reinforce-rej", "raft.clip_high=0.3")
    run.engine.scores = shifted(math.log(1.5))
    run.go()
    seen = [0, 0]
    for batches, denominator, stats in run.engine.updates:
        good = sum(int((batch.extra["advantages"] == 1).sum()) for batch in batches)
        bad = sum(int((batch.extra["advantages"] == -1).sum()) for batch in batches)
        seen = [seen[0] + good, seen[1] + bad]
        assert good % TOKENS[True] == bad % TOKENS[False] == 0 and good + bad == denominator
        assert stats.loss == pytest.approx((-1.3 * good + 1.5 * bad) / denominator, rel=1e-5)
    kept = [good for step in range(2) for answers in run.kept(step, mixed) for good in map(len, answers)]
    assert seen == [kept.count(TOKENS[True]) * TOKENS[True], kept.count(TOKENS[False]) * TOKENS[False]] != [0, 0]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_correction_weighs_the_objective(start: Callable[..., Run], epochs: int) -> None:
    """w = 3, truncated at 2, at every token; the ratio is 1 in the first update of a round, then 1.5: 1.3 where A = 1,
    1.5 where A = -1."""
    settings = ("raft.variant=reinforce-rej", "raft.clip_high=0.3", f"raft.epochs={epochs}")
    run, a_round = start(*settings, "engine.precision=bf16", "rollout.max_logprob_gap=9.0"), 2 * epochs

    def scores(batch: Any) -> Any:
        moved = run.engine.positions and run.engine.positions[-1] // a_round == run.round
        return shifted(math.log(4.5 if moved else 3))(batch)

    run.round, run.engine.scores, take = -1, scores, run.generator.generate

    def generate(*args: Any) -> Any:
        run.round += 1
        return take(*args)

    run.generator.generate = generate
    run.go()
    seen = {position // a_round: position for position in reversed(run.engine.positions)}
    assert len(run.engine.updates) > len(seen)
    for (batches, denominator, stats), position in zip(run.engine.updates, run.engine.positions, strict=True):
        first = seen[position // a_round] == position
        good = sum(int((batch.extra["advantages"] == 1).sum()) for batch in batches)
        up, down = (1.0, 1.0) if first else (1.3, 1.5)
        assert stats.loss == pytest.approx(2 * (down * (denominator - good) - up * good) / denominator, rel=1e-5)
        assert stats.metrics["mismatch_weight"] == pytest.approx(2.0, rel=1e-5)
        assert {"train_logprobs" in batch.extra for batch in batches} == {epochs > 1 or not first}
    trained = [denominator for _, denominator, _ in run.engine.updates]
    once = [n for n, p in zip(trained, run.engine.positions, strict=True) if epochs > 1 or seen[p // a_round] != p]
    scored = sum(int(batch.loss_mask.sum()) for batches in run.engine.scored for batch in batches)
    assert scored == trained[0] + sum(once) / epochs  # by the gate, and each token that is trained later once


def test_sft_on_what_was_chosen_has_nothing_to_correct(start: Callable[..., Run]) -> None:
    run = start("engine.precision=bf16").go()
    assert len(run.engine.scored) == 1  # the gate
    assert not any("train_logprobs" in batch.extra for update in run.engine.updates for batch in update[0])
    assert "mismatch_weight" not in run.steps[0][0]


def graded(rewards: list[float]) -> Group:
    return [Sample([1], [2, 3], [True] * 2, [0.0] * 2, [0] * 2, True, reward=reward) for reward in rewards]


@pytest.mark.parametrize(
    ("overrides", "rewards", "kept", "advantages"),
    [
        ((), [0.2, 1.0, 0.9, 1.5], [1, 3], 1.0),
        (("raft.min_reward=0.9",), [0.2, 1.0, 0.9], [1, 2], 1.0),
        (("raft.keep=best",), [1.0, 1.5, 1.5], [1], 1.0),  # the first of equal ones
        (("raft.keep=best",), [0.2, 0.9], [], 1.0),
        (("raft.keep=best", "raft.min_reward=null"), [-3.0, -2.0], [1], 1.0),
        (("raft.variant=reinforce-rej",), [0.2, 1.0], [0, 1], None),
        (("raft.variant=reinforce-rej",), [1.0, 2.0], [], None),
        (("raft.variant=reinforce-rej",), [0.0, 0.9], [], None),
    ],
)
def test_what_is_chosen_of_a_group(
    start: Callable[..., Run], overrides: tuple[str, ...], rewards: list[float], kept: list[int], advantages: float
) -> None:
    group = graded(rewards)
    chosen = raft.choose([group], start(*overrides).job.config.raft)
    assert [[id(s) for s in g] for g in chosen] == ([[id(group[i]) for i in kept]] if kept else [])
    expected = [[advantages] * 2 if advantages else [1.0 if group[i].reward >= 1 else -1.0] * 2 for i in kept]
    assert [group[i].columns["advantages"] for i in kept] == expected


@pytest.mark.parametrize(
    ("overrides", "failed", "kept"),
    [
        ((), [1], [2]),
        (("raft.keep=best", "raft.min_reward=null"), [1], [2]),
        (("raft.keep=best", "raft.min_reward=null"), [0, 1, 2], []),
        (("raft.variant=reinforce-rej",), [1], [0, 1, 2]),
        (("raft.variant=reinforce-rej",), [1, 2], []),  # all are wrong
    ],
)
def test_what_a_reward_failed_on_is_never_right(
    start: Callable[..., Run], overrides: tuple[str, ...], failed: list[int], kept: list[int]
) -> None:
    group = graded([0.0, 3.0, 1.0])
    for i in failed:
        group[i].errors = {"rm": "too long"}
    chosen = raft.choose([group], start(*overrides).job.config.raft)
    assert [[id(s) for s in g] for g in chosen] == ([[id(group[i]) for i in kept]] if kept else [])
    assert [group[i].columns["advantages"] for i in kept] == [[1.0 if i == 2 else -1.0] * 2 for i in kept]


def test_what_a_step_reports(start: Callable[..., Run]) -> None:
    run = start().go()
    for step, (metrics, tokens) in enumerate(run.steps):
        right = [good for p in run.generator.asked[step][0] for good in RIGHT[run.number(p) % 4]]
        assert tokens == sum(TOKENS[good] for good in right) and metrics["weight_version"] == step + 1
        share = sum(right) / 12
        assert metrics["reward_mean"] == metrics["kept_fraction"] == metrics["finished_fraction"] == share
        assert metrics["reward/first_integer"] == share and metrics["reward_errors"] == 0
        assert metrics["step_samples"] == 12 and metrics["response_tokens_mean"] == tokens / 12 and metrics["lr"] == LR
        own = [s for p, (_, _, s) in zip(run.engine.positions, run.engine.updates, strict=True) if p // 2 == step]
        assert metrics["loss"] == pytest.approx(sum(s.loss for s in own) / len(own))
        assert {"rollout_s", "train_s", "sync_s", "entropy", "kl_old", "logprob_gap_max"} <= metrics.keys()
    lines = (Path(run.job.config.directory) / "samples.jsonl").read_text().splitlines()
    rewards = [[json.loads(line)["reward"] for line in lines[4 * step : 4 * step + 4]] for step in range(2)]
    asked = [[good for p in prompts for good in RIGHT[run.number(p) % 4]] for prompts, _ in run.generator.asked]
    assert len(lines) == 8 and rewards == [right[:4] for right in asked]  # of all, not of the kept ones


def test_the_gap_of_a_step_is_that_of_its_first_update(start: Callable[..., Run]) -> None:
    run = start()
    run.engine.scores = lambda batch: shifted(0.1 * (len(run.engine.updates) % 2 + 1))(batch)
    run.go()
    assert len(run.engine.updates) == 4
    assert [metrics["logprob_gap_max"] for metrics, _ in run.steps] == pytest.approx([0.1, 0.1])


def test_with_nothing_to_keep_nothing_is_updated(start: Callable[..., Run]) -> None:
    """The rate falls all the same: from 2e-3 at the first of 2 x 2 updates to 0 at the last; a step tells its first."""
    run = start("optim.warmup_steps=0", "optim.schedule=linear", "optim.min_lr=0.0", "optim.lr=2e-3")
    run.generator.answers = lambda prompt: [[run.job.tokenizer.eos_id]] * 3
    run.go()
    assert run.engine.updates == [] and run.engine.scored == []
    assert [(m["loss"], m["grad_norm"], m["kept_fraction"]) for m, _ in run.steps] == [(0.0, 0.0, 0.0)] * 2
    assert [m["lr"] for m, _ in run.steps] == pytest.approx([2e-3, 2e-3 / 3])


def test_replay_is_mixed_in_by_its_weight(start: Callable[..., Run]) -> None:
    """log-probs of the text are -3 and of the samples -1: the loss is 1 + 0.5 x 3."""
    run = start("data.replay_seqs=4", "data.replay_weight=0.5", "raft.minibatches=1", "raft.epochs=2")
    rows, policy = TextRows(run.job.config.data.path, "train", 64, 1, True, mix=MixSettings()), shifted(0.0)
    run.engine.scores = lambda b: policy(b) if "old_logprobs" in b.extra else shifted(-3.0)(b)
    run.go()
    assert run.engine.positions == [0, 1, 2, 3]
    for turn, (batches, _, stats) in enumerate(run.engine.updates):
        text = [row for b in batches if "old_logprobs" not in b.extra for row in b.input_ids.tolist()]
        assert text == rows.batch(range(4 * turn, 4 * turn + 4)).input_ids.tolist()  # the next rows at each update
        assert max(batch.input_ids.size(1) for batch in batches) == 64  # of the text, train.seq_len
        assert stats.loss == pytest.approx(1 + 0.5 * 3, rel=1e-5)


def test_a_gap_stops_before_the_first_update_and_at_later_steps(start: Callable[..., Run]) -> None:
    run = start("rollout.max_logprob_gap=null")
    run.engine.scores = shifted(0.01)  # fp32: at most 1e-3
    with pytest.raises(Disagreement, match=r"step 1: generator and trainer differ by 0\.01 .*max_logprob_gap=0\.001"):
        run.go()
    assert run.engine.updates == [] and len(run.engine.scored) == 1 and run.generator.closed
    run = start("rollout.max_logprob_gap=null", "train.steps=3")
    take = run.engine.train_step

    def spoil(*args: Any) -> Any:
        if run.engine.updates and run.engine.positions[-1] // 2 == 0:
            run.engine.scores = shifted(0.01)
        return take(*args)

    run.engine.train_step = spoil
    with pytest.raises(Disagreement, match="step 2: "):
        run.go()
    assert len(run.engine.scored) == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), None),
        (("raft.variant=raft++", "raft.clip_low=0.1"), None),
        (("raft.keep=best", "raft.min_reward=null"), None),
        (("rollout.group_size=1",), None),
        (("raft.minibatches=12",), None),
        (("raft.minibatches=13",), "raft.minibatches=13: must be at most the 12 samples that a round can keep (raft.p"),
        (("raft.minibatches=5", "raft.keep=best"), "raft.minibatches=5: must be at most the 4 samples that a round ca"),
        (("raft.min_reward=null",), "raft.min_reward=null: with raft.keep=all every sample would be kept; set it, or "),
        (("raft.variant=reinforce-rej", "raft.min_reward=null"), "raft.min_reward=null: raft.variant=reinforce-rej t"),
        (("raft.variant=reinforce-rej", "raft.keep=best"), "raft.keep=best: raft.variant=reinforce-rej trains on all "),
        (("raft.keep=best", "rollout.group_size=1"), "rollout.group_size=1: must be at least 2 with raft.keep=best, r"),
        (("raft.variant=reinforce-rej", "rollout.group_size=1"), "rollout.group_size=1: must be at least 2 with raft."),
        (
            ("raft.clip_high=0.3",),
            "raft.clip_high=0.3: raft.variant=raft has no ratio; remove it, or set raft.variant=",
        ),
        (("raft.mismatch=mask",), "raft.mismatch=mask: raft.variant=raft has no ratio; remove it, or set raft.variant"),
        (("raft.mismatch=off",), None),
        (("raft.variant=raft++", "raft.mismatch=mask", "raft.mismatch_cap=3"), None),
        (("raft.variant=raft++", "raft.mismatch_low=6"), "raft.mismatch_low=6: must be below raft.mismatch_high=5; lo"),
        (("guard.spike=skip",), "guard.spike=skip: must be off in raft, whose loss follows from what was chosen; rem"),
    ],
)
def test_what_cannot_be_is_refused(start: Callable[..., Run], overrides: tuple[str, ...], expected: str | None) -> None:
    config = start(*overrides).job.config
    found = [line for line in violations(config, 1, "raft") if not line.startswith("model.init_from")]
    assert len(found) == (expected is not None) and all(line.startswith(expected) for line in found), found


def test_experts_of_the_generator_are_replayed(start: Callable[..., Run]) -> None:
    run = start("rollout.router_replay=true", "data.replay_seqs=4")
    run.generator.experts = True
    assert all(replays(batch) for batches, *_ in run.go().engine.updates for batch in batches)
