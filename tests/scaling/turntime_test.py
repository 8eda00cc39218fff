"""The time, the messages and the passes of a step of turns, by hand; tests/parity/forwards_test.py counts messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.arch.resolve import active_parameter_count, parameter_count, resolve_model
from llmtrain.config.load import load
from llmtrain.config.recipes import RECIPES, Recipe, config_class, planned_recipes
from llmtrain.config.recipes.base import Passes
from llmtrain.data.microbatches import Limits, plan_microbatches
from llmtrain.scaling.communication import Item, RankStep, communication, moved_bytes
from llmtrain.scaling.describe import main
from llmtrain.scaling.forwards import frozen_rank, scoring
from llmtrain.scaling.links import link_seconds
from llmtrain.scaling.plan import plan
from llmtrain.scaling.sampler import kv_cache_bytes
from llmtrain.scaling.steptime import ATTENTION, REACHED, StepTime
from llmtrain.scaling.turnlines import step_mfu, update_mfu
from llmtrain.scaling.turns import other_models
from llmtrain.scaling.turntime import Job, step_of_rows, step_of_turns
from llmtrain.scaling.work import work_of

# Memory and links so fast that only products count; these reach 50 of 100 TFLOP/s.
HARDWARE = "{name: X, bf16_tflops: 100, memory_gb: 1000, memory_gb_per_s: 1.0e+12, node_gb_per_s: 1.0e+12,"
HARDWARE += " network_gb_per_s: 1.0e+12, reached_share: 0.5}"
DOCUMENT = """
model: {preset: smollm2-135m}
parallel: {dp_shard: 2}
engine: {backend: fsdp}
train: {seq_len: 1024, micro_batch_seqs: 2, steps: 10, global_batch_seqs: 8}
rollout: {group_size: 4, max_new_tokens: 768, max_batch_seqs: 8}
"""
RATE = 50e12


def job(tmp_path: Path, section: str, *overrides: str, ranks: int = 2, hardware: str = HARDWARE) -> Job:
    (tmp_path / "hardware.yaml").write_text(hardware)
    (tmp_path / "x.yaml").write_text(DOCUMENT + section)
    config = load(str(tmp_path / "x.yaml"), [f"plan.hardware={tmp_path}/hardware.yaml", *overrides])
    (recipe,) = planned_recipes(config)
    model = resolve_model(config.model)
    return Job(config, recipe, model, other_models(config, model, recipe, {}), plan(config, ranks, recipe))


def forward_s(each: Job, model: object = None) -> float:
    """Returns the seconds of a forward over one row of 1,024 tokens on one rank; attention is slower."""
    work = work_of(model or each.model, 1024, each.config.engine)
    return 1024 * (work.blocks + work.head + work.attention * REACHED / ATTENTION) / RATE


def update_s(each: Job, model: object = None) -> float:
    """Returns the same for an update: three times, and the logits once more."""
    work = work_of(model or each.model, 1024, each.config.engine)
    return 3 * forward_s(each, model) + 1024 * work.head / RATE


def test_grpo_by_hand(tmp_path: Path) -> None:
    """16 prompts of 4 samples, each a row; on each of two ranks 32, in 4 updates of 4 microbatches of two rows, twice.
    The policy scores all before, as there are two epochs; so does the reference. A rank decodes 8 at a time, in 4
    rounds."""
    each = job(tmp_path, "grpo: {prompts_per_step: 16, minibatches: 4, epochs: 2, kl_coef: 0.01}")
    found = step_of_turns(each)
    assert (found.update.microbatches, found.update.rows, found.updates) == (4, 2, 8)
    assert list(found.seconds) == ["sampling", "scoring", "updating", "new weights"]
    N = active_parameter_count(each.model)
    decoding, prompts = 4 * 768 * 8 * 2 * N / RATE, 8 * 256 * 2 * N / RATE
    assert found.seconds["sampling"] == pytest.approx(decoding + prompts, rel=1e-3)
    assert found.seconds["scoring"] == pytest.approx(2 * 32 * forward_s(each), rel=1e-3)
    assert found.seconds["updating"] == pytest.approx(2 * 32 * update_s(each), rel=1e-3)
    assert found.total_s == pytest.approx(sum(found.seconds.values()))
    trained = 2 * 64 * 1024 * each.p.work.model
    assert update_mfu(each.config, each.p, found) == pytest.approx(trained / found.seconds["updating"] / 2 / 100e12)
    assert step_mfu(each.config, each.p, found) == pytest.approx(trained / found.total_s / 2 / 100e12)


def test_sampling_that_reads_memory_by_hand(tmp_path: Path) -> None:
    """1,000 GB a second: a token takes what weights and the cache of 8 rows of 1,024 tokens do."""
    slow = HARDWARE.replace("memory_gb_per_s: 1.0e+12", "memory_gb_per_s: 1000")
    each = job(tmp_path, "grpo: {prompts_per_step: 4}", hardware=slow)
    read = 2 * parameter_count(each.model) + kv_cache_bytes(each.model, 8, 1024, 2)
    prompts = 2 * 256 * 2 * active_parameter_count(each.model) / RATE
    assert step_of_turns(each).seconds["sampling"] == pytest.approx(768 * read / 1e12 + prompts)


def test_ppo_trains_and_asks_its_critic(tmp_path: Path) -> None:
    each = job(tmp_path, "ppo: {prompts_per_step: 16, minibatches: 2, kl_coef: 0.01}", "ppo.mismatch=off")
    found, (critic,) = step_of_turns(each), each.models.critics
    assert critic.head == "scalar"
    assert found.seconds["updating"] == pytest.approx(32 * (update_s(each) + update_s(each, critic)), rel=1e-3)
    assert found.seconds["scoring"] == pytest.approx(32 * (forward_s(each) + forward_s(each, critic)), rel=1e-3)


def test_workers_sample_and_get_the_weights_by_a_broadcast(tmp_path: Path) -> None:
    """On two of four ranks; 10 GB/s in the node, of which messages reach 0.8. Both trainers have a half of the weights,
    and gather the other one first: half of all bytes over each link."""
    slow = HARDWARE.replace("node_gb_per_s: 1.0e+12", "node_gb_per_s: 10")
    where = ("rollout.placement=separate", "rollout.workers=2")
    each = job(tmp_path, "grpo: {prompts_per_step: 16}", *where, ranks=4, hardware=slow)
    found, size = step_of_turns(each), 2 * parameter_count(each.model)
    assert found.sent_bytes["new weights"] == {"dp_shard": pytest.approx(size, rel=1e-4), "all ranks": size}
    assert found.seconds["new weights"] == pytest.approx((size / 2 + size) / 8e9, rel=1e-3)
    assert step_mfu(each.config, each.p, found) < update_mfu(each.config, each.p, found) / 2  # workers count in it


def test_messages_are_those_of_each_pass(tmp_path: Path) -> None:
    each = job(tmp_path, "grpo: {prompts_per_step: 16, minibatches: 2, kl_coef: 0.01, mismatch: 'off'}")
    found = step_of_turns(each)
    update, whole = (RankStep(each.model, each.parallel, each.config.engine, step_of_rows(each, n)) for n in (32, 64))
    sent = [item for item in communication(update) if item.what not in ("norm", "report")]
    assert found.sent_bytes["updating"] == {"dp_shard": 2 * moved_bytes(sent)}
    assert found.sent_bytes["scoring"] == {"dp_shard": moved_bytes(scoring(frozen_rank(whole)))}


def test_a_broadcast_crosses_each_link_whole(tmp_path: Path) -> None:
    each = job(tmp_path, "grpo: {}")
    rank = RankStep(each.model, each.parallel, each.config.engine, step_of_rows(each, 1))
    hardware = each.p.hardware.model_copy(update={"node_gb_per_s": 10.0})
    assert link_seconds(Item("shard", "broadcast", "weights", 8_000_000_000), rank, hardware) == pytest.approx(1.0)
    assert link_seconds(Item("shard", "all_gather", "weights", 8_000_000_000), rank, hardware) == pytest.approx(0.5)


SHAPES = [(64, 1, 2), (10, 1, 2), (3, 2, 4), (9, 1, 4), (1, 1, 8), (100, 4, 8)]


@pytest.mark.parametrize(("rows", "pp", "micro"), SHAPES)
def test_microbatches_are_those_that_training_makes(rows: int, pp: int, micro: int, tmp_path: Path) -> None:
    """Full rows through `data.microbatches`, on two data-parallel ranks."""
    each = job(tmp_path, "reward: {}", f"parallel.pp={pp}", f"train.micro_batch_seqs={micro}", ranks=2 * pp)
    step = step_of_rows(each, rows)
    limits = Limits(micro * 1024, 1024, 16, dp=2, pp=pp)
    layout = plan_microbatches([1024] * rows, [1.0] * rows, limits, lambda width: 1.0)
    assert len(layout.microbatches) == 2 * step.microbatches
    assert {len(batch) for batch in layout.microbatches} == {step.rows}


@pytest.mark.parametrize(
    ("section", "passes"),
    [
        ("grpo: {prompts_per_step: 16}", Passes(64)),
        ("grpo: {prompts_per_step: 16, minibatches: 4, dynamic_rounds: 3}", Passes(64, 1, 4, 0.75)),
        ("grpo: {prompts_per_step: 16, epochs: 2, mismatch: 'off'}", Passes(64, 2)),
        ("ppo: {prompts_per_step: 16}", Passes(64, 1, 2, 0.5, critics=1.0)),
        ("raft: {prompts_per_step: 16, minibatches: 2, keep: best}", Passes(16, 1, 2)),
        ("raft: {prompts_per_step: 16, minibatches: 2, variant: raft++}", Passes(64, 1, 2, 0.5)),
        ("distill: {teacher: a, on_policy: true, prompts_per_step: 16}", Passes(64, policy=1.0)),
        ("distill: {teacher: a, on_policy: true, estimate: sampled, prompts_per_step: 2}", Passes(8)),
        ("distill: {teacher: [{path: a}, {path: b}]}", Passes(8, frozen=2.0)),
        ("distill: {teacher: a}", Passes(8)),
        ("dpo: {}", Passes(8)),
        ("reward: {}", Passes(8)),
        ("dpo: {}\n# with adapters", Passes(8, policy=1.0)),
        ("grpo: {prompts_per_step: 16, kl_coef: 0.1}\n# with adapters", Passes(64, policy=1.0)),
    ],
)
def test_how_often_recipes_go_through_their_samples(section: str, passes: Passes, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(DOCUMENT + section)
    adapters = ["model.lora.rank=4"] if "adapters" in section else []
    config = load(str(tmp_path / "x.yaml"), adapters)
    (recipe,) = planned_recipes(config)
    assert recipe.passes_of(config) == passes


def test_a_recipe_of_ones_own_goes_through_all_that_it_samples() -> None:
    own = Recipe("own", "", "own:main", samples=True, step_size=RECIPES["grpo"].step_size)
    assert own.passes_of(config_class()()) == Passes(32 * 8)


def test_pairs_have_a_time_and_a_bubble_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 pairs, each a row of 1,024 tokens at most: on each of 2 pipelines 4, in microbatches of one. Of 30 layers the
    second pipeline rank has fewer, as it has the head."""
    where = ("parallel.pp=2", "train.micro_batch_seqs=1", "plan.gpus=4", "plan.price_per_gpu_hour=1e9")
    each = job(tmp_path, "dpo: {}", *where, ranks=4)
    found = step_of_turns(each)
    assert found.update.microbatches == 4 and found.bubble > 0 and found.scoring_bubble > 0
    assert list(found.seconds) == ["scoring", "updating"] and isinstance(found.parts["updating"], StepTime)
    main(each.config)
    out = capsys.readouterr().out
    dollars = f"{4e9 * 10 * found.total_s / 3600:,.0f} dollars at 1e+09 a GPU hour, at full lengths"
    assert dollars in out and f"MFU {update_mfu(each.config, each.p, found):.1%} of updates" in out
    assert "microbatches 4 of 1 x 1024 tokens a rank in each of 1 update, at full lengths" in out
    assert f"bubble       {found.bubble:.1%} of the slowest rank's time in updates, {found.scoring_bubble:.1%} " in out
