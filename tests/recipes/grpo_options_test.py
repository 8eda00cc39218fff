"""What each key of GRPO's section changes in what engine and generator are handed, in absolute values. Groups, answers
and stubs are those of grpo_wiring_test.py: right answers have 5 tokens, wrong ones 3."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llmtrain.config.load import load
from llmtrain.config.recipes import config_class
from llmtrain.config.recipes.base import mismatch_of
from llmtrain.recipes import grpo
from llmtrain.types import Batch, Prompt, Sample, Scores
from tests.conftest import ROOT
from tests.recipes import grpo_wiring_test as wiring
from tests.recipes.grpo_wiring_test import A, Run, labels_of, sampled_tokens
from tests.recipes.stubs import StubScorer, shifted

start = wiring.start
PLAIN = "grpo.normalize_std=false"  # rewards 1 and 0 -> advantages 0.5 and -0.5
WIDE = "rollout.max_logprob_gap=9.0"


def run_shifted(start: Callable[..., Run], shift: float, *overrides: str) -> Run:
    """Returns a run that has ended, in which the trainer's log-probs are the generator's plus `shift`."""
    run = start(WIDE, *overrides)
    run.engine.scores = shifted(shift)
    return run.go()


def tokens_of(update: tuple) -> tuple[int, int]:
    """Returns how many trained tokens of an update are in better samples, and in worse ones."""
    signs = [batch.extra["advantages"][batch.loss_mask].sign() for batch in update[0]]
    return sum(int((s > 0).sum()) for s in signs), sum(int((s < 0).sum()) for s in signs)


def advantages_of(run: Run) -> set[float]:
    found = [batch.extra["advantages"][batch.loss_mask] for update in run.engine.updates for batch in update[0]]
    return {round(x, 6) for each in found for x in each.tolist()}


def spread(run: Run, prompt: Prompt) -> bool:
    one, other = run.answers(prompt)
    return one != other


def test_large_rewards_keep_their_differences(start: Callable[..., Run]) -> None:
    """fp32 has no number between 1e8 and 1e8 + 8; the deviation of 1e8 and 1e8 + 1 is that of 0 and 1."""
    for overrides, expected in (((), A), ((PLAIN,), 0.5), (("grpo.baseline=leave_one_out", PLAIN), 1.0)):
        group = [Sample([1], [2], [True], [-1.0], [0], True, reward=reward) for reward in (1e8, 1e8 + 1)]
        grpo.credit([group], start(*overrides).job.config.grpo)
        assert [s.columns["advantages"] for s in group] == [[pytest.approx(-expected)], [pytest.approx(expected)]]


def test_sampling_goes_on_until_enough_groups_have_a_spread(start: Callable[..., Run]) -> None:
    run = start("grpo.dynamic_rounds=5", "grpo.minibatches=1", "log.samples=1000").go()
    rounds = [prompts for prompts, _ in run.generator.asked]
    at, asked = 0, 0
    for number, (metrics, tokens) in enumerate(run.steps):
        taken = rounds[at : at + int(metrics["rounds"])]
        prompts = [prompt for each in taken for prompt in each]
        kept = [prompt for prompt in prompts if spread(run, prompt)]
        assert len(kept) >= 4 > sum(spread(run, prompt) for each in taken[:-1] for prompt in each)
        answers = [ids for prompt in kept[:4] for ids in run.answers(prompt)]
        assert labels_of(run.engine.updates[number]) == sorted(x for ids in answers for x in ids)  # the first four
        assert run.engine.updates[number][1] == sum(map(len, answers)) == 4 * (5 + 3)  # what is dropped counts nowhere
        assert tokens == sum(len(ids) for prompt in prompts for ids in run.answers(prompt))  # but it was sampled
        assert metrics["kept_fraction"] == 4 / len(prompts)
        assert metrics["reward_mean"] == 1 - len(kept) / 2 / len(prompts)  # of all that was sampled
        assert metrics["reward/first_integer"] == metrics["reward_mean"]
        at, asked = at + len(taken), asked + len(prompts)
        assert metrics["prompts"] == asked
    assert at == len(rounds) > len(run.steps)  # else nothing was shown
    written = (Path(run.job.config.directory) / "samples.jsonl").read_text().splitlines()
    assert len(written) == 2 * asked  # dropped groups too
    everyone = [prompt for each in rounds for prompt in each]
    assert len({prompt.seed for prompt in everyone}) == len(everyone)
    assert len({tuple(prompt.ids) for prompt in everyone[:12]}) == 12  # each once an epoch, by all rounds together


def test_sampling_ends_after_its_rounds_and_groups_without_a_spread_fill_up(start: Callable[..., Run]) -> None:
    run = start("grpo.dynamic_rounds=3", "train.steps=1")
    answers = run.answers

    def alike_but_one(prompt: Prompt) -> list[list[int]]:
        right, wrong = answers(prompt)
        return [right, wrong if run.numbers[tuple(prompt.ids)] == 5 else right]

    run.generator.answers = alike_but_one
    run.go()
    assert [len(prompts) for prompts, _ in run.generator.asked] == [4, 4, 4]
    assert [len(labels_of(update)) for update in run.engine.updates] == [8]  # one group, one update
    assert run.engine.updates[0][1] == (3 * 10 + 8) / 2  # it and three without a spread; 2 minibatches
    metrics = run.steps[0][0]
    assert metrics["rounds"] == 3 and metrics["prompts"] == 12 and metrics["kept_fraction"] == 1 / 12


def test_a_resumed_run_goes_on_with_the_prompts_behind_those_of_all_rounds(start: Callable[..., Run]) -> None:
    settings = ("grpo.dynamic_rounds=5", "train.steps=3")
    whole, resumed = start(*settings).go(), start(*settings)
    resumed.job.step, resumed.job.state = 2, {"prompts": whole.steps[1][0]["prompts"]}
    resumed.go()
    assert resumed.generator.asked == whole.generator.asked[-len(resumed.generator.asked) :]
    assert resumed.steps[0][0]["prompts"] == whole.steps[2][0]["prompts"] > 3 * 4


def test_long_completions_lose_reward(start: Callable[..., Run]) -> None:
    """7 tokens at most, of which the last 4 are the buffer: 5 tokens lose (5 - 3) / 4 = 1/2, 3 lose nothing."""
    run = start("grpo.overlong_buffer=4", PLAIN).go()
    assert advantages_of(run) == {0.25, -0.25}
    for step, (metrics, _) in enumerate(run.steps):
        one_right = sum(spread(run, prompt) for prompt in run.generator.asked[step][0])
        right = one_right + 2 * (4 - one_right)
        assert metrics["reward_mean"] == pytest.approx(right * 0.5 / 8)
        assert metrics["reward/overlong"] == pytest.approx(-right * 0.5 / 8)
        assert metrics["reward/first_integer"] == right / 8
    assert "reward/overlong" not in start().go().steps[0][0]


@pytest.mark.parametrize(
    ("overrides", "better"),
    [
        ((), A),
        (("grpo.std_eps=0.0",), 0.707107),  # the default's 1e-6 is seen in the last place
        (("grpo.baseline=leave_one_out", PLAIN), 1.0),
        (("grpo.baseline=leave_one_out",), 2 * A),
        (("grpo.std_eps=1.0",), 0.5 / (2**-0.5 + 1)),
    ],
)
def test_advantages(start: Callable[..., Run], overrides: tuple[str, ...], better: float) -> None:
    assert advantages_of(start(*overrides).go()) == {round(better, 6), round(-better, 6)}


def test_the_deviation_of_the_batch(start: Callable[..., Run]) -> None:
    run = start("grpo.std_of=batch", "train.steps=1").go()
    ones = sum(1 + (not spread(run, prompt)) for prompt in run.generator.asked[0][0])
    std = math.sqrt(ones * (8 - ones) / 8 / 7)  # of 8 rewards, `ones` of which are 1
    assert advantages_of(run) == {round(0.5 / (std + 1e-6), 6), round(-0.5 / (std + 1e-6), 6)}


def test_sequences_count_alike(start: Callable[..., Run]) -> None:
    """Ratio 1.5: 1.3 A for each better sample, 1.5 A for each worse; metrics stay means over tokens."""
    run = run_shifted(start, math.log(1.5), "grpo.aggregate=sequences")
    for update in run.engine.updates:
        (better, worse), denominator, stats = tokens_of(update), update[1], update[2]
        assert denominator == 8 / 2
        assert stats.loss == pytest.approx((-1.3 * A * better / 5 + 1.5 * A * worse / 3) / 4, rel=1e-5)
        assert stats.metrics["clip_fraction"] == pytest.approx(better / (better + worse), rel=1e-5)
        assert stats.metrics["entropy"] == pytest.approx(2.0, rel=1e-5)


def test_a_constant_divides(start: Callable[..., Run]) -> None:
    run = run_shifted(start, math.log(1.5), "grpo.aggregate=constant")
    for update in run.engine.updates:
        (better, worse), denominator, stats = tokens_of(update), update[1], update[2]
        assert denominator == 8 * 7 / 2 and all("weights" not in batch.extra for batch in update[0])
        assert stats.loss == pytest.approx((-1.3 * A * better + 1.5 * A * worse) / 28, rel=1e-5)
        assert stats.metrics["entropy"] == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "better", "worse"),  # what a token adds to the loss, in multiples of A; every log p is ln 1.5 - 1
    [
        (("grpo.dual_clip=1.4",), -1.3, 1.4),
        (("grpo.objective=cispo", "grpo.ratio_cap=1.2"), -1.2 * (math.log(1.5) - 1), 1.2 * (math.log(1.5) - 1)),
        (("grpo.objective=cispo",), -1.5 * (math.log(1.5) - 1), 1.5 * (math.log(1.5) - 1)),
        (("grpo.objective=gspo", "grpo.aggregate=tokens"), -1.3, 1.5),  # SETTINGS has clip_high 0.3
        (("grpo.objective=gspo", "grpo.aggregate=tokens", "grpo.clip_high=4e-4"), -1.0004, 1.5),
    ],
)
def test_objectives(start: Callable[..., Run], overrides: tuple[str, ...], better: float, worse: float) -> None:
    run = run_shifted(start, math.log(1.5), *overrides)
    for update in run.engine.updates:
        above, below = tokens_of(update)
        assert update[2].loss == pytest.approx(A * (better * above + worse * below) / update[1], rel=1e-5)


def test_a_lower_ratio_is_clipped_at_the_lower_bound(start: Callable[..., Run]) -> None:
    for objective in ("clip", "gspo"):
        run = run_shifted(start, math.log(0.5), f"grpo.objective={objective}", "grpo.aggregate=tokens")
        for update in run.engine.updates:
            above, below = tokens_of(update)
            assert update[2].loss == pytest.approx(A * (-0.5 * above + 0.8 * below) / update[1], rel=1e-5)


def test_the_ratio_of_a_sequence_is_that_of_its_tokens_together(start: Callable[..., Run]) -> None:
    """The first token of each sample alone is twice as likely: 2^(1/5) and 2^(1/3); wide bounds."""
    run = start(WIDE, "grpo.objective=gspo", "grpo.clip_low=0.9", "grpo.clip_high=9.0")
    plain = shifted(0.0)

    def first_only(batch: Batch) -> Scores:
        scores, branches = plain(batch), batch.branch_ids
        first = batch.loss_mask & (branches != branches.roll(1, 1))
        scores.logprobs = scores.logprobs + math.log(2) * first
        return scores

    run.engine.scores = first_only
    run.go()
    for update in run.engine.updates:
        above, below = tokens_of(update)
        expected = A * (-(2 ** (1 / 5)) * above / 5 + 2 ** (1 / 3) * below / 3) / 4  # the mean over 8 / 2 sequences
        assert update[1] == 4 and update[2].loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("form", "value"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_the_kl_in_the_loss(start: Callable[..., Run], form: str, value: float) -> None:
    run = start("grpo.kl_coef=0.1", f"grpo.kl_form={form}", reference=StubScorer(shifted(-0.5))).go()
    for update in run.engine.updates:
        above, below = tokens_of(update)
        expected = (A * (below - above) + 0.1 * value * (above + below)) / update[1]
        assert update[2].loss == pytest.approx(expected, rel=1e-5)
        assert update[2].metrics["kl"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("form", "value"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_the_kl_in_the_reward(start: Callable[..., Run], form: str, value: float) -> None:
    """0.1 value a token: right answers lose 5 of these, wrong ones 3; the loss has no term of its own."""
    reference = StubScorer(shifted(-0.5))
    run = start("grpo.kl_coef=0.1", "grpo.kl_in=reward", f"grpo.kl_form={form}", PLAIN, reference=reference).go()
    half = (1 - 0.1 * value * (5 - 3)) / 2
    assert {round(x, 5) for x in advantages_of(run)} == {round(half, 5), round(-half, 5)}
    for update in run.engine.updates:
        above, below = tokens_of(update)
        assert update[2].loss == pytest.approx(half * (below - above) / update[1], rel=1e-4)
        assert "ref_logprobs" not in update[0][0].extra
    for step, (metrics, _) in enumerate(run.steps):
        assert metrics["kl"] == pytest.approx(value, rel=1e-5)
        assert metrics["reward_mean"] == metrics["reward/first_integer"]  # as it was given
        scored = reference.scored[step]
        assert sum(int(batch.loss_mask.sum()) for batch in scored) == sampled_tokens(run, step)
        assert {batch.temperature for batch in scored} == {0.8}
    assert len(reference.scored) == 2


def test_several_epochs_on_the_same_rollouts(start: Callable[..., Run]) -> None:
    run = start("grpo.epochs=3", "data.replay_seqs=4").go()
    assert run.totals == [2 * 3 * 2] and run.engine.positions == list(range(12))
    for step in range(2):
        own = run.engine.updates[6 * step : 6 * step + 6]
        policy = [[batch for batch in update[0] if "advantages" in batch.extra] for update in own]
        labels = [labels_of((batches,)) for batches in policy]
        assert labels[:2] == labels[2:4] == labels[4:] and labels[0] != labels[1]
        text = [[b.input_ids.tolist() for b in update[0] if "advantages" not in b.extra] for update in own]
        assert len({str(rows) for rows in text}) == 6  # but new text
    assert [version for version, _ in run.generator.loaded] == [0, 1, 2] and run.generator.loaded[-1] == (2, 12)


def test_idle_steps_of_several_epochs_keep_the_schedule(start: Callable[..., Run]) -> None:
    run = start(
        *("grpo.epochs=2", "optim.warmup_steps=0", "optim.schedule=linear", "optim.min_lr=0.0", "optim.lr=2e-3")
    )
    run.generator.answers = lambda prompt: [[run.job.tokenizer.eos_id]] * 2
    run.go()
    assert [m["lr"] for m, _ in run.steps] == pytest.approx([2e-3, 2e-3 * 3 / 7])  # of 8 updates the first and fifth


@pytest.mark.parametrize(
    ("overrides", "weight", "share"),  # w = 3 at every token
    [
        (("grpo.mismatch=truncate",), 2.0, 1.0),
        (("grpo.mismatch=truncate", "grpo.mismatch_cap=2.5"), 2.5, 1.0),
        (("grpo.mismatch=truncate", "grpo.mismatch_cap=4.0"), 3.0, 0.0),
        (("grpo.mismatch=mask",), 3.0, 0.0),
        (("grpo.mismatch=mask", "grpo.mismatch_high=2.9"), 0.0, 1.0),
        (("grpo.mismatch=mask", "grpo.mismatch_low=3.1"), 0.0, 1.0),
        (("grpo.mismatch=mask_seqs",), 2.0, 1.0),
        (("grpo.mismatch=mask_seqs", "grpo.mismatch_cap=4.0"), 3.0, 0.0),
        (("grpo.mismatch=mask_seqs", "grpo.mismatch_high=2.9"), 0.0, 1.0),
        (("grpo.mismatch=mask_seqs", "grpo.mismatch_low=3.1"), 0.0, 1.0),
        (("engine.precision=bf16",), 2.0, 1.0),  # auto
    ],
)
def test_a_correction_weighs_the_objective(
    start: Callable[..., Run], overrides: tuple[str, ...], weight: float, share: float
) -> None:
    """The ratio to the trainer's own log-probs is 1, so nothing is clipped."""
    run = run_shifted(start, math.log(3), *overrides)
    for update in run.engine.updates:
        above, below = tokens_of(update)
        stats = update[2]
        assert stats.loss == pytest.approx(weight * A * (below - above) / update[1], rel=1e-5)
        found = {name: stats.metrics[name] for name in ("mismatch_weight", "mismatch_fraction", "clip_fraction")}
        assert list(found.values()) == pytest.approx([weight, share, 0.0], rel=1e-5)
        assert stats.metrics["logprob_gap_max"] == pytest.approx(math.log(3))  # what the gate looks at


