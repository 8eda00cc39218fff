"""The program of configs/grpo, trained as it is, on a model of seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.load import load
from llmtrain.data.chat import CHATML
from tests.conftest import ROOT
from tests.forked import run_alone
from tests.model.llama import random_llama

pytest.importorskip("uvicorn")


@pytest.mark.slow
def test_a_program_is_trained_as_it_is(small: Path, small_data: Path, tmp_path: Path) -> None:
    """Generator and trainer agree about every token that went through the server, to 1e-3, or the run would stop."""
    rng = random.Random(0)
    rows = [{"messages": [{"role": "user", "content": "a digit"}], "answer": str(rng.randrange(10))} for _ in range(32)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    random_llama(resolve_model(load(str(small), []).model), seed=0).save_pretrained(tmp_path / "hf")
    for file in (small_data / "tokenizer").iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    own = (f"run_dir={tmp_path / 'run'}", f"data.train={tmp_path / 'rows.jsonl'}", "train.seq_len=200")
    own = (*own, f"model={json.dumps({'init_from': str(tmp_path / 'hf')})}")
    own = (*own, f"tokenizer.chat_template={tmp_path / 'chatml.jinja'}", "optim.lr=1e-2", "optim.schedule=constant")
    agent = {"function": str(ROOT / "configs/grpo/agent.py") + ":run", "processes": 2}
    sampled = ("rollout.group_size=8", "rollout.max_new_tokens=24", f"rollout.agent={json.dumps(agent)}", "rewards=[]")
    steps = ("grpo.prompts_per_step=6", "train.steps=2", "checkpoint.every_steps=1", "optim.warmup_steps=0")
    done = run_alone("llmtrain", "grpo", small, *own, *sampled, *steps)
    assert done.returncode == 0, done.stdout[-3000:]
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["step_samples"] == 48 for line in lines)
    assert all(line["reward_errors"] == 0 and 1 < line["turns_mean"] <= 2 for line in lines)
    assert any(line["reward_mean"] > 0 and line["grad_norm"] > 0 for line in lines)
    first, second = (next((run / "checkpoints").glob(f"step-*{i}")) for i in (1, 2))
    weights = [load_file(next(each.rglob("*.safetensors"))) for each in (first, second)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "That is wrong. Which one is it?" in (run / "samples.jsonl").read_text()
