"""What PPO hands to its models, the generator and the gate, in absolute values. Its losses have tests of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config.load import load
from llmtrain.config.recipes.ppo import RECIPE
from llmtrain.engine.build import Role
from llmtrain.recipes import ppo
from llmtrain.trainer import rollouts
from llmtrain.trainer.gate import Disagreement
from llmtrain.trainer.job import Job
from llmtrain.types import IGNORE, Batch, Prompt, Sample, Scores
from tests.recipes.conftest import run_steps
from tests.recipes.stubs import LR, NORM, StubEngine, StubGenerator, StubScorer, replays, shifted

SETTINGS = (
    *("ppo.prompts_per_step=4", "ppo.minibatches=2", "ppo.clip_low=0.2", "ppo.clip_high=0.3", "ppo.whiten=false"),
    *("ppo.policy_lambda=0.5", "ppo.critic_lambda=1.0"),
    *("rollout.group_size=1", "rollout.max_new_tokens=7", "rollout.temperature=0.8"),
    *("rewards=[{name: first_integer}]", "train.steps=2"),
)
VALUE = 0.25  # what the critic says of every token


def critic_scores(batch: Batch) -> Scores:
    return Scores(values=torch.full(batch.labels.shape, VALUE))


class Run:
    """PPO with stubs on 12 problems `say <i>:`. Those with an even number are answered rightly (5 tokens), the others
    wrongly (3 tokens, cut short)."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch, reference: StubScorer | None) -> None:
        self.job, self.steps, self.reference, self.wanted = job, [], reference, []
        encode = job.tokenizer.encode
        self.numbers = {tuple(encode(f"say {i}:", parse_special=False)): i for i in range(12)}
        self.generator = StubGenerator(self.answers, job.tokenizer.eos_id)
        self.policy: StubEngine = job.engine
        self.critic = job.engines["critic"] = StubEngine(critic_scores)
        monkeypatch.setattr(ppo, "build_models", lambda job: None)
        monkeypatch.setattr(ppo, "build_reference", self.build_reference)
        monkeypatch.setattr(ppo, "train", run_steps(self.steps))
        monkeypatch.setattr(rollouts, "build_generator", lambda job: self.generator)

    def build_reference(self, job: Job, wanted: bool) -> StubScorer | None:
        self.wanted.append(wanted)
        return self.reference

    def is_right(self, prompt: Prompt) -> bool:
        return self.numbers[tuple(prompt.ids)] % 2 == 0

    def answers(self, prompt: Prompt) -> list[list[int]]:
        number = str(self.numbers[tuple(prompt.ids)])
        right, wrong, pad = (self.job.tokenizer.encode(text, parse_special=False) for text in (number, "99", "x"))
        if self.is_right(prompt):
            return [[*right, *(pad * (4 - len(right))), self.job.tokenizer.eos_id]]
        return [[*wrong, *pad][:3]]

    def tokens(self, step: int) -> int:
        return sum(len(ids) for prompt in self.generator.asked[step][0] for ids in self.answers(prompt))

    def go(self) -> Run:
        ppo.run(self.job)
        return self


