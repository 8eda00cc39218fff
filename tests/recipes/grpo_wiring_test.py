"""What GRPO hands to engine, generator and gate, in absolute values. Losses and rewards have tests of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.mix import MixSettings
from llmtrain.data.packing import TextRows
from llmtrain.recipes import grpo
from llmtrain.rewards import RewardsFail
from llmtrain.rules.check import violations
from llmtrain.trainer import rollouts
from llmtrain.trainer.batches import split_groups
from llmtrain.trainer.gate import Disagreement
from llmtrain.trainer.job import Job
from llmtrain.types import IGNORE, Prompt
from tests.recipes.conftest import run_steps
from tests.recipes.stubs import LR, StubEngine, StubGenerator, StubScorer, replays, shifted

A = 0.5 / (2**-0.5 + 1e-6)  # advantage of the better of two samples, rewards 1 and 0: over their deviation
SETTINGS = (
    *("grpo.prompts_per_step=4", "grpo.minibatches=2", "grpo.clip_low=0.2", "grpo.clip_high=0.3"),
    *("rollout.group_size=2", "rollout.max_new_tokens=7", "rollout.temperature=0.8", "rollout.top_p=0.9"),
    *("rewards=[{name: first_integer}]", "train.steps=2"),
)


class Run:
    """GRPO with stubs on 12 problems `say <i>:`. Each is answered once rightly (5 tokens), once wrongly (3 tokens, cut
    short); every fourth twice rightly."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch, reference: StubScorer | None = None) -> None:
        self.job, self.steps, self.totals, self.reference = job, [], [], reference
        encode = job.tokenizer.encode
        self.numbers = {tuple(encode(f"say {i}:", parse_special=False)): i for i in range(12)}
        self.generator = StubGenerator(self.answers, job.tokenizer.eos_id)
        self.engine: StubEngine = job.engine
        monkeypatch.setattr(grpo, "build_engine", lambda job, total_updates: self.totals.append(total_updates))
        monkeypatch.setattr(grpo, "build_reference", self.make_reference)
        monkeypatch.setattr(grpo, "train", run_steps(self.steps))
        monkeypatch.setattr(rollouts, "build_generator", lambda job: self.generator)

    def make_reference(self, job: Job, wanted: bool, waits: bool) -> StubScorer | None:
        self.waits = waits
        return self.reference if wanted else None

    def answers(self, prompt: Prompt) -> list[list[int]]:
        number = self.numbers[tuple(prompt.ids)]
        right, wrong, pad = (self.job.tokenizer.encode(text, parse_special=False) for text in (str(number), "99", "x"))
        right = [*right, *(pad * (4 - len(right))), self.job.tokenizer.eos_id]
        return [right, right if number % 4 == 3 else [*wrong, *pad][:3]]

    def go(self) -> Run:
        grpo.run(self.job)
        return self


