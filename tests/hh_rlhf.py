"""Provides preference pairs of hh-rlhf, where they lie beside the checkout, by docs/posttraining/reward.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACE = Path(os.environ.get("LLMTRAIN_HH_RLHF", ROOT.parent / "shared" / "data" / "hh_rlhf"))
FILE = PLACE / "harmless-base-test.jsonl.gz"


def page_block(language: str, first_line: str) -> str:
    """Returns the block of the page that begins with this line."""
    page = (ROOT / "docs" / "posttraining" / "reward.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"```{language}\n({re.escape(first_line)}\n.*?)```", page, re.S)
    return block


def hh_pairs(directory: Path) -> list[str]:
    """Returns the rows of the file, by the script of the page, which also writes `train.jsonl` and `held_out.jsonl` to
    the directory; skips the test where the data is not there."""
    if not FILE.is_file():
        pytest.skip(f"{FILE} is not there; LLMTRAIN_HH_RLHF names another directory")
    (directory / "hh.py").write_text(page_block("python", "# hh.py"), encoding="utf-8")
    subprocess.run([sys.executable, "hh.py", str(FILE)], cwd=directory, check=True, timeout=60)
    names = ("train.jsonl", "held_out.jsonl")
    return [line for name in names for line in (directory / name).read_text(encoding="utf-8").splitlines()]


def document(directory: Path, model: Path) -> str:
    """Returns the document of the page, with the pairs and the run in a directory, and this model."""
    text = page_block("yaml", "name: hh-reward").replace("runs/smollm2/hf", str(model))
    for name in ("train.jsonl", "held_out.jsonl"):
        text = text.replace(name, str(directory / name))
    return f"run_dir: {directory}/run\n{text}"