@pytest.fixture
def start(stub_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """start(*overrides, reference=None) -> Run, ready to go."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"say {i}:", "answer": str(i)}) + "\n" for i in range(12)))

    def make(*overrides: str, reference: StubScorer | None = None) -> Run:
        job = stub_job("ppo", *SETTINGS, f"data.train={problems}", *overrides)
        return Run(job, monkeypatch, reference)

    return make


def column(update: Any, name: str) -> list[float]:
    """The values of a column at all trained tokens of an update."""
    return [x for batch in update[0] for x in batch.extra[name][batch.loss_mask].tolist()]


def labels_of(updates: Any) -> list[int]:
    """All trained labels of updates, sorted."""
    return sorted(
        x for update in updates for batch in update[0] for x in batch.labels.flatten().tolist() if x != IGNORE
    )


def test_what_is_asked_of_the_generator(start: Callable[..., Run]) -> None:
    run = start().go()
    for _, sampling in run.generator.asked:
        assert (sampling.max_new_tokens, sampling.num_samples, sampling.temperature) == (7, 1, 0.8)
    assert [len(prompts) for prompts, _ in run.generator.asked] == [4, 4]
    assert run.generator.loaded == [(0, 0), (1, 2), (2, 4)] and run.generator.closed  # versions, after 2 updates each
    assert run.wanted == [False] and run.job.state == {"kl_coef": 0.0}


def test_every_epoch_is_a_partition_and_all_tokens_weigh_the_same(start: Callable[..., Run]) -> None:
    """2 epochs of 2 minibatches; the denominator is the mean number of tokens of a minibatch, not its own."""
    run = start("ppo.epochs=2").go()
    assert run.policy.positions == run.critic.positions == list(range(8))
    for engine in (run.policy, run.critic):
        for step in range(2):
            updates = engine.updates[4 * step : 4 * step + 4]
            sampled = sorted(x for p in run.generator.asked[step][0] for ids in run.answers(p) for x in ids)
            assert labels_of(updates[:2]) == labels_of(updates[2:]) == sampled
            assert {denominator for _, denominator, _ in updates} == {run.tokens(step) / 2}


def test_minibatches_are_drawn_by_step_and_epoch_alone(start: Callable[..., Run]) -> None:
    settings = start("ppo.epochs=2", "ppo.minibatches=3").job.config.ppo
    groups = [[Sample([1], [i], [True], [0.0], [0], True)] for i in range(12)]
    first, again, other = (ppo.minibatches(groups, settings, seed=1, number=n) for n in (0, 0, 1))
    assert first == again != other and len(first) == 6
    for epoch in (first[:3], first[3:]):
        assert sorted(g[0].ids[0] for part in epoch for g in part) == list(range(12)) and set(map(len, epoch)) == {4}
    assert first[:3] != first[3:]
    assert ppo.minibatches(groups, settings, seed=2, number=0) != first


def test_the_losses_by_hand(start: Callable[..., Run]) -> None:
    """All values are 1/4, the reward is 1 for 5 tokens, 0 for 3. With lambda 1 returns are the reward. With lambda 1/2
    the last delta is the reward less 1/4, all others are 0: A = (r - 1/4) / 2^k, k tokens before the last."""
    run = start()
    run.policy.scores = shifted(math.log(1.5))
    run.job.config = run.job.config.model_copy(
        update={"rollout": run.job.config.rollout.model_copy(update={"max_logprob_gap": 1.0})}
    )
    run.go()
    right = [0.75 / 2**k for k in (4, 3, 2, 1, 0)]
    wrong = [-0.25 / 2**k for k in (2, 1, 0)]
    for step in range(2):
        rights = sum(map(run.is_right, run.generator.asked[step][0]))
        policy, critic = (engine.updates[2 * step : 2 * step + 2] for engine in (run.policy, run.critic))
        found = sorted(x for update in policy for x in column(update, "advantages"))
        assert found == pytest.approx(sorted(right * rights + wrong * (4 - rights)), rel=1e-6)
        returns = sorted(x for update in critic for x in column(update, "returns"))
        assert returns == [0.0] * 3 * (4 - rights) + [1.0] * 5 * rights
        assert {x for update in critic for x in column(update, "values")} == {VALUE}
        # the ratio is 1.5: 1.3 A where A > 0, 1.5 A where A < 0
        total = -(1.3 * sum(right) * rights + 1.5 * sum(wrong) * (4 - rights))
        assert sum(stats.loss * d for _, d, stats in policy) == pytest.approx(total, rel=1e-5)
        errors = 0.5 * (5 * rights * 0.75**2 + 3 * (4 - rights) * 0.25**2)
        assert sum(stats.loss * d for _, d, stats in critic) == pytest.approx(errors, rel=1e-5)
        for batches, denominator, stats in policy:
            assert stats.metrics["entropy"] == pytest.approx(2.0, rel=1e-5)  # a mean over its own tokens
            clipped = sum(int((b.extra["advantages"] > 0).sum()) for b in batches)
            assert stats.metrics["clip_fraction"] == pytest.approx(clipped / len(column([batches], "advantages")))
            assert {batch.temperature for batch in batches} == {0.8} and denominator == run.tokens(step) / 2
    assert all(len(scored) and all("values" not in b.extra for b in scored) for scored in run.critic.scored)
    assert len(run.critic.scored) == 2  # values once a step


def test_a_value_that_moved_too_far_is_clipped_as_the_key_says(start: Callable[..., Run]) -> None:
    """V_old 1/4 (scored), V 3/4 (in the update), R 1 or 0: 0.25^2 or, clipped at 0.35, 0.65^2; 0.75^2 where R = 0."""
    for clip, right in (("0.1", 0.65**2), ("null", 0.25**2)):
        run = start(f"ppo.value_clip={clip}", "train.steps=1")
        score = run.critic.score

        def moved(batches: Any, run: Run = run, score: Any = score) -> list[Scores]:
            run.critic.scores = critic_scores
            found = score(batches)
            run.critic.scores = lambda batch: Scores(values=torch.full(batch.labels.shape, 0.75))
            return found

        run.critic.score = moved
        run.go()
        rights = sum(map(run.is_right, run.generator.asked[0][0]))
        total = 0.5 * (5 * rights * right + 3 * (4 - rights) * 0.75**2)
        assert sum(stats.loss * d for _, d, stats in run.critic.updates) == pytest.approx(total, rel=1e-5)


WIDE = "rollout.max_logprob_gap=9.0"
RIGHT = sum(0.75 / 2**k for k in range(5))  # the advantages of a right answer, summed over its tokens
WRONG = sum(-0.25 / 2**k for k in range(3))


@pytest.mark.parametrize(
    ("overrides", "weight", "share"),  # w = 3 at every token
    [
        (("ppo.mismatch=truncate",), 2.0, 1.0),
        (("ppo.mismatch=truncate", "ppo.mismatch_cap=2.5"), 2.5, 1.0),
        (("ppo.mismatch=mask",), 3.0, 0.0),
        (("ppo.mismatch=mask", "ppo.mismatch_high=2.9"), 0.0, 1.0),
        (("ppo.mismatch=mask_seqs", "ppo.mismatch_cap=4.0"), 3.0, 0.0),
        (("ppo.mismatch=mask_seqs", "ppo.mismatch_low=3.1"), 0.0, 1.0),
        (("engine.precision=bf16",), 2.0, 1.0),  # auto
    ],
)
def test_a_correction_weighs_the_objective(
    start: Callable[..., Run], overrides: tuple[str, ...], weight: float, share: float
) -> None:
    """The ratio to the trainer's own log-probs is 1, so nothing is clipped; the critic is as without."""
    run = start(WIDE, "train.steps=1", *overrides)
    run.policy.scores = shifted(math.log(3))
    run.go()
    rights = sum(map(run.is_right, run.generator.asked[0][0]))
    total = sum(stats.loss * d for _, d, stats in run.policy.updates)
    assert total == pytest.approx(-weight * (RIGHT * rights + WRONG * (4 - rights)), rel=1e-5, abs=1e-9)
    for _, _, stats in run.policy.updates:
        found = [stats.metrics[name] for name in ("mismatch_weight", "mismatch_fraction", "clip_fraction")]
        assert found == pytest.approx([weight, share, 0.0], rel=1e-5)
        assert stats.metrics["mismatch_kl"] == pytest.approx(3 - 1 - math.log(3), rel=1e-5)
    errors = 0.5 * (5 * rights * 0.75**2 + 3 * (4 - rights) * 0.25**2)
    assert sum(stats.loss * d for _, d, stats in run.critic.updates) == pytest.approx(errors, rel=1e-5)


def test_without_a_correction_the_generator_is_the_old_policy(start: Callable[..., Run]) -> None:
    """Ratio 3: 1.3 A where A > 0, 3 A where A < 0."""
    for off in (("ppo.mismatch=off", "engine.precision=bf16"), ()):  # auto in fp32
        run = start(WIDE, "train.steps=1", *off)
        run.policy.scores = shifted(math.log(3))
        run.go()
        rights = sum(map(run.is_right, run.generator.asked[0][0]))
        total = sum(stats.loss * d for _, d, stats in run.policy.updates)
        assert total == pytest.approx(-(1.3 * RIGHT * rights + 3 * WRONG * (4 - rights)), rel=1e-5)
        assert not any("train_logprobs" in batch.extra for update in run.policy.updates for batch in update[0])
        assert len(run.policy.scored) == 1  # by the gate


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_old_policy_is_that_before_the_first_update(start: Callable[..., Run], epochs: int) -> None:
    """w = 3, truncated at 2, in all updates; the ratio is 1 in the first of a step, then 1.5, of which 1.3 counts where
    A > 0. Each token is scored once, and none that the first update alone takes."""
    run = start(WIDE, "ppo.mismatch=truncate", f"ppo.epochs={epochs}", "train.steps=2")
    first = {0, 2 * epochs}  # updates
    run.policy.scores = lambda batch: shifted(math.log(3 if len(run.policy.updates) in first else 4.5))(batch)
    run.go()
    for number, update in enumerate(run.policy.updates):
        up, ratio = (1.0, 1.0) if number in first else (1.3, 1.5)
        total = sum(-2 * a * (up if a > 0 else ratio) for a in column(update, "advantages"))
        assert update[2].loss * update[1] == pytest.approx(total, rel=1e-5)
        held = {"train_logprobs" in batch.extra for batch in update[0]}
        assert held == {epochs > 1 or number not in first}
        if held == {True}:
            assert {round(x, 5) for x in column(update, "train_logprobs")} == {round(math.log(3) - 1, 5)}
    scored = [sum(int(batch.loss_mask.sum()) for batch in batches) for batches in run.policy.scored]
    others = sum(
        len(column(update, "advantages")) for n, update in enumerate(run.policy.updates) if n % (2 * epochs) == 1
    )
    gate = len(column(run.policy.updates[0], "advantages"))
    assert sum(scored) == gate + (others if epochs == 1 else run.tokens(0) + run.tokens(1))


def test_advantages_are_whitened_over_the_step_and_returns_are_not(start: Callable[..., Run]) -> None:
    run = start("ppo.whiten=true", "train.steps=1").go()
    found = torch.tensor([x for update in run.policy.updates for x in column(update, "advantages")])
    assert float(found.mean()) == pytest.approx(0, abs=1e-6) and float(found.std()) == pytest.approx(1, rel=1e-5)
    assert {x for update in run.critic.updates for x in column(update, "returns")} == {0.0, 1.0}


def test_a_lambda_by_length(start: Callable[..., Run]) -> None:
    """alpha 0.25: 1 - 4/5 for 5 tokens, 1 - 4/3 < 0, so 0, for 3."""
    run = start("train.steps=1")
    settings = run.job.config.ppo.model_copy(update={"length_alpha": 0.25})
    run.job.config = run.job.config.model_copy(update={"ppo": settings})
    run.go()
    found = {round(x, 6) for update in run.policy.updates for x in column(update, "advantages")}
    assert found == {round(0.75 * 0.2**k, 6) for k in range(5)} | {0.0, -0.25}
    assert {x for update in run.critic.updates for x in column(update, "returns")} == {0.0, 1.0}  # the critic's own


def test_the_kl_in_the_reward(start: Callable[..., Run]) -> None:
    """log p - log p_ref = 0.5 at each token, kl_coef 0.1: -0.05 a token, so the returns of 5 tokens fall by 0.25, 0.2,
    ..., 0.05."""
    reference = StubScorer(lambda batch: Scores(torch.where(batch.loss_mask, -1.5, 0.0)))
    run = start("ppo.kl_coef=0.1", "train.steps=1", reference=reference).go()
    assert run.wanted == [True] and len(reference.scored) == 1
    assert {batch.temperature for batch in reference.scored[0]} == {0.8}
    rights = sum(map(run.is_right, run.generator.asked[0][0]))
    expected = [1 - 0.05 * n for n in range(1, 6)] * rights + [-0.05 * n for n in range(1, 4)] * (4 - rights)
    returns = sorted(x for update in run.critic.updates for x in column(update, "returns"))
    assert returns == pytest.approx(sorted(expected), rel=1e-5)
    metrics = run.steps[0][0]
    assert metrics["kl_coef"] == 0.1 and metrics["kl_sample"] == pytest.approx(0.5 * run.tokens(0) / 4)
    k3 = math.exp(-0.5) - 1 + 0.5
    assert metrics["kl"] == pytest.approx(k3, rel=1e-5)
    plain = start("train.steps=1").go()
    losses = [sum(stats.loss * d for _, d, stats in each.policy.updates) for each in (run, plain)]
    assert losses[0] > losses[1]  # no penalty in the loss, but lower advantages
    advantages = [sum(x for u in each.policy.updates for x in column(u, "advantages")) for each in (run, plain)]
    assert losses[0] - losses[1] == pytest.approx(advantages[1] - advantages[0], rel=1e-5)


def test_the_kl_in_the_loss(start: Callable[..., Run]) -> None:
    reference = StubScorer(lambda batch: Scores(torch.where(batch.loss_mask, -1.5, 0.0)))
    run = start("ppo.kl_coef=0.1", "ppo.kl_in=loss", "train.steps=1", reference=reference).go()
    plain = start("train.steps=1").go()
    losses = [sum(stats.loss * d for _, d, stats in each.policy.updates) for each in (run, plain)]
    assert losses[0] - losses[1] == pytest.approx(0.1 * (math.exp(-0.5) - 0.5) * run.tokens(0), rel=1e-4)
    assert {x for update in run.critic.updates for x in column(update, "returns")} == {0.0, 1.0}


def test_the_coefficient_follows_the_target_and_is_carried_over_a_resume(start: Callable[..., Run]) -> None:
    """0.5 nats a token, far above a target of 0.1 a sample: a fifth more after 4 of 10 samples is 8 % a step."""
    reference = StubScorer(lambda batch: Scores(torch.where(batch.loss_mask, -1.5, 0.0)))
    adaptive = ("ppo.kl_coef=0.1", "ppo.kl_target=0.1", "ppo.kl_horizon=10", "train.steps=3")
    run = start(*adaptive, reference=reference).go()
    seen = [metrics["kl_coef"] for metrics, _ in run.steps]
    assert seen == pytest.approx([0.1, 0.1 * 1.08, 0.1 * 1.08**2])
    assert run.job.state == {"kl_coef": pytest.approx(0.1 * 1.08**3)}
    resumed = start(*adaptive, reference=reference)
    resumed.job.step, resumed.job.state = 2, {"kl_coef": seen[2]}
    resumed.go()
    assert resumed.job.state == run.job.state and [version for version, _ in resumed.generator.loaded] == [2, 3]
    assert resumed.generator.asked == run.generator.asked[2:]
    late = start(*adaptive, "ppo.critic_warmup_steps=2", reference=reference).go()
    assert late.job.state == {"kl_coef": pytest.approx(0.1 * 1.08)}  # the policy has not moved before


def test_the_critic_warms_up_alone(start: Callable[..., Run]) -> None:
    run = start("ppo.critic_warmup_steps=2", "train.steps=3", "ppo.mismatch=truncate").go()
    assert run.critic.positions == [0, 1, 2, 3, 4, 5] and run.policy.positions == [0, 1]
    assert run.generator.loaded == [(0, 0), (1, 0), (2, 0), (3, 2)]
    assert [metrics["lr"] for metrics, _ in run.steps] == [0.0, 0.0, LR]
    assert {metrics["critic_lr"] for metrics, _ in run.steps} == {LR}
    assert len(run.policy.scored) == 1 + 1  # the gate, at the first step; the old policy, at the last


def test_what_a_tool_wrote_is_neither_trained_nor_a_state(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last token is a tool's: 4 and 2 tokens are left, and lambda counts these."""
    run = start("train.steps=1")
    sample = run.generator._sample

    def with_a_tool(prompt: Prompt, ids: list[int]) -> Sample:
        made = sample(prompt, ids)
        made.trained[-1] = False  # a reward reads what the policy wrote last, here all before it
        return made

    monkeypatch.setattr(run.generator, "_sample", with_a_tool)
    run.go()
    rights = sum(map(run.is_right, run.generator.asked[0][0]))
    expected = [0.75 / 2**k for k in range(4)] * rights + [-0.25 / 2**k for k in range(2)] * (4 - rights)
    found = sorted(x for update in run.policy.updates for x in column(update, "advantages"))
    assert found == pytest.approx(sorted(expected), rel=1e-6)
    assert {denominator for _, denominator, _ in run.policy.updates} == {(4 * rights + 2 * (4 - rights)) / 2}
    assert run.steps[0][1] == run.tokens(0)  # tokens of the step: all of them


def test_what_a_step_reports(start: Callable[..., Run]) -> None:
    run = start().go()
    for step, (metrics, tokens) in enumerate(run.steps):
        rights = sum(map(run.is_right, run.generator.asked[step][0]))
        assert tokens == run.tokens(step) and metrics["weight_version"] == step + 1
        assert metrics["reward_mean"] == metrics["finished_fraction"] == metrics["reward/first_integer"] == rights / 4
        assert metrics["step_samples"] == 4
        assert metrics["response_tokens_mean"] == tokens / 4 and metrics["reward_errors"] == 0
        assert (metrics["lr"], metrics["grad_norm"]) == (metrics["critic_lr"], metrics["critic_grad_norm"])
        assert (metrics["lr"], metrics["grad_norm"]) == (LR, NORM)
        assert metrics["value_mean"] == VALUE and metrics["return_mean"] == pytest.approx(5 * rights / tokens)
        assert metrics["explained_variance"] == pytest.approx(0)  # one value for all
        assert metrics["value_clip_fraction"] == 0 and metrics["logprob_gap_max"] == 0
        losses = [stats.loss for _, _, stats in run.critic.updates[2 * step : 2 * step + 2]]
        assert metrics["critic_loss"] == pytest.approx(sum(losses) / 2)
        assert {"rollout_s", "score_s", "train_s", "sync_s", "entropy", "kl_old"} <= metrics.keys()
        assert not {"kl", "kl_sample", "kl_coef"} & metrics.keys()
    lines = (Path(run.job.config.directory) / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {1, 2}


def test_models_take_turns(start: Callable[..., Run]) -> None:
    """With wait_on_host one model is on the device at a time, and none while samples are made."""
    for waits in (True, False):
        reference = StubScorer(shifted(0.0))
        run = start("ppo.kl_coef=0.1", f"ppo.wait_on_host={str(waits).lower()}", "train.steps=1", reference=reference)
        models = {"policy": run.policy, "critic": run.critic, "reference": reference}
        seen: dict[str, list[list[str]]] = {}

        def watch(owner: Any, name: str, label: str, seen: dict = seen, models: dict = models) -> None:
            inner = getattr(owner, name)

            def watched(*args: Any, **kwargs: Any) -> Any:
                seen.setdefault(label, []).append([who for who, model in models.items() if model.here])
                return inner(*args, **kwargs)

            setattr(owner, name, watched)

        watch(run.generator, "generate", "generator")
        for who, model in models.items():
            watch(model, "score", who)
        for who in ("policy", "critic"):
            watch(models[who], "train_step", who)
        run.go()
        for who, here in seen.items():
            alone = [] if who == "generator" else [who]
            assert all(each == (alone if waits else list(models)) for each in here), (who, here)
        assert len(seen) == 4 and run.policy.here


def test_replay_is_for_the_policy(start: Callable[..., Run]) -> None:
    run = start("data.replay_seqs=2", "train.steps=1").go()
    assert all("replay" in update[0][-1].extra for update in run.policy.updates)
    assert not any("replay" in batch.extra for update in run.critic.updates for batch in update[0])
    assert len({tuple(update[0][-1].input_ids.flatten().tolist()) for update in run.policy.updates}) == 2


def test_the_gate_stops_before_the_policy_is_updated(start: Callable[..., Run]) -> None:
    run = start()
    run.policy.scores = shifted(0.01)  # fp32: the limit is 1e-3
    with pytest.raises(Disagreement, match=r"step 1: generator and trainer differ by 0\.01 "):
        run.go()
    assert run.policy.updates == [] and run.generator.closed
    run = start("train.steps=3")
    train_step = run.policy.train_step

    def spoil(*args: Any) -> Any:
        if len(run.policy.updates) == 2:
            run.policy.scores = shifted(0.01)
        return train_step(*args)

    run.policy.train_step = spoil
    with pytest.raises(Disagreement, match="step 2: "):
        run.go()
    assert len(run.policy.scored) == 1  # later steps cost no scoring


def test_two_models_with_a_schedule_each(
    stub_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """5 steps, 2 of them the critic's alone, of 2 epochs x 3 minibatches; the last learning rate in proportion."""
    settings = ("train.steps=5", "ppo={critic_warmup_steps: 2, epochs: 2, minibatches: 3, prompts_per_step: 3}")
    more = ("optim.lr=1e-3", "optim.min_lr=1e-4", "optim.eps=1e-4", "optim.grad_clip=2", "ppo.critic_lr=5e-3")
    built: list[Role] = []
    monkeypatch.setattr(ppo, "build_engines", lambda job, roles: built.extend(roles))
    monkeypatch.setattr(ppo, "start_source", lambda job, *model: model)
    job = stub_job("ppo", *settings, *more)
    ppo.build_models(job)
    policy, critic = built
    assert (policy.name, policy.model, policy.optim, policy.total_steps) == ("policy", job.model, job.config.optim, 18)
    assert (critic.name, critic.total_steps, critic.source) == ("critic", 30, (critic.model, None))
    assert (critic.optim.lr, critic.optim.min_lr) == pytest.approx((5e-3, 5e-4))
    same = {"lr", "min_lr"}
    assert critic.optim.model_dump(exclude=same) == job.config.optim.model_dump(exclude=same)
    assert (critic.model.head, critic.model.tie_embeddings, critic.model.num_layers) == ("scalar", False, 4)
    assert critic.parallel == policy.parallel and critic.engine == policy.engine == job.config.engine
    assert ppo.critic_optim(stub_job("ppo").config) == stub_job("ppo").config.optim


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.minibatches=3", "ppo.prompts_per_step=32: must be a multiple of ppo.minibatches=3; change one of them"),
        ("ppo.critic_warmup_steps=6", "ppo.critic_warmup_steps=6: must be less than train.steps=6, or the policy is"),
        ("ppo.kl_target=6", "ppo.kl_target=6: needs a first ppo.kl_coef above 0, which it multiplies; set it"),
        ("ppo.kl_in=loss", "ppo.kl_in=loss: there is no KL with ppo.kl_coef=0; remove it, or set kl_coef, such as"),
        (
            "ppo={kl_horizon: 127, kl_target: 6, kl_coef: 0.1}",
            "ppo.kl_horizon=127: must be at least the samples of a step (prompts_per_step x group_size = 128), or the "
            "coefficient could jump or turn negative; raise it",
        ),
        ("ppo={policy_lambda: 1.0, length_alpha: 0.05}", "ppo.policy_lambda=1: ppo.length_alpha=0.05 gives the lambda"),
        ("ppo.mismatch_low=5", "ppo.mismatch_low=5: must be below ppo.mismatch_high=5; lower it"),
        ("guard.spike=skip", "guard.spike=skip: must be off in ppo"),
    ],
)
def test_what_cannot_work_is_refused(small: Path, override: str, message: str) -> None:
    config = load(str(small), ["rollout.group_size=4", override])
    found = [line for rule in RECIPE.rules for line in rule(config)]
    assert len(found) == 1 and message in found[0]
    for fine in (
        "rollout.group_size=1",
        "ppo.kl_horizon=127",
        "ppo={kl_in: loss, kl_coef: 0.1}",
        "ppo={kl_horizon: 128, kl_target: 6, kl_coef: 0.1}",
    ):
        assert not [line for rule in RECIPE.rules for line in rule(load(str(small), ["rollout.group_size=4", fine]))]


def test_experts_of_the_generator_go_to_the_policy_alone(start: Callable[..., Run]) -> None:
    run = start("rollout.router_replay=true", "ppo.kl_coef=0.1", reference=StubScorer(shifted(0.0)))
    run.generator.experts = True
    run.go()
    assert all(replays(batch) for batches, *_ in run.policy.updates for batch in batches)
    others = [batches for batches, *_ in run.critic.updates] + run.critic.scored + run.reference.scored
    assert others and all(batch.experts is None for batches in others for batch in batches)
