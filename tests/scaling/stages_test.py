"""What stages need that train nothing, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.arch.hardware import hardware_of
from llmtrain.arch.resolve import active_parameter_count, parameter_count, resolve_model
from llmtrain.commands import evaluate
from llmtrain.config.load import load
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.scaling.describe import main, planned
from llmtrain.scaling.sampler import Asked, Sampler, kv_cache_bytes
from llmtrain.scaling.stages import TEXT_ROWS, asked_by, memory_turns, sampling_lines, scored_by, scoring_seconds
from llmtrain.scaling.steptime import ATTENTION, REACHED
from llmtrain.scaling.work import work_of

HARDWARE = "{name: X, bf16_tflops: 100, memory_gb: 50, memory_gb_per_s: 1.0e+12, reached_share: 0.5, watts: 100}"
DOCUMENT = """
model: {preset: smollm2-135m}
engine: {backend: fsdp, precision: bf16}
train: {seq_len: 1024}
rollout: {group_size: 8, max_new_tokens: 256}
"""
SMOLLM2 = resolve_model(ModelConfig(preset="smollm2-135m"))
N, RATE = active_parameter_count(SMOLLM2), 50e12


def config_of(tmp_path: Path, section: str, *overrides: str) -> Config:
    (tmp_path / "hardware.yaml").write_text(HARDWARE)
    (tmp_path / "x.yaml").write_text(DOCUMENT + section)
    return load(str(tmp_path / "x.yaml"), [f"plan.hardware={tmp_path}/hardware.yaml", *overrides])


JUDGE = "judge: {prompts: 64, BY}\nrewards: [{name: math}]"
ROW, NEW = 1024, 256


@pytest.mark.parametrize(
    ("section", "asked", "rows"),
    [
        (JUDGE.replace("BY", "by: greedy"), [Asked(64, 8, NEW, ROW), Asked(64, 1, NEW, ROW)], 0),
        (JUDGE.replace("BY", "by: reward"), [Asked(64, 8, NEW, ROW)], 0),
        (JUDGE.replace("BY", "by: rubric, votes: 3"), [Asked(64, 8, NEW, ROW), Asked(512, 3, 64, ROW)], 0),
        (JUDGE.replace("BY", "by: logprob"), [Asked(64, 8, NEW, ROW)], 0),  # those that it was sampled with
        (JUDGE.replace("BY", "by: logprob") + "\nrollout: {temperature: 0.5}", [Asked(64, 8, NEW, ROW)], 512),
        (
            "constitutional: {prompts: 10, revisions: 2, pairs_per_prompt: 3, principles: p.yaml}",
            [Asked(10, 1, NEW, ROW, 3), Asked(10, 1, 128, ROW, 2), Asked(10, 8, NEW, ROW)],
            120,  # 30 comparisons of two choices in two orders
        ),
        (
            "constitutional: {prompts: 10, revisions: 0, pairs_per_prompt: 0, agreement: a, agreement_pairs: 5, "
            "label: thought, principles: p.yaml}",
            [Asked(10, 1, 128, ROW)],
            20,
        ),
    ],
)
def test_what_is_sampled_and_scored(section: str, asked: list[Asked], rows: int, tmp_path: Path) -> None:
    base, _, more = section.partition("\nrollout: ")
    config = config_of(tmp_path, base, *(["rollout.temperature=0.5"] if more else []))
    (stage,) = planned(config)
    assert stage.recipe is None and stage.ranks == 1 and stage.command in section
    assert list(asked_by(stage.command, config, SMOLLM2, 1)) == asked
    assert scored_by(stage.command, config) == rows


def test_the_time_of_a_judge_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """512 samples, 256 together, in two rounds; then 64 greedy ones. Products reach 50 TFLOP/s."""
    config = config_of(tmp_path, JUDGE.replace("BY", "by: greedy"), "plan.price_per_gpu_hour=3600")
    prompts = 2 * 64 * 768
    seconds = (2 * 256 * 256 + 256 * 64 + prompts) * 2 * N / RATE
    main(config)
    out = capsys.readouterr().out
    assert out.startswith("run (judge)\n  ranks        1, which train nothing\n")
    assert "work         at most 576 completions of 147,456 tokens a rank; 0 rows are scored" in out
    assert f"time         {seconds:.3g} s at full lengths: sampling {seconds:.3g}, scoring 0 (est" in out
    assert f"{seconds:.3g} dollars at 3600 a GPU hour, at full lengths" in out
    assert "fits         " in out and "not counted" not in out


EVAL = "eval: {problems: 256, samples: 8, text_seqs: 100, tasks: [gsm8k]}\nrewards: [{name: math}]"


def test_the_rows_of_a_forward_over_text_are_those_of_eval() -> None:
    assert TEXT_ROWS == evaluate.ROWS_A_BATCH


def test_an_evaluation_by_hand(tmp_path: Path) -> None:
    """On four ranks each answers 64 problems, 8 times and greedily; a sharded model scores the text on all."""
    config = config_of(tmp_path, EVAL)
    samplers = [Sampler(config, SMOLLM2, asked, None) for asked in asked_by("eval", config, SMOLLM2, 4)]
    assert [each.asked for each in samplers] == [Asked(64, 8, NEW, ROW), Asked(64, 1, NEW, ROW)]
    turns, weights = memory_turns("eval", config, SMOLLM2, samplers, 4), 2 * parameter_count(SMOLLM2)
    assert turns["sampling"]["generator"] == weights
    assert turns["sampling"]["KV cache"] == kv_cache_bytes(SMOLLM2, 256, ROW, 2)
    assert turns["scoring"]["model"] == pytest.approx(weights / 4, rel=1e-3) and "KV cache" not in turns["scoring"]
    alone = memory_turns("eval", config, SMOLLM2, samplers, 1)["scoring"]
    values = 4 * 576 + 2 * 64 * (9 + 3) + 4 * 1536  # of a block, a token
    assert alone["model"] == weights and alone["activations"] == 2 * TEXT_ROWS * ROW * values
    lines = "\n".join(sampling_lines("eval", config, SMOLLM2, 4))
    assert "not counted  eval.tasks, whose rows or answers say how much it is" in lines
    work = work_of(SMOLLM2, ROW, config.engine)
    seconds = 100 * ROW * (work.blocks + work.head + work.attention * REACHED / ATTENTION) / RATE
    assert scoring_seconds(config, SMOLLM2, 100, hardware_of(config.plan.hardware)) == pytest.approx(seconds)
    assert f"scoring {seconds / 4:.3g} " in lines and "hardware     4 x X" in lines
    tasks = config_of(tmp_path, EVAL, "eval.problems=0", "eval.text=false")
    lines = "\n".join(sampling_lines("eval", tasks, SMOLLM2, 1))
    assert "not counted  eval.tasks" in lines and "fits  " in lines and "time  " not in lines


@pytest.mark.parametrize(
    ("section", "overrides", "ranks", "said"),
    [
        ("eval: {problems: 0}", ["train.seq_len=256"], 1, "model, 0.269 GB: use more ranks; or use hardware with more"),
        (
            EVAL,
            ["rollout.generator=vllm", "eval.text=false", "rollout.vllm.cache_gib=0.1"],
            1,
            "model, 0.269 GB: use h",
        ),
        (
            JUDGE.replace("BY", "by: logprob"),
            ["rollout.temperature=0.5", "rollout.max_batch_seqs=8"],
            1,
            "model, 0.269",
        ),
        ("eval: {problems: 0}", ["train.seq_len=8192"], 1, "activations, 2.62 GB: raise parallel.tp or cp"),
        (
            "eval: {problems: 0}",
            ["train.seq_len=8192", "engine.logprob_chunk_tokens=512"],
            4,
            "activations, 0.164 GB: lower train.mi",
        ),
    ],
)
def test_what_does_not_fit_has_a_remedy_that_helps(
    section: str, overrides: list[str], ranks: int, said: str, tmp_path: Path
) -> None:
    """Nothing is computed again without a backward; who judges has one rank."""
    config = config_of(tmp_path, section, *overrides, "plan.reserve_gb=49.99")
    command = "judge" if "judge" in section else "eval"
    assert f"; most are {said}" in "\n".join(sampling_lines(command, config, SMOLLM2, ranks))


def test_an_evaluation_with_a_server_has_the_model_too(tmp_path: Path) -> None:
    """It scores likelihoods in its own process. No longer row is sampled than the model has positions."""
    config = config_of(tmp_path, EVAL, "rollout.generator=vllm", "train.seq_len=100000")
    samplers = [Sampler(config, SMOLLM2, asked, None) for asked in asked_by("eval", config, SMOLLM2, 1)]
    assert samplers[0].asked.row_tokens == 8192
    held = memory_turns("eval", config, SMOLLM2, samplers, 1)["sampling"]
    assert held["model"] == held["generator"] == 2 * parameter_count(SMOLLM2) and held["KV cache"] == 4 * 2**30


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ("eval: {problems: 1}\n", "pretrain"),  # of a model that is made here
        ("eval: {problems: 1}\nmodel: {init_from: a}\n", "eval"),
        ("eval: {problems: 1, every_steps: 5}\nmodel: {init_from: a}\n", "pretrain"),
        ("eval: {problems: 1}\nmodel: {init_from: a}\ngrpo: {}\n", "grpo"),
        ("judge: {prompts: 1}\n", "judge"),
        ("tokenizer: {vocab_size: 32768}\n", "tokenizer"),
        ("tokenizer: {vocab_size: 1024}\nmodel: {num_layers: 2}\n", "pretrain"),
        ("judge: {prompts: 1}\nsft: {}\n", "sft"),
        ("constitutional: {prompts: 1}\n", "constitutional"),
    ],
)
def test_what_a_document_of_one_stage_is_for(more: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(more)
    assert [stage.command for stage in planned(load(str(tmp_path / "x.yaml"), []))] == [found]


def test_a_stage_is_held_to_its_rules(tmp_path: Path) -> None:
    config = config_of(tmp_path, JUDGE.replace("BY", "by: greedy"), "rollout.group_size=1")
    with pytest.raises(ValueError, match=r"^run \(judge\): rollout.group_size=1: must be at least 2, samples are"):
        main(config)


def test_who_judges_runs_in_one_process(tmp_path: Path) -> None:
    config = config_of(tmp_path, JUDGE.replace("BY", "by: greedy"), "plan.gpus=8")
    with pytest.raises(ValueError, match=r"plan.gpus=8: judge runs in one process; remove plan.gpus"):
        main(config)
