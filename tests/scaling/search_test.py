"""The search: what it finds is what the plan says of it, what the rules refuse is not there, and it takes seconds."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from llmtrain import cli
from llmtrain.arch.resolve import parameter_count, resolve_model
from llmtrain.config.load import load
from llmtrain.config.recipes import RECIPES, config_class, planned_recipes
from llmtrain.config.schema import Config, EngineConfig, ModelConfig, TrainConfig
from llmtrain.scaling import search as search_module
from llmtrain.scaling.layouts import WIDTH, overrides, summary, table
from llmtrain.scaling.plan import plan
from llmtrain.scaling.search import Document, Found, Tries, _layouts, _placements, document_of, search
from llmtrain.scaling.speed import room_bytes
from llmtrain.scaling.turns import heaviest, other_models, turns_of
from llmtrain.scaling.turntime import Job, step_of_turns

TEXT = RECIPES["pretrain"]


def config_of(preset: str, backend: str, batch: int, hardware: str = "h100") -> Config:
    train = TrainConfig(seq_len=8192, global_batch_seqs=batch)
    engine = EngineConfig(backend=backend)
    return Config(model=ModelConfig(preset=preset), engine=engine, train=train, plan={"hardware": hardware})


@pytest.fixture(scope="module")
def eight() -> Found:
    return search(document_of(config_of("llama3-8b", "deepspeed", 64), TEXT, 8))


def test_figures_are_those_of_the_plan(eight: Found) -> None:
    for layout in (*eight.best[:3], eight.misfit):
        p = plan(layout.config, 8)
        assert (layout.memory_bytes, layout.seconds) == (p.memory_bytes, pytest.approx(p.time.total_s))
        assert (room_bytes(layout.config, p.hardware, p.memory_bytes) >= 0) == (layout is not eight.misfit)
    assert [x.seconds for x in eight.best] == sorted(x.seconds for x in eight.best)


def test_a_layout_that_fits_is_not_given_with_more_recomputation(eight: Found) -> None:
    layouts = [(x.config.parallel.model_dump_json(), x.config.train, x.config.engine.zero_stage) for x in eight.best]
    assert all(layouts.count(layout) == 1 for layout in layouts)


def test_rules_hold(eight: Found) -> None:
    """ZeRO stage 3 has no selective recomputation, and a pipeline at least as many microbatches as ranks."""
    assert eight.refused > 0
    for layout in eight.best:
        engine, p, train = layout.config.engine, layout.config.parallel, layout.config.train
        assert not (engine.zero_stage == 3 and engine.remat == "selective")
        assert 64 // (train.micro_batch_seqs * p.dp_shard) >= p.pp


def test_the_best_may_be_given_on_the_command_line(eight: Found, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("model: {preset: llama3-8b}\ntrain: {seq_len: 8192, global_batch_seqs: 64}\n")
    best = eight.best[0]
    config = load(str(tmp_path / "x.yaml"), [*overrides(best.config).split(), "plan.hardware=h100"])
    assert plan(config, 8).time.total_s == pytest.approx(best.seconds)


def test_experts_are_spread() -> None:
    config = config_of("mixtral-8x7b", "fsdp", 8)
    small = config.model_copy(update={"model": ModelConfig(preset="mixtral-8x7b", num_layers=4)})
    found = search(document_of(small, TEXT, 8))
    assert {x.config.parallel.ep for x in found.best} == {1, 2, 4, 8}


@pytest.mark.slow
def test_sixteen_thousand_gpus_take_seconds() -> None:
    began = time.process_time()
    found = search(document_of(config_of("llama3-405b", "fsdp", 2048), TEXT, 16_384))
    assert time.process_time() - began < 30
    best = found.best[0]
    p = best.config.parallel
    assert p.tp >= 4 and p.pp >= 8 and best.seconds < 6.46  # the published layout took that long


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: {preset: smollm2-135m}\ntrain: {global_batch_seqs: 8}\nplan: {hardware: a100, gpus: 2}\n")
    assert cli.main(["plan", str(path), "--search"]) == 0
    out = capsys.readouterr().out
    assert "run (pretrain), 2 GPUs" in out and "bound by" in out and "the first: parallel.tp=1 " in out


def test_stages_of_the_document_are_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is accepted by the document that names the layers of each stage."""
    path = tmp_path / "x.yaml"
    path.write_text(
        "model: {preset: smollm2-135m}\ntrain: {global_batch_seqs: 8}\nplan: {hardware: a100, gpus: 2}\n"
        "parallel: {pp: 2, stage_layers: [14, 16]}\n"
    )
    assert cli.main(["plan", str(path), "--search"]) == 0
    (first,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("the first: "))
    assert cli.main(["plan", str(path), *first.removeprefix("the first: ").split()]) == 0


