"""The programs of configs/grpo, trained as they are, on a model of seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.load import load
from llmtrain.data.chat import CHATML
from tests.conftest import ROOT
from tests.forked import run_alone, run_forked
from tests.model.llama import random_llama
from tests.verifiers_python import verifiers_python

pytest.importorskip("uvicorn")


GUESS = str(ROOT / "configs/grpo/guess.py")
TALKING = {"function": str(ROOT / "configs/grpo/agent.py") + ":run", "processes": 2}


@pytest.fixture
def trained(small: Path, small_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """trained(rows, agent, *overrides, ranks=1) -> the run directory, after two steps"""
    (tmp_path / "chatml.jinja").write_text(CHATML)
    random_llama(resolve_model(load(str(small), []).model), seed=0).save_pretrained(tmp_path / "hf")
    for file in (small_data / "tokenizer").iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())

    def train(rows: list[dict[str, Any]], agent: dict[str, Any], *overrides: str, ranks: int = 1) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = (f"run_dir={tmp_path / 'run'}", f"data.train={tmp_path / 'rows.jsonl'}", "train.seq_len=200")
        own = (*own, f"model={json.dumps({'init_from': str(tmp_path / 'hf')})}")
        own = (*own, f"tokenizer.chat_template={tmp_path / 'chatml.jinja'}", "optim.lr=1e-2", "optim.schedule=constant")
        sampled = ("rollout.group_size=8", "rollout.max_new_tokens=24", f"rollout.agent={json.dumps(agent)}")
        steps = ("grpo.prompts_per_step=6", "train.steps=2", "checkpoint.every_steps=1", "optim.warmup_steps=0")
        given = ("llmtrain", "grpo", small, *own, *sampled, "rewards=[]", *steps, *overrides)
        done = run_alone(*given) if ranks == 1 else run_forked(ranks, *given, timeout_s=240)
        assert done.returncode == 0, done.stdout[-3000:]
        return tmp_path / "run"

    return train


def check(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of the metrics of a run in which something was learned."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["step_samples"] == 48 for line in lines)
    assert any(line["reward_mean"] > 0 and line["grad_norm"] > 0 for line in lines)
    first, second = (next((run / "checkpoints").glob(f"step-*{i}")) for i in (1, 2))
    weights = [load_file(next(each.rglob("*.safetensors"))) for each in (first, second)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("rollout.placement=separate", "rollout.workers=1")], ids=["here", "apart"])
def test_a_program_is_trained_as_it_is(trained: Callable[..., Path], overrides: tuple[str, ...]) -> None:
    """Generator and trainer agree about every token that went through the server, to 1e-3, or the run would stop."""
    rng = random.Random(0)
    ask = [{"role": "user", "content": "a digit"}]
    rows = [{"messages": ask, "answer": str(rng.randrange(10))} for _ in range(32)]
    run = trained(rows, TALKING, *overrides, ranks=2 if overrides else 1)
    assert all(line["reward_errors"] == 0 and 1 < line["turns_mean"] <= 2 for line in check(run))
    assert "That is wrong. Which one is it?" in (run / "samples.jsonl").read_text()


@pytest.mark.slow
def test_an_environment_of_verifiers_is_trained(trained: Callable[..., Path]) -> None:
    agent = {"function": "llmtrain.envs.inside_verifiers:Verifiers", "args": {"environment": GUESS}, "processes": 2}
    ask = [{"role": "user", "content": "Guess."}]
    rows = [{"prompt": ask, "answer": str(i % 9 + 1), "example_id": i} for i in range(32)]
    run = trained(rows, {**agent, "python": verifiers_python(), "max_error_share": 0.9})
    assert all(1 < line["turns_mean"] <= 3 for line in check(run))
    assert "Write a number. Guess again." in (run / "samples.jsonl").read_text()
