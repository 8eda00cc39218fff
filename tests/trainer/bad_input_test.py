"""What a user gets wrong: one line that names the place, exit code not 0, nothing left behind."""

from __future__ import annotations

import json
import subprocess
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
