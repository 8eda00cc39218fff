"""Runs that sample with a real vLLM server, where its interpreter is there: GRPO with its gate, and `llmtrain eval`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmtrain.arch.families import presets
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.data.chat import CHATML
from llmtrain.model.hf_write import save_hf
from tests.conftest import ROOT
from tests.rollout.native_test import random_decoder
from tests.small_run import DOCUMENT
from tests.vllm_python import vllm_python

MODEL = ModelConfig(
    num_layers=2, hidden_size=128, ffn_size=160, num_heads=4, num_kv_heads=2, vocab_size=512, max_positions=256
)
OWN = ROOT / "tests/envs/own.py"
REWARD = "def score(completion, example):\n    return sum(map(ord, completion)) % 7 / 7\n"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def document(small_data: Path, tmp_path: Path) -> Path:
    """A document of a run that starts from random weights and samples with vLLM."""
    config = resolve_model(MODEL)
    weights = random_decoder(config, 0, scale=2).state_dict().items()
    save_hf(str(tmp_path / "start"), config, weights, torch.float32, str(small_data / "tokenizer"), 0)
    (tmp_path / "rewards.py").write_text(REWARD)
    lines = DOCUMENT.format(data=small_data).strip().splitlines()
    lines = [line for line in lines if not line.startswith(("model:", "  {num_layers"))]
    path = tmp_path / "job.yaml"
    path.write_text("\n".join([*lines, f"model: {{init_from: {tmp_path / 'start'}}}", ""]))
    return path


def run(document: Path, command: str, *overrides: str, ranks: int = 1) -> None:
    """Runs a command to its end; no server may be left."""
    settings = {"python": vllm_python(), "cache_gib": 0.25, "start_s": 250}
    own = ["rollout.generator=vllm", "rollout.max_batch_seqs=32", f"rollout.vllm={json.dumps(settings)}"]
    rewards = json.dumps([{"function": f"{document.parent / 'rewards.py'}:score"}])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    line = [*launcher, "-m", "llmtrain", command, str(document), f"run_dir={document.parent / 'run'}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *line, *own, f"rewards={rewards}", *overrides], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    psutil.wait_procs(orphans(), 10)
    assert not orphans()


def orphans() -> list[psutil.Process]:
    """Returns what keeps a server for a process that is gone."""
    lines = [(p, p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    keepers = [(p, line) for p, line in lines if len(line) > 3 and line[2].endswith("inside_vllm/keeper.py")]
    return [p for p, line in keepers if not psutil.pid_exists(int(line[3]))]


def check_metrics(folder: Path) -> list[dict[str, Any]]:
    """Checks two steps in which generator and trainer agreed, and returns their metrics."""
    steps: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["weight_version"] for m in steps] == [1, 2] and all(m["grad_norm"] > 0 for m in steps)
    assert max(m["logprob_gap_max"] for m in steps) < 4e-5  # fp32, other kernels: see tests/rollout/vllm_test.py
    return steps


def test_grpo_with_the_gate(document: Path) -> None:
    run(document, "grpo", "train.steps=2", "rollout.stop=['e']")
    check_metrics(document.parent / "run")


@pytest.fixture
def routed(document: Path, small_data: Path) -> Path:
    """The document with a model that has experts in its second layer."""
    fields = next(f for f in presets().values() if f["family"] == "qwen3-moe")
    moe = fields["moe"].model_copy(update={"num_experts": 8, "top_k": 2, "expert_ffn_size": 32, "dense_layers": [0]})
    config = resolve_model(ModelConfig(**{**fields, **MODEL.model_dump(exclude_unset=True), "moe": moe}))
    weights = random_decoder(config, 0, scale=2).state_dict().items()
    save_hf(str(document.parent / "start"), config, weights, torch.float32, str(small_data / "tokenizer"), 0)
    return document


def test_grpo_with_the_experts_of_the_server(routed: Path) -> None:
    """In fp32 both sides choose alike: replay changes nothing but rounding. Once the completions are streamed."""
    own = ("train.steps=2", "rollout.stop=['e']", "data.replay_seqs=0")
    run(routed, "grpo", *own)
    plain = check_metrics(routed.parent / "run")
    run(routed, "grpo", *own, "rollout.router_replay=true", f"run_dir={routed.parent / 'replayed'}")
    replayed = check_metrics(routed.parent / "replayed")
    for here, there in zip(replayed, plain, strict=True):
        for key in ("loss", "grad_norm", "reward_mean", "response_tokens_mean"):
            assert here[key] == pytest.approx(there[key], rel=1e-3, abs=1e-5), key


def test_grpo_with_the_experts_of_a_worker_s_server(routed: Path) -> None:
    separate = ("rollout.placement=separate", "rollout.workers=1", "rollout.router_replay=true")
    run(routed, "grpo", "train.steps=2", *separate, ranks=2)
    check_metrics(routed.parent / "run")


def test_grpo_with_adapters_and_a_worker(document: Path) -> None:
    separate = ("rollout.placement=separate", "rollout.workers=1")
    run(document, "grpo", "train.steps=2", "model.lora={rank: 4}", "rollout.temperature=0.8", *separate, ranks=2)
    check_metrics(document.parent / "run")


def conversing(document: Path, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Returns the overrides of a run on rows that an environment or a program reads."""
    folder = document.parent
    (folder / "chatml.jinja").write_text(CHATML)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (f"data.train={folder / 'rows.jsonl'}", f"tokenizer.chat_template={folder / 'chatml.jinja'}")
    stop = json.dumps(list("aeiou0123456789"))
    sampled = ("rollout.group_size=3", "rollout.max_new_tokens=8", f"rollout.stop={stop}")
    return (*files, *sampled, "train.steps=2", "train.seq_len=250", "grpo.prompts_per_step=2")


