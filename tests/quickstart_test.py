"""The quickstart document from start to end, with few steps: every stage runs for real and leaves what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FEW = (
    "data.collect.pages.max_documents=100",
    "data.sources.stdlib.max_bytes=300000",
    "data.sources.topics.max_bytes=200000",
    "data.sources.arithmetic.count=20",
    "data.tasks.sums.train=200",
    "data.tasks.sums.held_out=16",
    "tokenizer.train_bytes=200000",
    "eval.problems=4",
    "stages.eval-pretrain.set.eval.problems=4",
    "eval.text_seqs=8",
    "stages.pretrain.set.train.steps=3",
    "stages.sft.set.train.steps=3",
    "stages.grpo.set.train.steps=2",
    "grpo.prompts_per_step=4",
)
STAGES = ["data", "pretrain", "eval-pretrain", "sft", "eval-sft", "grpo", "eval-grpo", "export", "report"]


def llmtrain(*arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmtrain", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.mark.timeout(600)
def test_every_stage(tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    document = ("run", "configs/quickstart.yaml", f"run_dir={run}", *FEW)
    result = llmtrain(*document, timeout_s=560)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    done = {stage: json.loads((run / stage / "done.json").read_text()) for stage in STAGES}
    assert all(0 < done[stage]["cpu_s"] < 3 * done[stage]["seconds"] * (os.cpu_count() or 1) for stage in STAGES)

    for stage, steps in (("pretrain", 3), ("sft", 3), ("grpo", 2)):
        lines = (run / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
        assert list((run / stage / "wandb").glob("offline-run-*/run-*.wandb")), "a run that `wandb sync` takes"
    scores = [json.loads((run / f"eval-{stage}/eval.json").read_text()) for stage in ("pretrain", "sft", "grpo")]
    assert all({"perplexity", "pass@1", "pass@8", "maj@8", "greedy"} <= s.keys() for s in scores)

    check_export(run / "grpo/export")
    page = (run / "report/index.html").read_text()
    assert all(f"<h2>{name}" in page or name in page for name in ("pretrain", "sft", "grpo", "pass@1"))
    assert len(list((run / "report").glob("*.png"))) >= 5
    output = (result.stdout or result.stderr).strip()
    assert "pass@1" in output and str(run / "report/index.html") in output.splitlines()[-1]

    again = llmtrain(*document, timeout_s=60)
    assert again.returncode == 0 and again.stderr.count("was done before") + again.stdout.count("was done before") == 9


def check_export(directory: Path) -> None:
    """transformers loads it and it has learned: far better than chance on its own kind of text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("def main():\n    return 0\n", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert torch.isfinite(loss) and loss < 7.5  # ln 1024 = 6.93
