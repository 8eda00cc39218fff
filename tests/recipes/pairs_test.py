"""DPO and reward models as a user runs them: one layout and another, resumed, with adapters, exported."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

WORKER = Path(__file__).parents[1] / "several_runs.py"
SETTINGS = ("train.steps=4", "train.global_batch_seqs=6", "train.eval_every_steps=2", "checkpoint.every_steps=2")
LORA = ('model.lora={"rank": 4, "targets": ["q", "v"]}',)


def lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def numbers(run_dir: Path) -> list[dict[str, float]]:
    """What does not depend on the clock."""
    varying = ("tokens_per_s", "step_s", "peak_bytes")
    return [{name: value for name, value in line.items() if name not in varying} for line in lines(run_dir)]


@pytest.fixture(scope="module")
def start(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration, pairs (the right digit over a wrong one), and an untrained model."""
    import torch

    from llmtrain.config.load import load
    from llmtrain.model.decoder import init_tensor, parameter_shapes
    from llmtrain.model.hf_write import save_hf
    from tests.small_run import DOCUMENT

    base = tmp_path_factory.mktemp("pairs")
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    rows = [{"prompt": f"say {i % 9} {'x' * (i % 5)}:", "chosen": str(i % 9), "rejected": "9 and"} for i in range(40)]
    for name, chosen in {"train": rows[:32], "held_out": rows[32:]}.items():
        (base / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    config = load(str(base / "small.yaml"), []).model
    shapes = parameter_shapes(config)
    weights = ((name, init_tensor(name, shape, config, 0)) for name, shape in shapes.items())
    save_hf(str(base / "hf"), config, weights, torch.float32, str(small_data / "tokenizer"), 1)
    return base


@pytest.fixture(scope="module")
def run(start: Path) -> Callable:
    """run(ranks, command, {run directory: overrides}) -> nothing; each with the same ranks."""
    from tests.forked import run_forked

    def launch(ranks: int, command: str, runs: dict[Path, tuple[str, ...]]) -> subprocess.CompletedProcess[str]:
        model = {"init_from": str(start / "hf"), **({"head": "scalar"} if command == "reward" else {})}
        files = [f"data.{name}={start / name}.jsonl" for name in ("train", "held_out")]
        shared = (command, str(start / "small.yaml"), f"model={json.dumps(model)}", *files, *SETTINGS)
        arguments = [[*shared, f"run_dir={run_dir}", *overrides] for run_dir, overrides in runs.items()]
        result = run_forked(ranks, WORKER, json.dumps(arguments), timeout_s=240)
        assert f"exit codes {[0] * len(runs)}" in result.stdout, result.stdout[-3000:]
        return result

    return launch


def resumed(whole: Path, place: Path) -> Path:
    """A run directory with what `whole` had after step 2."""
    shutil.copytree(whole / "checkpoints/step-00000002", place / "checkpoints/step-00000002")
    return place


def assert_same_end(whole: Path, again: Path) -> None:
    """The steps behind the checkpoint, and the last weights, bit for bit."""
    assert numbers(again) == numbers(whole)[2:]
    for file in (whole / "checkpoints/step-00000004").glob("*.safetensors"):
        after = load_file(again / "checkpoints/step-00000004" / file.name)
        assert all(after[name].equal(tensor) for name, tensor in load_file(file).items())


def assert_close(run_dir: Path, whole: Path) -> None:
    """Same pairs: only the order of sums differs."""
    for here, there in zip(numbers(run_dir), numbers(whole), strict=True):
        assert here == pytest.approx(there, rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def preferred(run: Callable, start: Path) -> dict[str, Path]:
    """Runs of DPO on two data-parallel ranks."""
    runs = {name: start / "dpo" / name for name in ("whole", "precomputed", "lora", "simpo")}
    overrides = {"precomputed": ("dpo.reference=precomputed",), "lora": LORA, "simpo": ("dpo.loss=simpo",)}
    run(2, "dpo", {path: overrides.get(name, ()) for name, path in runs.items()})
    return runs


def test_dpo_learns_the_pairs_and_says_so(preferred: dict[str, Path]) -> None:
    first, *_, last = lines(preferred["whole"])
    assert (first["accuracy"], first["margin"]) == (0.5, 0.0)  # the policy is the reference: all ties
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and last["loss"] < 0.69
    assert last["margin"] > 0 and last["accuracy"] > 0.9
    held_out = lines(preferred["whole"], "evaluations.jsonl")
    assert [line["step"] for line in held_out] == [0, 2, 4] and held_out[-1]["pairs"] == 8
    assert held_out[0]["accuracy"] == 0.5 and held_out[-1]["accuracy"] > 0.9
    assert held_out[-1]["accuracy_low"] < held_out[-1]["accuracy"] <= held_out[-1]["accuracy_high"] <= 1


def test_dpo_with_a_reference_of_another_kind(preferred: dict[str, Path]) -> None:
    assert_close(preferred["precomputed"], preferred["whole"])
    assert {path.name for path in preferred["precomputed"].glob("reference-*")} == {
        "reference-train.json",
        "reference-held_out.json",
    }
    lora = lines(preferred["lora"])
    assert lora[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and lora[-1]["margin"] > lora[0]["margin"] == 0.0
    assert lines(preferred["simpo"])[0]["loss"] > 0.7  # gamma, and no reference


def test_dpo_resumed_bit_for_bit_and_on_other_layouts(
    preferred: dict[str, Path], run: Callable, tmp_path: Path
) -> None:
    again = {name: resumed(preferred[name], tmp_path / name) for name in ("whole", "precomputed", "lora")}
    shutil.copy(preferred["precomputed"] / "reference-train.json", tmp_path / "precomputed")
    overrides = {"precomputed": ("dpo.reference=precomputed",), "lora": LORA}
    layouts = {tmp_path / "context": ("parallel.cp=2",), tmp_path / "stages": ("parallel.pp=2", "engine.backend=fsdp")}
    run(2, "dpo", {path: overrides.get(name, ()) for name, path in again.items()} | layouts)
    for name, path in again.items():
        assert_same_end(preferred[name], path)
    for path in layouts:
        assert_close(path, preferred["whole"])


@pytest.fixture(scope="module")
def rewarded(run: Callable, start: Path) -> Path:
    """A reward model on two data-parallel ranks."""
    run(2, "reward", {start / "reward": ()})
    return start / "reward"


def test_a_reward_model_learns_the_pairs_and_goes_on(rewarded: Path, run: Callable, tmp_path: Path) -> None:
    losses = [line["loss"] for line in lines(rewarded)]
    assert losses[0] == pytest.approx(0.69, abs=0.1) and losses[-1] < losses[0]
    held_out = lines(rewarded, "evaluations.jsonl")
    assert [line["step"] for line in held_out] == [0, 2, 4] and held_out[-1]["loss"] < held_out[0]["loss"]
    layouts = {tmp_path / "tensor": ("parallel.tp=2",), tmp_path / "context": ("parallel.cp=2", "engine.backend=fsdp")}
    run(2, "reward", {resumed(rewarded, tmp_path / "again"): (), **layouts})
    assert_same_end(rewarded, tmp_path / "again")
    for path in layouts:
        assert_close(path, rewarded)


def test_an_exported_reward_model_scores_as_ours(rewarded: Path, start: Path, tmp_path: Path) -> None:
    """transformers' classifier on whole token rows, against the held-out margin that the run wrote."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from llmtrain.commands.export import main
    from llmtrain.config.load import load
    from llmtrain.data.pairs import Pairs
    from llmtrain.data.tokenizer import load_tokenizer

    document = str(start / "small.yaml")
    main(load(document, [f"run_dir={rewarded}", f"export.path={tmp_path / 'hf'}", "export.dtype=fp32"]))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    config = load(document, [])
    pairs = Pairs(str(start / "held_out.jsonl"), load_tokenizer(config.tokenizer.path), 64, seed=1)
    with torch.no_grad():
        scores = [[theirs(torch.tensor([[*s.prompt_ids, *s.ids]])).logits.item() for s in pair] for pair in pairs.pairs]
    chosen, rejected = (sum(column) / len(scores) for column in zip(*scores, strict=True))
    last = lines(rewarded, "evaluations.jsonl")[-1]
    assert (last["chosen_reward"], last["rejected_reward"]) == pytest.approx((chosen, rejected), abs=1e-4)