def test_without_a_correction_the_generator_is_the_old_policy(start: Callable[..., Run]) -> None:
    for off in (("grpo.mismatch=off", "engine.precision=bf16"), ()):  # auto in fp32
        run = run_shifted(start, math.log(3), *off)
        for update in run.engine.updates:
            above, below = tokens_of(update)
            assert update[2].loss == pytest.approx(A * (-1.3 * above + 3 * below) / update[1], rel=1e-5)
            assert all("train_logprobs" not in batch.extra for batch in update[0])
        assert len(run.engine.scored) == 1  # by the gate, at the first step


def test_what_older_weights_sampled_is_corrected_for_in_fp32_too(start: Callable[..., Run]) -> None:
    ahead = ("rollout.max_staleness=1", "rollout.placement=ahead", "rollout.workers=1", "rollout.verify=off")
    forms = [mismatch_of(start(*overrides).job.config, "grpo").form for overrides in ((), ahead)]
    assert forms == ["off", "truncate"]


def test_log_probs_of_the_old_policy_are_not_computed_twice(start: Callable[..., Run]) -> None:
    """The first update on a set of rollouts gives its own; others are scored before it."""
    run = run_shifted(start, 0.1, "grpo.mismatch=truncate")
    held = [{"train_logprobs" in batch.extra for batch in update[0]} for update in run.engine.updates]
    assert held == [{False}, {True}] * 2
    first, gate, second = run.engine.scored
    assert gate[0] is run.engine.updates[0][0][0]
    for own, update in zip((first, second), run.engine.updates[1::2], strict=True):
        assert labels_of((own,)) == labels_of(update)
        for batch in update[0]:
            old = batch.extra["old_logprobs"] + 0.1
            assert batch.extra["train_logprobs"][batch.loss_mask].equal(old[batch.loss_mask])
    single = run_shifted(start, 0.1, "grpo.mismatch=truncate", "grpo.minibatches=1")
    assert len(single.engine.scored) == 1  # the gate alone
    epochs = run_shifted(start, 0.1, "grpo.mismatch=truncate", "grpo.minibatches=1", "grpo.epochs=2")
    assert len(epochs.engine.scored) == 1 + 2
    assert all("train_logprobs" in batch.extra for update in epochs.engine.updates for batch in update[0])


