"""What a user gets wrong: one line that names the place, exit code not 0, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import run_alone


def llmtrain(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_alone("llmtrain", *map(str, arguments), timeout_s=90)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in result.stdout, result.stdout[-2000:]
    return result.stdout.strip().splitlines()[-1]


def test_missing_file(small: Path, tmp_path: Path) -> None:
    result = llmtrain("sft", small, "data.train=nowhere.jsonl", f"run_dir={tmp_path / 'run'}")
    assert result.returncode == 2 and "data.train=nowhere.jsonl: does not exist" in last_line(result)
    assert not (tmp_path / "run").exists()


def test_broken_jsonl_line(small: Path, tmp_path: Path) -> None:
    broken = tmp_path / "demonstrations.jsonl"
    broken.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n{oops\n")
    result = llmtrain("sft", small, f"data.train={broken}", f"run_dir={tmp_path / 'run'}")
    assert result.returncode == 2 and f"{broken}:2" in last_line(result)


def test_empty_corpus(small: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    sources = json.dumps([{"name": "empty", "type": "text", "path": str(empty)}])
    result = llmtrain(
        "pretrain", small, f"data.sources={sources}", f"data.path={tmp_path / 'd'}", f"run_dir={tmp_path / 'run'}"
    )
    assert result.returncode == 2 and "empty" in last_line(result)


def test_wrong_tokenizer(small: Path, small_data: Path, tmp_path: Path) -> None:
    """Shards made with one tokenizer, the run told of another."""
    from llmtrain.config.schema import TokenizerConfig
    from llmtrain.data.tokenizer_train import train_tokenizer

    train_tokenizer(["another text", "def f(): return 1"], str(tmp_path / "other"), TokenizerConfig(vocab_size=270))
    result = llmtrain("pretrain", small, f"tokenizer.path={tmp_path / 'other'}", f"run_dir={tmp_path / 'run'}")
    assert result.returncode == 2 and "tokenizer" in last_line(result) and str(small_data) in last_line(result)


def test_tokenizer_larger_than_the_model(small: Path, tmp_path: Path) -> None:
    result = llmtrain("pretrain", small, "model.vocab_size=256", f"run_dir={tmp_path / 'run'}")
    assert result.returncode == 2 and "model.vocab_size=256" in last_line(result)


def test_resume_never_in_a_used_directory(small: Path, tmp_path: Path) -> None:
    first = llmtrain("pretrain", small, "train.steps=1", f"run_dir={tmp_path / 'run'}")
    assert first.returncode == 0, first.stdout[-2000:]
    result = llmtrain("pretrain", small, "train.steps=2", f"run_dir={tmp_path / 'run'}", "checkpoint.resume=never")
    assert result.returncode == 2 and "checkpoint.resume=never" in last_line(result)


@pytest.mark.parametrize("key", ["model.hidden_size=0", "optim.lr=.inf", "parallel.tensor=2"])
def test_refused_before_anything_starts(small: Path, key: str, tmp_path: Path) -> None:
    result = llmtrain("pretrain", small, key, f"run_dir={tmp_path / 'run'}")
    assert result.returncode == 2 and key.split("=")[0] in last_line(result)
    assert not (tmp_path / "run").exists()


TENSOR = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def misshapen(small: Path, tmp_path: Path) -> Path:
    """A Hugging Face directory of the model of `small`, one tensor of which is of another one."""
    import torch
    from safetensors.torch import load_file, save_file

    from llmtrain.arch.resolve import resolve_model
    from llmtrain.config.load import load
    from llmtrain.model.decoder import init_tensor, parameter_shapes
    from llmtrain.model.hf_write import save_hf

    model, directory = resolve_model(load(str(small), []).model), tmp_path / "hf"
    weights = ((name, init_tensor(name, shape, model, 0)) for name, shape in parameter_shapes(model).items())
    save_hf(str(directory), model, weights, torch.float32, None, None)
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, TENSOR: tensors[TENSOR][:-1].clone()}, directory / "model.safetensors")
    return directory


def test_weights_of_another_shape(small: Path, misshapen: Path, tmp_path: Path, forked: Callable) -> None:
    """One line from each rank, and nothing in the run directory that a start refused later would not have."""
    error = f"{misshapen}/model.safetensors: {TENSOR} has shape [47, 32], the config says [48, 32]"
    arguments = ("pretrain", small, f"model.init_from={misshapen}")
    alone = llmtrain(*arguments, f"run_dir={tmp_path / 'alone'}")
    assert alone.returncode == 2 and last_line(alone) == error and alone.stdout.count(TENSOR) == 1
    both = forked(2, "llmtrain", *arguments, f"run_dir={tmp_path / 'both'}")
    assert both.returncode == 1  # of any failure
    assert error in both.stdout and both.stdout.count(TENSOR) <= 2 and "Traceback" not in both.stdout
    left = {".llmtrain.lock", ".llmtrain-checksums.json"}  # and no config.yaml, which would claim what was not done
    assert set(os.listdir(tmp_path / "alone")) == set(os.listdir(tmp_path / "both")) == left
