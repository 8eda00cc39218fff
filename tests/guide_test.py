"""docs/guide.md, as a new user would go through it: its files are written, its commands run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.data.families import family_directory
from tests.model.llama import SMALL, random_llama, smollm2_directory

PAGE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(bash|python|yaml)\n(.*?)```", re.S)
IMPORT = "llmtrain.model.hf smollm2"  # the one command that the default test replaces


def small_model(directory: Path) -> None:
    """Writes a random model with a chat template."""
    tokenizer = family_directory("qwen", directory.parent)
    os.rename(tokenizer, directory)
    random_llama(SMALL.model_copy(update={"vocab_size": 512, "max_positions": 512}), seed=1).save_pretrained(directory)


def walk(folder: Path, limit_s: float) -> str:
    """Goes through the page in a folder that looks like the root of a checkout. Returns what was printed."""
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / ".venv").symlink_to(sys.prefix)
    printed = []
    for language, text in BLOCK.findall(PAGE):
        if language != "bash":
            (folder / text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
        elif IMPORT not in text:
            environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            command = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit_s)
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            printed.append(done.stdout + done.stderr)
    return "\n".join(printed)


def steps(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def check(folder: Path, printed: str) -> None:
    runs = folder / "runs"
    assert [line["step"] for line in steps(runs / "notes-sft")] == [1, 2, 3]
    assert [line["step"] for line in steps(runs / "notes-grpo")] == list(range(1, 13))
    assert all("reward/score" in line and line["reward_errors"] == 0 for line in steps(runs / "notes-grpo"))
    for label in ("before", "after"):
        scores = json.loads((runs / "notes-grpo" / "eval" / label / "eval.json").read_text(encoding="utf-8"))
        assert scores["label"] == label and scores["problems"] == 64 and "pass@4" in scores
    assert (runs / "notes-grpo" / "report" / "index.html").is_file()
    made = json.loads((runs / "notes-grpo" / "export" / ".llmtrain.json").read_text(encoding="utf-8"))
    assert made["from"].endswith("runs/notes-grpo")
    assert "mine/broken.jsonl:25" in printed and "mine/broken.jsonl:26" in printed
    assert not (runs / "broken" / "metrics.jsonl").exists()


@pytest.mark.timeout(600)
def test_the_walk(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    small_model(tmp_path / "mine" / "model")
    check(tmp_path, walk(tmp_path, 240))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_walk_with_smollm2(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It learns what it is to learn: most answers are right at the end, and more than before."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model").symlink_to(smollm2_directory(tmp_path_factory))
    printed = walk(tmp_path, 900)
    check(tmp_path, printed)
    before, after = re.findall(r"label (?:before|after) .* pass@1 ([\d.]+)", printed)
    assert float(after) > max(0.9, float(before) + 0.1)
    assert printed.count('{"name": "Ann", "item": "mugs", "count": 7}') >= 2