def test_sequences_off_the_policy_are_left_out(start: Callable[..., Run]) -> None:
    """log p is 0.5 below the generator's: worse samples are left out, better ones keep exp(-0.5) A."""
    run = run_shifted(start, -0.5, "grpo.off_policy_delta=0.4", "grpo.clip_low=0.9")
    kept = run_shifted(start, -0.5, "grpo.off_policy_delta=0.6", "grpo.clip_low=0.9")
    ratio = math.exp(-0.5)
    for one, other in zip(run.engine.updates, kept.engine.updates, strict=True):
        above, below = tokens_of(one)
        assert one[2].loss == pytest.approx(-ratio * A * above / one[1], rel=1e-5)
        assert one[2].metrics["off_policy_fraction"] == pytest.approx(below / (above + below), rel=1e-5)
        assert other[2].loss == pytest.approx(ratio * A * (below - above) / other[1], rel=1e-5)


def test_an_objective_brings_its_defaults(small: Path) -> None:
    def keys(*overrides: str) -> tuple[float, float, str]:
        g = load(str(small), list(overrides)).grpo
        return g.clip_low, g.clip_high, g.aggregate

    assert keys() == keys("grpo.objective=cispo") == (0.2, 0.2, "tokens")
    assert keys("grpo.objective=gspo") == (3e-4, 4e-4, "sequences")
    assert keys("grpo.objective=gspo", "grpo.clip_high=0.1", "grpo.aggregate=constant") == (3e-4, 0.1, "constant")
    section = config_class().model_validate({"name": "a", "grpo": {"objective": "gspo"}}).grpo
    assert section.model_dump(exclude_unset=True) == {"objective": "gspo"}  # a stage may choose another objective


def test_what_the_page_shows_is_valid(tmp_path: Path) -> None:
    page = (ROOT / "docs/posttraining/grpo.md").read_text()
    (document,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (tmp_path / "dapo.yaml").write_text(document)
    assert load(str(tmp_path / "dapo.yaml"), []).grpo.dynamic_rounds == 3
    sections = [yaml.safe_load(text) for text in re.findall(r"`(?:grpo: )?(\{[a-z_]+:[^`]*\})`", page)]
    assert len(sections) == 4
    for section in sections:
        config_class().model_validate({"name": "a", "grpo": section})