def test_a_stage_that_starts_from_one_before_may_fit_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: q\nmodel: {preset: smollm2-135m}\nplan: {hardware: a100}\nstages:\n"
        "  - {name: a, command: pretrain, ranks: 1}\n"
        "  - {name: b, command: pretrain, ranks: 1, set: {plan: {reserve_gb: 79.5}, "
        'model: {preset: null, init_from: "{run}/a"}}}\n'
        "  - {name: c, command: report}\n"
        "  - {name: d, command: pretrain, ranks: 2}\n"
    )
    assert cli.main(["plan", str(path), "--search"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("b (pretrain): --search: no layout of 1 GPUs fits 80 GB less plan.reserve_gb")
    assert said.err.count("\n") == 1 and said.out.count("the first: parallel.") == 2  # the others go on
    assert "b (pretrain), 1 GPUs\n  cannot be planned\nc (report)\n  trains nothing, and has no layout" in said.out


def test_the_misfit_is_called_what_it_is(eight: Found) -> None:
    """Only the nearest to fit are timed; others may be faster."""
    assert "the fastest of the 30 that fail to fit by least: " in summary(eight, eight.best[0].config)[1]


def test_who_samples_ahead_stays_where_it_is() -> None:
    """Processes beside the job are not moved; a server is where native samples."""
    for changes, places in (({"placement": "ahead", "workers": 2}, [2]), ({"generator": "vllm"}, [0, 1, 2, 4, 6])):
        rollout = config_class()().rollout.model_copy(update=changes)
        config = config_class()(model=ModelConfig(preset="smollm2-135m"), rollout=rollout)
        each = list(_placements(Document(config, RECIPES["grpo"], resolve_model(config.model), None, None, 8, {})))
        assert [placed.rollout.workers for placed, _ in each] == places
        assert [ranks for _, ranks in each] == [8 if "placement" in changes else 8 - workers for workers in places]


def test_what_samples_and_does_not_fit_by_itself_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layout is tried: the weights alone have 812 GB."""
    monkeypatch.setattr(search_module, "_layouts", None)
    config = config_class()(
        model=ModelConfig(preset="llama3-405b"), plan={"hardware": "h100"}, engine={"backend": "fsdp"}
    )
    said = (
        r"^--search: what samples does not fit by itself, whatever the layout: 7\d\d GB more than 80 GB less 4 \(plan"
    )
    with pytest.raises(ValueError, match=said + r".*; most are generator, 812 GB: use hardware with more memory$"):
        search(document_of(config, RECIPES["grpo"], 16_384))


def test_where_states_are_too_much_recomputation_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "_memory", None)
    tries = Tries(document_of(config_of("llama3-405b", "fsdp", 64), TEXT, 8))
    variants = next(_layouts(tries.document, tries.document.config, 8))
    tries.add(variants)
    ((least, smallest),) = tries.misfits
    assert len(variants) == 3 and tries.tried == 1 and smallest.engine.remat == "full"
    states = 18 * parameter_count(tries.document.model)
    assert least == pytest.approx(states / 8, rel=0.2)  # and weights that are whole


TURNS = """
model: {preset: smollm2-135m}
train: {seq_len: 1024, global_batch_seqs: 16}
engine: {backend: fsdp}
rollout: {group_size: 4, max_new_tokens: 768}
plan: {hardware: a100, gpus: 4}
"""


@pytest.mark.parametrize("section", ["grpo: {prompts_per_step: 16, kl_coef: 0.1}", "dpo: {}"])
def test_models_that_take_turns(section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is found is what the plan says of it; what samples is tried with ranks of its own; all may be typed back."""
    path = tmp_path / "x.yaml"
    path.write_text(TURNS + section)
    config = load(str(path), [])
    (recipe,) = planned_recipes(config)
    document = document_of(config, recipe, 4)
    found = search(document)
    workers = {layout.config.rollout.workers for layout in found.best}
    assert workers == ({0, 1, 2, 3} if recipe.samples else {0})
    assert all(layout.config.parallel.schedule == "1f1b" for layout in found.best)
    models, best = other_models(config, document.model, recipe, {}), found.best[0]
    apart = next((layout for layout in found.best if layout.config.rollout.workers == 2), found.best[-1])
    for layout in (best, apart):
        again = load(str(path), overrides(layout.config, config).split())
        p = plan(again, 4, recipe)
        assert step_of_turns(Job(again, recipe, document.model, models, p)).total_s == pytest.approx(layout.seconds)
        assert heaviest(turns_of(again, document.model, recipe, p, models))[1] == layout.memory_bytes
    console = Console(file=sys.stdout, width=WIDTH)
    console.print(table([best], document))
    out = capsys.readouterr().out
    assert ("sampling on" in out) == recipe.samples and "updating " in out and " GB left" in out


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("plan: {gpus: 2}", "plan.hardware=null: must be set for --search"),
        ("plan: {hardware: a100}\nsft: {}", "train.micro_batch_tokens=4096: not with --search"),
        ("plan: {gpus: 64, hardware: a100}", "--search: the rules refuse every layout of 64 GPUs"),
        ("plan: {gpus: 1, hardware: a100, reserve_gb: 79.5}", "--search: no layout of 1 GPUs fits 80 GB less"),
    ],
)
def test_what_cannot_be_searched(lines: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    more = ", micro_batch_tokens: 4096" if "tokens" in told else ""
    path.write_text(f"model: {{preset: smollm2-135m}}\ntrain: {{global_batch_seqs: 8{more}}}\n{lines}\n")
    assert cli.main(["plan", str(path), "--search"]) == 2
    assert capsys.readouterr().err.startswith(f"run ({'sft' if 'sft' in lines else 'pretrain'}): {told}")


def test_a_fault_is_told_though_the_model_comes_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: {init_from: ./not/there}\nplan: {gpus: 2}\n")
    assert cli.main(["plan", str(path), "--search"]) == 2
    assert capsys.readouterr().err.startswith("run (pretrain): plan.hardware=null: must be set for --search")
    assert cli.main(["plan", str(path), "--search", "plan.hardware=a100"]) == 0
    assert "cannot be planned yet\n  model.init_from=./not/there: has neither" in capsys.readouterr().out


GRPO = "model: {preset: smollm2-135m}\ntrain: {seq_len: 1024}\ngrpo: {prompts_per_step: 8}\n"
HELD = "plan: {hardware: a100, gpus: 2}\n"


@pytest.mark.parametrize(
    ("document", "said", "planned"),
    [
        (GRPO + "rollout: {max_new_tokens: 1024}\n", "rollout.max_new_tokens=1024: must be less than", "grpo"),
        ("model: {preset: smollm2-135m, lora: {rank: 8}}\n", "model.lora: must have model.init_from", "pretrain"),
        (GRPO + "rollout: {router_replay: true}\n", "rollout.router_replay=true: needs experts", "grpo"),
        (GRPO + "rollout: {placement: ahead, workers: 1, max_staleness: 1}\n", "rollout.verify=probe: not", "grpo"),
        (GRPO + "rollout: {generator: vllm, temperature: 0.001}\n", "rollout.temperature=0.001: must be", "grpo"),
        (GRPO + "rollout: {record: true, replay: a}\n", "rollout.record=true: rollout.replay=a is a", "grpo"),
        ("model: {vocab_size: 64}\n", "model.vocab_size=64: must be at least tokenizer.vocab_size=", "pretrain"),
        ("guard: {spike: rewind, spike_window: 99}\n", "checkpoint.every_steps=100: must be in 1 .. guard", "pretrain"),
        ("data: {mix: blocks, temperature: 1}\n", "data.mix=blocks: not with data.temperature", "pretrain"),
    ],
)
def test_the_rule_that_no_layout_mends_is_said(
    document: str, said: str, planned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan of a document of one stage is held to the rules of its recipe, too."""
    path = tmp_path / "x.yaml"
    path.write_text(document + HELD)
    assert cli.main(["plan", str(path), "--search"]) == 2
    assert capsys.readouterr().err.startswith(f"run ({planned}): {said}")
    assert cli.main(["plan", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"run ({planned}): {said}")


@pytest.mark.parametrize(
    "more",
    [
        "rollout: {agent: {function: not_there.py:run}}\n",
        "rollout: {generator: vllm, vllm: {python: not/there}}\n",
        "rollout: {environment: {function: 'not_there.py:Mine', unsandboxed: true}}\n",
        "rollout: {replay: not/there}\ndata: {train: not/there.jsonl}\nlog: {wandb: online}\n",
    ],
)
def test_a_plan_asks_for_no_files_and_programs(more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GRPO + HELD + more)
    assert cli.main(["plan", str(path)]) == 0, capsys.readouterr().err


def test_other_models_must_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, path = tmp_path / "teacher", tmp_path / "x.yaml"
    teacher.mkdir()
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
    shape |= {"model_type": "llama", "head_dim": 16, "max_position_embeddings": 512, "vocab_size": 49_152}
    (teacher / "config.json").write_text(json.dumps(shape | {"architectures": ["LlamaForCausalLM"]}))
    path.write_text(f"model: {{preset: smollm2-135m}}\ntrain: {{seq_len: 1024}}\ndistill: {{teacher: {teacher}}}\n")
    assert cli.main(["plan", str(path)]) == 2
    said = "run (distill): distill.teacher.teacher: model.max_positions=512: must be at least train.seq_len=1024"
    assert capsys.readouterr().err.startswith(said)
    fits = ["train.seq_len=512", "plan.gpus=3", "plan.hardware=a100", "train.global_batch_seqs=9"]
    assert cli.main(["plan", str(path), *fits, "--search"]) == 0
    found = capsys.readouterr().out
    assert "the first: parallel." in found and "\n 1   3   " not in found  # it has 2 layers


def test_a_plan_needs_rollout_workers_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GRPO + HELD + "rollout: {placement: separate}\n")
    assert cli.main(["plan", str(path)]) == 2
    assert capsys.readouterr().err.startswith("run (grpo): rollout.workers=0: must be at least 1 with")
