"""Adapters as a user has them: trained, resumed, moved to another layout, sampled with, a base for more, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmtrain.arch.adapters import adapter_shapes
from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.source import load_decoder, weight_source
from llmtrain.cli import main
from llmtrain.config.load import load
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.parallel.mesh import shutdown
from tests.forked import run_forked
from tests.small_run import DOCUMENT

WORKER = Path(__file__).parents[1] / "several_runs.py"
LORA = {"rank": 4, "alpha": 8.0, "targets": ["q", "k", "v", "o", "gate", "up", "down"]}
TUNED = ("optim.schedule=constant", "optim.warmup_steps=0", "optim.lr=1e-2", "checkpoint.every_steps=2")
TP = ("parallel.tp=2",)
FSDP = ("engine.backend=fsdp",)
GRPO = (
    *("grpo.reward=first_integer", "grpo.prompts_per_step=8", "grpo.kl_coef=0.1"),
    *("rollout.max_new_tokens=24", "rollout.group_size=8"),
)


def from_(base: Path, lora: dict | None = LORA) -> str:
    return f"model={json.dumps({'init_from': str(base)} | ({'lora': lora} if lora else {}))}"


@pytest.fixture(scope="module")
def place(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The document, a Hugging Face model, and runs on two ranks that all start from it."""
    place = tmp_path_factory.mktemp("lora")
    (place / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    problems = [{"prompt": f"say {i % 3} {'x' * (i % 5)}:", "answer": str(i % 3)} for i in range(16)]
    (place / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    model = resolve_model(load(str(place / "small.yaml"), []).model)
    weights = ((name, init_tensor(name, shape, model, 0)) for name, shape in parameter_shapes(model).items())
    save_hf(str(place / "hf"), model, weights, torch.float32, str(small_data / "tokenizer"), 1)

    def run(command: str, name: str, base: str, steps: int, *more: str) -> list[str]:
        start = [command, str(place / "small.yaml"), from_(place / base), f"run_dir={place / name}"]
        return [*start, f"train.steps={steps}", *TUNED, *more]

    for name in ("resumed", "moved"):  # they find the half-way checkpoint that `straight` will have left
        (place / name / "checkpoints").mkdir(parents=True)
        halfway = "checkpoints/step-00000002"
        (place / name / halfway).symlink_to(place / "straight" / halfway)
    prompts = f"data.train={place / 'problems.jsonl'}"
    runs = [
        run("sft", "straight", "hf", 4, *TP),
        run("sft", "resumed", "hf", 4, *TP),
        run("sft", "moved", "hf", 4, *FSDP),
        run("sft", "chained", "straight", 2, "engine.zero_stage=3", "model.lora.rank=2", "model.lora.targets=[q,down]"),
        run("grpo", "sampled", "hf", 2, *FSDP, *GRPO, prompts),
    ]
    result = run_forked(2, WORKER, json.dumps(runs))
    assert f"exit codes {[0] * len(runs)}" in result.stdout, result.stdout[-3000:]
    return place


def newest(run: Path) -> CheckpointReader:
    return CheckpointReader(str(sorted((run / "checkpoints").iterdir())[-1]))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def model_of(run: Path) -> ModelConfig:
    return resolve_model(ModelConfig(init_from=str(run)))


def inputs() -> tuple[Tensor, Tensor]:
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(40).expand_as(ids)


@torch.no_grad()
def logits_of(run: Path) -> Tensor:
    return load_decoder(str(run), model_of(run), torch.float32)(*inputs())


def test_learns_and_saves_adapters_alone(place: Path) -> None:
    reader = newest(place / "straight")
    lora = load(str(place / "small.yaml"), [from_(place / "hf")]).model
    assert reader.names() and set(reader.names()) == set(adapter_shapes(resolve_model(lora)))
    assert reader.full("layers.0.attention.q.lora.b").abs().max() > 1e-3
    assert reader.full("layers.0.attention.q.lora.b", "exp_avg_sq").any()  # the optimizer's state, of adapters alone
    assert losses(place / "straight")[-1] < losses(place / "straight")[0] - 0.05
    assert model_of(place / "straight").lora is None  # who starts from it gets the merged weights


def test_resumed_bit_for_bit_and_on_another_layout(place: Path) -> None:
    straight, resumed, moved = (newest(place / name) for name in ("straight", "resumed", "moved"))
    assert losses(place / "resumed") == losses(place / "straight")[2:]
    for name in straight.names():
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            assert straight.full(name, key).equal(resumed.full(name, key)), (name, key)
            assert torch.allclose(straight.full(name, key), moved.full(name, key), rtol=1e-4, atol=1e-6), (name, key)
    assert losses(place / "moved") == pytest.approx(losses(place / "straight")[2:], rel=1e-5)


def test_merges_on_the_way(place: Path) -> None:
    """A run on adapters that were trained on adapters; what no adapter targets is bit for bit the base's."""
    base, once, twice = (weight_source(str(place / r), model_of(place / r)) for r in ("hf", "straight", "chained"))
    for name in parameter_shapes(model_of(place / "hf")):
        change, more = (once(name) - base(name)).norm(), (twice(name) - once(name)).norm()
        assert bool(change > 0) == (".attention." in name or ".feedforward." in name), name
        assert bool(more > 0) == name.endswith(("attention.q.weight", "feedforward.down.weight")), name
    lora, straight = newest(place / "straight"), "layers.1.feedforward.down"
    delta = 2.0 * lora.full(f"{straight}.lora.b") @ lora.full(f"{straight}.lora.a")
    assert torch.allclose(once(f"{straight}.weight") - base(f"{straight}.weight"), delta, atol=1e-6)


def test_generator_gets_merged_weights(place: Path) -> None:
    """Sampled with fp32 weights that change: the trainer, which has adapters, sees the same log-probs."""
    lines = [json.loads(line) for line in (place / "sampled/metrics.jsonl").read_text().splitlines()]
    assert [line["weight_version"] for line in lines] == [1, 2]
    assert all(line["logprob_gap_max"] < 1e-4 for line in lines) and lines[1]["kl"] > 0
    assert newest(place / "sampled").full("layers.0.attention.v.lora.b").any()


@torch.no_grad()
def test_exports_for_peft_and_merged(place: Path) -> None:
    document, source = str(place / "small.yaml"), from_(place / "straight", None)
    assert main(["export", document, source, "export.dtype=fp32"]) == 0
    assert main(["export", document, source, "export.dtype=fp32", "export.adapter=true"]) == 0
    for other in ("straight/export", "straight", "hf"):  # not its own: an export, the run, the base
        assert main(["export", document, source, "export.adapter=true", f"export.path={place / other}"]) == 2
    written = json.loads((place / "straight/adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(place / "hf") and written["lora_alpha"] == 8
    assert "q_proj" in written["target_modules"]
    ids, _ = inputs()
    merged = AutoModelForCausalLM.from_pretrained(place / "straight/export", dtype=torch.float32)(ids).logits
    base = AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32)
    assert (merged - base(ids).logits).abs().max() > 0.01
    adapted = peft.PeftModel.from_pretrained(base, place / "straight/adapter")(ids).logits
    assert (adapted - merged).abs().max() <= 1e-5
    assert (adapted - logits_of(place / "straight")).abs().max() <= 1e-5


def test_a_base_that_is_gone_or_another_is_named(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    document = str(place / "small.yaml")
    evaluate = ["export", document, from_(place / "straight", None), f"export.path={tmp_path / 'out'}"]
    file, kept = place / "hf/model.safetensors", tmp_path / "kept"
    shutil.copy(file, kept)
    try:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert main(evaluate) == 2 and "its weights have changed" in capfd.readouterr().err
        go_on = ["sft", document, from_(place / "hf"), f"run_dir={place / 'straight'}", "train.steps=5", *TUNED]
        assert main(go_on) == 2 and f"model.init_from={place / 'hf'} (sha256 " in (said := capfd.readouterr().err)
        assert f"must stay {place / 'hf'} (sha256 " in said
        (place / "hf").rename(place / "away")
        assert main(evaluate) == 2 and f"{place / 'hf'}, which they were trained on, is not" in capfd.readouterr().err
        (place / "away").rename(place / "hf")
    finally:
        shutdown()  # of the run that began to go on
        shutil.copy(kept, file)


@pytest.mark.parametrize(
    ("command", "model", "message"),
    [
        ("sft", {"lora": {}}, "model.lora: must have model.init_from"),
        ("sft", {"lora": {"targets": ["q", "query"]}}, "query must be a projection of this model; choose from q, k, v"),
        ("sft", {"lora": {"targets": ["head"]}}, "head must not be one, embeddings and head have no adapters; choose"),
        ("sft", {"lora": {"targets": []}}, "model.lora.targets=[]: must name a projection; choose from"),
        ("sft", {"lora": {"targets": ["q", "q"]}}, "q is named twice; remove one"),
        ("sft", {"lora": {"targets": ["up"]}, "moe": {}}, "up must not be one, experts are one tensor"),
        (
            "sft",
            {"lora": {}, "moe": {"balance": "bias", "selection_bias": True}},
            "model.moe.balance=bias: must be none",
        ),
        ("sft", {"lora": {}}, "optim.name=muon: must be adamw with model.lora"),
        ("export", {"lora": {}}, "model.lora: is for training, export merges"),
    ],
)
def test_refused_in_one_line(
    command: str, model: dict, message: str, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shape = {"num_layers": 2, "hidden_size": 32, "ffn_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512}
    optimizer = ["optim.name=muon"] if "muon" in message else []
    assert main([command, str(small), f"model={json.dumps(shape | model)}", *optimizer]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if message in line]
    assert len(lines) == 1 and "; " in lines[0]