@pytest.fixture
def start(stub_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """start(*overrides, reference=None) -> Run, ready to go."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"say {i}:", "answer": str(i)}) + "\n" for i in range(12)))

    def make(*overrides: str, reference: StubScorer | None = None) -> Run:
        job = stub_job("grpo", *SETTINGS, f"data.train={problems}", *overrides)
        return Run(job, monkeypatch, reference)

    return make


def sampled_tokens(run: Run, step: int) -> int:
    return sum(len(ids) for prompt in run.generator.asked[step][0] for ids in run.answers(prompt))


def labels_of(update: Any) -> list[int]:
    """All trained labels of an update, sorted."""
    return sorted(x for batch in update[0] for x in batch.labels.flatten().tolist() if x != IGNORE)


def test_what_is_asked_of_the_generator(start: Callable[..., Run]) -> None:
    run = start().go()
    for _, sampling in run.generator.asked:
        assert (sampling.max_new_tokens, sampling.num_samples) == (7, 2)
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.8, 0.9, 0)
        assert sampling.stop_ids == (run.job.tokenizer.eos_id,) and sampling.stop_strings == ()
    asked = [prompt for prompts, _ in run.generator.asked for prompt in prompts]
    assert len(asked) == 8 and len({prompt.seed for prompt in asked}) == 8  # a stream of its own for each of both steps
    assert len({tuple(prompt.ids) for prompt in asked}) == 8  # of 12 problems: none twice in an epoch
    assert run.generator.loaded == [(0, 0), (1, 2), (2, 4)] and run.generator.closed  # versions, after 2 updates each
    assert run.totals == [2 * 2]  # updates that the learning rate is laid out for


def test_a_resumed_run_goes_on_with_its_version_and_prompts(start: Callable[..., Run]) -> None:
    whole, resumed = start("train.steps=3").go(), start("train.steps=3")
    resumed.job.step = 2
    resumed.go()
    assert [version for version, _ in resumed.generator.loaded] == [2, 3]
    assert resumed.generator.asked == whole.generator.asked[2:]


def test_a_prompt_leaves_room_for_a_completion(start: Callable[..., Run]) -> None:
    longest = max(map(len, start().numbers))
    start(f"train.seq_len={longest + 7}").go()
    with pytest.raises(ValueError, match=f"has {longest} tokens, more than"):
        start(f"train.seq_len={longest + 6}").go()


def test_stop_strings_and_special_tokens_by_key(start: Callable[..., Run]) -> None:
    run = start('rollout.stop=["Q:", "99"]', "rollout.skip_special_tokens=false", "log.samples=2").go()
    assert {sampling.stop_strings for _, sampling in run.generator.asked} == {("Q:", "99")}
    lines = (Path(run.job.config.directory) / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["completion"].endswith("<eos>") for line in lines} == {True, False}


def test_the_denominator_counts_all_that_was_sampled(start: Callable[..., Run]) -> None:
    run = start().go()
    for step in range(2):
        first, second = run.engine.updates[2 * step : 2 * step + 2]
        assert first[1] == second[1] == sampled_tokens(run, step) / 2  # minibatches; groups without a spread count too
    spread = [any(a != b for a, b in [run.answers(p)]) for p in run.generator.asked[0][0] + run.generator.asked[1][0]]
    assert not all(spread)  # else the line above could not tell


def test_minibatches_are_a_partition_of_what_has_a_spread(start: Callable[..., Run]) -> None:
    run = start().go()
    for step in range(2):
        kept = [
            ids
            for p in run.generator.asked[step][0]
            for ids in run.answers(p)
            if len({*map(tuple, run.answers(p))}) > 1
        ]
        updates = run.engine.updates[2 * step : 2 * step + 2]
        assert all(map(labels_of, updates))
        assert sorted(x for u in updates for x in labels_of(u)) == sorted(x for ids in kept for x in ids)
    assert {batch.temperature for update in run.engine.updates for batch in update[0]} == {0.8}
    assert [list(map(len, split_groups([[i] for i in range(n)], 3))) for n in (2, 3, 7)] == [
        [1, 1],
        [1, 1, 1],
        [3, 2, 2],
    ]


def test_the_loss_by_hand(start: Callable[..., Run]) -> None:
    """ratio 1.5: 1.3 A where A > 0, clipped at 1 + clip_high, 1.5 A where A < 0; log p - log p_ref = 0.5."""
    reference = StubScorer(shifted(math.log(1.5) - 0.5))
    run = start("grpo.kl_coef=0.1", "rollout.max_logprob_gap=1.0", reference=reference)
    run.engine.scores = shifted(math.log(1.5))
    run.go()
    kl = math.exp(-0.5) - 1 + 0.5  # k3
    for batches, denominator, stats in run.engine.updates:
        better = sum(int((batch.extra["advantages"] > 0).sum()) for batch in batches)
        worse = sum(int((batch.extra["advantages"] < 0).sum()) for batch in batches)
        assert better % 5 == worse % 3 == 0 and better // 5 == worse // 3 > 0
        expected = (-1.3 * A * better + 1.5 * A * worse + 0.1 * kl * (better + worse)) / denominator
        assert stats.loss == pytest.approx(expected, rel=1e-5)
        assert stats.metrics["kl"] == pytest.approx(kl, rel=1e-5)  # a mean over the kept tokens, not over all
        assert stats.metrics["clip_fraction"] == pytest.approx(better / (better + worse), rel=1e-5)
    assert sum(map(len, reference.scored)) == sum(len(update[0]) for update in run.engine.updates)


def test_a_reference_that_waits(start: Callable[..., Run]) -> None:
    for waits in (False, True):
        more = ("grpo.kl_coef=0.1", f"grpo.reference_waits={str(waits).lower()}", "rollout.max_logprob_gap=1.0")
        assert start(*more, reference=StubScorer(shifted(0.0))).go().waits == waits
    config = start("grpo.reference_waits=true").job.config
    line = "grpo.reference_waits=true: needs a reference with weights of its own; there is none; remove it"
    assert line in violations(config, 1, "grpo")


def test_what_a_tool_wrote_counts_nowhere(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("train.steps=1")
    sample = run.generator._sample

    def with_a_tool(prompt: Prompt, ids: list[int]) -> Any:
        made = sample(prompt, ids)
        made.trained[-1] = False  # a reward reads what the policy wrote last, here all before it
        return made

    monkeypatch.setattr(run.generator, "_sample", with_a_tool)
    run.go()
    answers = [ids for prompt in run.generator.asked[0][0] for ids in run.answers(prompt)]
    assert {denominator for _, denominator, _ in run.engine.updates} == {(sampled_tokens(run, 0) - len(answers)) / 2}
    assert run.steps[0][1] == sampled_tokens(run, 0)  # tokens of the step: all of them


def test_advantages_without_the_deviation(start: Callable[..., Run]) -> None:
    run = start("grpo.normalize_std=false").go()
    found = {
        x for update in run.engine.updates for batch in update[0] for x in batch.extra["advantages"].unique().tolist()
    }
    assert found == {-0.5, 0.0, 0.5}


def test_what_a_step_reports(start: Callable[..., Run]) -> None:
    run = start().go()
    for step, (metrics, tokens) in enumerate(run.steps):
        answers = [run.answers(p) for p in run.generator.asked[step][0]]
        spread = sum(a != b for a, b in answers)
        assert tokens == sampled_tokens(run, step) and metrics["weight_version"] == step + 1
        assert metrics["step_samples"] == 8
        assert metrics["reward_mean"] == (8 - spread) / 8 and metrics["kept_fraction"] == spread / 4
        assert metrics["reward_errors"] == 0 and metrics["reward/first_integer"] == metrics["reward_mean"]
        assert metrics["finished_fraction"] == (8 - spread) / 8  # the wrong answers are cut, without an end token
        assert metrics["response_tokens_mean"] == tokens / 8 and metrics["lr"] == LR


OWN = "def score(completion, example):\n    return {'9': 1.0}[completion[:1]]\n"  # fails on what is no 9


def test_a_failing_reward_is_counted_with_an_example(start: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    own = json.dumps([{"function": f"{tmp_path}/mine.py:score", "max_error_share": 1.0}])
    run = start(f"rewards={own}", "log.samples=1").go()
    counts = [metrics["reward_errors"] for metrics, _ in run.steps]
    assert all(0 < count < 8 for count in counts)
    assert all(metrics["reward_mean"] == 1 - n / 8 for n, (metrics, _) in zip(counts, run.steps, strict=True))
    lines = [json.loads(line) for line in (Path(run.job.config.directory) / "samples.jsonl").read_text().splitlines()]
    for step in (1, 2):
        told = [line["reward_errors"] for line in lines if line["step"] == step and "reward_errors" in line]
        assert len(told) == 1 and told[0]["score"].startswith("KeyError: ")


def test_a_failing_reward_does_not_beat_a_negative_one(start: Callable[..., Run], tmp_path: Path) -> None:
    """What scores is at -2, so what fails counts -2 too: no group has a spread, and nothing is learned."""
    (tmp_path / "mine.py").write_text(OWN.replace("1.0", "-2.0"))
    own = json.dumps([{"function": f"{tmp_path}/mine.py:score", "max_error_share": 1.0}])
    run = start(f"rewards={own}").go()
    assert run.engine.updates == [] and all(0 < metrics["reward_errors"] < 8 for metrics, _ in run.steps)
    assert [metrics["reward_mean"] for metrics, _ in run.steps] == [-2.0] * 2
    assert [metrics["reward/score"] for metrics, _ in run.steps] == [-2.0] * 2


def test_a_reward_that_fails_too_often_stops_the_run(start: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    own = json.dumps([{"function": f"{tmp_path}/mine.py:score", "max_error_share": 0.1}])
    run = start(f"rewards={own}")
    with pytest.raises(
        RewardsFail, match=r"reward score: failed on . of 8 completions, more than .*max_error_share=0.1"
    ):
        run.go()
    assert run.engine.updates == [] and run.generator.closed


def test_rows_that_cannot_be_rewarded_are_refused_first(start: Callable[..., Run]) -> None:
    run = start("rewards=[{name: reasoning_gym}]")
    with pytest.raises(ValueError, match=r"problems.jsonl:1: reward reasoning_gym: needs 'source' and 'entry'"):
        run.go()
    assert run.engine.updates == []


def test_replay_is_mixed_in_by_its_weight(start: Callable[..., Run]) -> None:
    """log-probs of the text are -3: its mean loss is 3, weighted by 0.5 and on top of the policy's, which is 0."""
    run = start("data.replay_seqs=4", "data.replay_weight=0.5")
    rows = TextRows(run.job.config.data.path, "train", 64, 1, True, mix=MixSettings())  # the document's seed
    policy = shifted(0.0)
    run.engine.scores = lambda b: policy(b) if "old_logprobs" in b.extra else shifted(-3.0)(b)
    run.go()
    for turn, (batches, denominator, stats) in enumerate(run.engine.updates):
        text = [row for b in batches if "old_logprobs" not in b.extra for row in b.input_ids.tolist()]
        assert text == rows.batch(range(4 * turn, 4 * turn + 4)).input_ids.tolist()  # the next rows at each update
        assert {batch.input_ids.size(1) for batch in batches if "old_logprobs" in batch.extra} <= {16, 32, 48}
        advantages = sum(float(batch.extra["advantages"].sum()) for batch in batches if "advantages" in batch.extra)
        assert stats.loss == pytest.approx(-advantages / denominator + 0.5 * 3, rel=1e-5)
        assert stats.metrics["replay_loss"] == pytest.approx(3, rel=1e-5)


def test_without_any_spread_nothing_is_updated(start: Callable[..., Run]) -> None:
    """The rate falls all the same: from 2e-3 at the first of 2 x 2 updates to 0 at the last; a step tells its first."""
    run = start("optim.warmup_steps=0", "optim.schedule=linear", "optim.min_lr=0.0", "optim.lr=2e-3")
    run.generator.answers = lambda prompt: [[run.job.tokenizer.eos_id]] * 2
    run.go()
    assert run.engine.updates == [] and run.engine.scored == []
    assert [(m["loss"], m["grad_norm"], m["kept_fraction"]) for m, _ in run.steps] == [(0.0, 0.0, 0.0)] * 2
    assert [m["lr"] for m, _ in run.steps] == pytest.approx([2e-3, 2e-3 / 3])


def test_a_gap_at_the_first_step_stops_before_the_first_update(start: Callable[..., Run]) -> None:
    run = start()
    run.engine.scores = shifted(0.01)  # fp32: at most 1e-3
    with pytest.raises(Disagreement, match=r"step 1: generator and trainer differ by 0\.01 .*max_logprob_gap=0\.001"):
        run.go()
    assert run.engine.updates == [] and len(run.engine.scored) == 1 and run.generator.closed
    run = start()
    run.engine.scores = shifted(math.nan)  # NaN is the largest gap of all
    with pytest.raises(Disagreement, match="differ by inf"):
        run.go()
    assert run.engine.updates == []


def test_weights_that_are_spoiled_later_stop_at_the_next_step(start: Callable[..., Run]) -> None:
    run = start("train.steps=5")
    score = run.engine.train_step

    def spoil(*args: Any) -> Any:
        if len(run.engine.updates) == 2:
            run.engine.scores = shifted(0.01)
        return score(*args)

    run.engine.train_step = spoil
    with pytest.raises(Disagreement, match="step 2: "):
        run.go()
    assert len(run.steps) == 1 and len(run.engine.scored) == 1  # later steps cost no scoring


def test_experts_of_the_generator_go_to_the_policy_alone(start: Callable[..., Run]) -> None:
    """To its updates, its scores before them, and the gate; text and the reference choose themselves."""
    more = ("grpo.kl_coef=0.1", "grpo.mismatch=truncate", "engine.precision=bf16", "data.replay_seqs=4")
    run = start("rollout.router_replay=true", *more, reference=StubScorer(shifted(0.0)))
    run.generator.experts = True
    run.go()
    updated = [batch for batches, *_ in run.engine.updates for batch in batches]
    scored = [batch for batches in run.engine.scored for batch in batches]
    assert updated and scored and all(map(replays, [*updated, *scored]))
    assert any("replay" in batch.extra for batch in updated)
    assert run.reference.scored
    assert all(batch.experts is None for batches in run.reference.scored for batch in batches)
    run = start("data.replay_seqs=4")
    run.generator.experts = True
    assert all(batch.experts is None for batches, *_ in run.go().engine.updates for batch in batches)
