"""What is said of a vLLM generator that cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.load import load
from llmtrain.config.schema import ModelConfig, MupConfig
from llmtrain.config.vllm import installed_version
from llmtrain.rules import vllm
from llmtrain.rules.check import violations
from llmtrain.rules.vllm import unserved

DOCUMENT = """
model: {num_layers: 2, hidden_size: 64, ffn_size: 96, num_heads: 2, num_kv_heads: 2, vocab_size: 512}
train: {seq_len: 128}
data: {held_out: problems.jsonl}
rollout: {generator: vllm, max_new_tokens: 64, vllm: {python: PYTHON}}
"""


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "has_gpu", lambda: False)


def interpreter(folder: Path, version: str) -> str:
    (folder / "python").write_text(f"#!/bin/sh\necho {version}\n")
    (folder / "python").chmod(0o755)
    return str(folder / "python")


def told(folder: Path, *overrides: str, command: str = "grpo", version: str = "0.32.0") -> list[str]:
    (folder / "x.yaml").write_text(DOCUMENT.replace("PYTHON", interpreter(folder, version)))
    found = violations(load(str(folder / "x.yaml"), list(overrides)), 1, command)
    return [line for line in found if line.startswith(("rollout.", "model.family"))]


@pytest.mark.parametrize("command", ["grpo", "eval"])
def test_what_can_be_is_let_through(tmp_path: Path, command: str) -> None:
    assert told(tmp_path, command=command) == []
    assert told(tmp_path, "rollout.temperature=0.7", "rollout.tp=2", command=command) == []
    assert told(tmp_path, "rollout.top_p=0.9", "rollout.top_k=5", command=command) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (
            ["rollout.verify=checksum"],
            [
                "rollout.verify=checksum: must be off with rollout.placement=ahead and rollout.generator=vllm: a probe "
                "comes back too late, and the server holds weights joined and packed; set off: each answer is refused "
                "that is not of the version which was sent"
            ],
        ),
        (
            ["rollout.inflight=continue"],
            [
                "rollout.inflight=continue: must be finish with rollout.generator=vllm, whose server takes weights "
                "between answers alone; set finish, or use native"
            ],
        ),
    ],
)
def test_a_server_of_a_worker_that_samples_ahead(tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
    ahead = ("rollout.placement=ahead", "rollout.workers=1", "rollout.max_staleness=1", "rollout.verify=off")
    assert told(tmp_path, *ahead, *overrides) == expected


def test_a_missing_interpreter_is_told_with_the_remedy(tmp_path: Path) -> None:
    (line,) = told(tmp_path, "rollout.vllm.python=none/bin/python")
    assert line.startswith(
        "rollout.vllm.python=none/bin/python: is no interpreter that has vLLM; run bash launch/vllm.sh"
    )


def test_another_version_is_told(tmp_path: Path) -> None:
    (line,) = told(tmp_path, version="0.31.1")
    assert re.match(r"rollout.vllm.python=\S+: has vLLM 0.31.1, and 0.32.0 is needed; run bash launch/vllm.sh", line)
    assert told(tmp_path, version="0.31.1", command="pretrain") == []  # nothing is sampled
    assert len(told(tmp_path, "eval.every_steps=2", version="0.31.1", command="sft")) == 1  # but beside training
    assert told(tmp_path, "rollout.generator=native", version="0.31.1") == []
    assert not any("0.31.1" in line for line in told(tmp_path, "rollout.replay=x", version="0.31.1"))  # nothing either


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rollout.temperature=0.005"], "rollout.temperature=0.005: must be at least 0.01"),
        (["rollout.temperature=0.7", "rollout.top_p=0.9"], "rollout.temperature=0.7: must be 1 .* rollout.top_p=0.9"),
        (["rollout.temperature=0.7", "rollout.top_k=9"], "rollout.temperature=0.7: must be 1 .* rollout.top_k=9"),
        (["rollout.verify=checksum"], "rollout.verify=checksum: not with rollout.generator=vllm, .*; use probe"),
        (["rollout.tp=3"], "rollout.tp=3: must divide model.num_heads=2"),
        (
            ["model.head_dim=24"],
            r"model.family=llama: model.head_dim=24: .* heads of 32, 64.*; use rollout.generator=na",
        ),
        (["rollout.tp=2", "rollout.generator=native"], "rollout.tp=2: only with rollout.generator=vllm"),
        (["model.preset=palm-8b", "model.num_layers=1"], "model.family=palm: .*use rollout.generator=native"),
    ],
)
def test_what_cannot_be_is_told(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert any(re.match(expected, line) for line in told(tmp_path, *overrides)), told(tmp_path, *overrides)


def test_with_a_gpu_other_heads_can_be_but_no_shared_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "has_gpu", lambda: True)
    assert told(tmp_path, "model.head_dim=24") == []
    assert told(tmp_path, "rollout.tp=2")[0].startswith("rollout.tp=2: must be 1 with a GPU")


@pytest.mark.parametrize("gpu", [True, False])
def test_a_plan_does_not_ask_what_this_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr(vllm, "has_gpu", lambda: gpu)
    (tmp_path / "x.yaml").write_text(DOCUMENT)
    config = load(str(tmp_path / "x.yaml"), ["model.head_dim=24", "rollout.tp=2"])
    found = violations(config, 1, "grpo", planned=True)
    assert not [line for line in found if "head_dim" in line or "rollout.tp" in line]


@pytest.mark.parametrize("command", ["judge", "constitutional"])
def test_commands_that_sample_in_their_own_process_say_so(tmp_path: Path, command: str) -> None:
    assert any(line.startswith("rollout.generator=vllm: " + command) for line in told(tmp_path, command=command))


def test_a_model_that_a_config_json_cannot_say_is_not_served() -> None:
    plain = ModelConfig(
        num_layers=2, hidden_size=64, ffn_size=96, num_heads=2, num_kv_heads=2, vocab_size=97, max_positions=64
    )
    assert unserved(resolve_model(plain)) is None
    assert unserved(resolve_model(plain.model_copy(update={"mup": MupConfig(base_hidden=32)}))) is None
    odd = unserved(resolve_model(plain.model_copy(update={"block": "parallel"})))
    assert odd is not None and "a config.json" in odd


def test_the_version_of_no_interpreter_is_none(tmp_path: Path) -> None:
    assert installed_version(str(tmp_path / "none")) is None
    (tmp_path / "fails").write_text("#!/bin/sh\necho 0.32.0; exit 1\n")
    (tmp_path / "fails").chmod(0o755)
    assert installed_version(str(tmp_path / "fails")) is None
    assert installed_version(interpreter(tmp_path, "")) is None