@pytest.mark.parametrize("placement", ["colocated", "separate"])
def test_grpo_with_an_environment(document: Path, placement: str) -> None:
    environment = {"function": f"{OWN}:Guess", "unsandboxed": True, "max_turns": 3, "threads": 2}
    own = (*conversing(document, [{"number": i} for i in range(8)]), f"rollout.environment={json.dumps(environment)}")
    apart = ("rollout.placement=separate", "rollout.workers=1") if placement == "separate" else ()
    run(document, "grpo", *own, *apart, ranks=2 if apart else 1)
    steps = check_metrics(document.parent / "run")
    assert all(m["environment_tokens_mean"] > 0 and m["turns_mean"] > 1 for m in steps)


@pytest.mark.parametrize("placement", ["colocated", "ahead"])
def test_grpo_with_a_program(document: Path, placement: str) -> None:
    pytest.importorskip("uvicorn")
    rows = [{"messages": [{"role": "user", "content": "a digit"}], "answer": str(i)} for i in range(8)]
    agent = {"function": f"{ROOT / 'configs/grpo/agent.py'}:run", "processes": 2, "deadline_s": 60}
    own = (*conversing(document, rows), f"rollout.agent={json.dumps(agent)}", "rollout.temperature=0.9")
    ahead = ("rollout.placement=ahead", "rollout.workers=1", "rollout.max_staleness=1", "rollout.verify=off")
    run(document, "grpo", *own, *(ahead if placement == "ahead" else ()))
    if placement == "colocated":
        steps = check_metrics(document.parent / "run")
    else:  # the gap of the second step, by weights of before, is no error
        lines = (document.parent / "run" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert [m["staleness_max"] for m in steps] == [0, 1] and steps[0]["logprob_gap_max"] < 4e-5
    assert all(m["reward_errors"] == 0 and 1 < m["turns_mean"] <= 2 for m in steps)


def test_eval_answers_as_with_native(document: Path) -> None:
    greedy = {}
    for generator in ("native", "vllm"):
        directory = document.parent / generator
        run(document, "eval", f"run_dir={directory}", f"rollout.generator={generator}", "eval.text=false")
        rows = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
        greedy[generator] = [row["completion"] for row in rows if row["greedy"]]
        assert len(rows) > len(greedy[generator]) == 16
    assert greedy["vllm"] == greedy["native"]


def kill_a_worker(metrics: Path, killed: list[int], stop: threading.Event) -> None:
    """Kills a worker that samples ahead, once the first step is done."""
    while not stop.wait(0.1) and not killed:
        trained = metrics.exists() and '"step": 1,' in metrics.read_text()
        for process in psutil.Process().children(recursive=True) if trained else ():
            with contextlib.suppress(psutil.Error):
                if any(name.endswith(".worker_process") for name in process.cmdline()):
                    process.kill()
                    killed.append(process.pid)


def episodes(folder: Path) -> list[str]:
    """Returns what makes episodes of samples: a number is guessed, in turns that end at a few letters."""
    rows = "".join(json.dumps({"number": i % 3}) + "\n" for i in range(8))
    for name, text in (("rows.jsonl", rows), ("chatml.jinja", CHATML)):
        (folder / name).write_text(text)
    own = {"function": str(Path(__file__).parents[1] / "envs" / "own.py") + ":Guess", "unsandboxed": True}
    rollout = (
        f"rollout.environment={json.dumps({**own, 'max_turns': 3})}",
        f"rollout.stop={json.dumps([*'aeiou0123'])}",
    )
    data = (f"data.train={folder / 'rows.jsonl'}", f"data.held_out={folder / 'rows.jsonl'}", "train.seq_len=250")
    return [*rollout, *data, f"tokenizer.chat_template={folder / 'chatml.jinja'}", "rollout.max_new_tokens=8"]


@pytest.mark.parametrize("playing", [False, True])
def test_a_worker_that_samples_ahead_has_a_server(playing: bool, document: Path) -> None:
    """One that is killed takes it along; the next one goes on, with an evaluation beside training too."""
    own = episodes(document.parent) if playing else []
    ahead = ("rollout.placement=ahead", "rollout.workers=1", "rollout.max_staleness=1", "rollout.verify=off")
    evaluation = ("eval.every_steps=2", "eval.problems=3", "eval.samples=2", "eval.text=false")
    metrics, killed, stop = document.parent / "run" / "metrics.jsonl", [], threading.Event()
    killer = threading.Thread(target=kill_a_worker, args=(metrics, killed, stop))
    killer.start()
    run(document, "grpo", "train.steps=4", *ahead, *evaluation, *own)
    stop.set()
    killer.join()
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(killed) == 1 and [line["step"] for line in steps] == [0, 1, 2, 3, 4]
    assert [line.get("eval/problems") for line in steps] == [3, None, 3, None, 3]
    assert steps[1]["logprob_gap_max"] < 4e-5 and {line["staleness_max"] for line in steps[1:]} <= {0, 1}
    assert all(line["grad_norm"] > 0 for line in steps[1:])
    assert all((line.get("turns_mean", 0) > 1) == playing for line in steps[1:])
