"""What is refused of rollout.router_replay."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.load import load
from llmtrain.rules import replay
from llmtrain.rules.check import violations

MOE = "model.moe={num_experts: 4, expert_ffn_size: 8}"
TEACHER = "distill.teacher=[{path: there}]"


@pytest.mark.parametrize(
    ("recipe", "overrides", "fault"),
    [
        ("grpo", [], "rollout.router_replay=true: needs experts, and the model has none; set it to false"),
        ("ppo", [], "rollout.router_replay=true: needs experts"),
        ("distill", [MOE, TEACHER, "distill.on_policy=true"], "rollout.router_replay=true: not with distill.on_policy"),
        ("grpo", [MOE, "rollout.generator=vllm"], None),
        (
            "grpo",
            [MOE, "rollout.generator=vllm", "model.sliding_window=32", "model.layer_types=[sliding, full]"],
            "rollout.router_replay=true: not with rollout.generator=vllm and model.sliding_window=32, as a server",
        ),
        ("grpo", [MOE, "rollout.max_staleness=2"], "rollout.router_replay=true: not with rollout.max_staleness=2"),
        (
            "grpo",
            [MOE, "rollout.environment={tools: [calculator]}"],
            "rollout.router_replay=true: not with rollout.env",
        ),
        ("grpo", [MOE], None),
        ("raft", [MOE], None),
        ("sft", [], None),  # which samples nothing, so that a document of several stages may share the section
        ("plan", [], None),
    ],
)
def test_refused(
    small: Path, recipe: str, overrides: list[str], fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "has_gpu", lambda: False)
    found = violations(load(str(small), ["rollout.router_replay=true", *overrides]), 1, recipe)
    about = [line for line in found if "router_replay" in line]
    assert about == [] if fault is None else [line.startswith(fault) for line in about] == [True]


@pytest.mark.parametrize(("generator", "lines"), [("vllm", 1), ("native", 0)])
def test_a_server_on_a_gpu_is_refused(small: Path, generator: str, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "has_gpu", lambda: True)
    config = load(str(small), ["rollout.router_replay=true", MOE, f"rollout.generator={generator}"])
    found = [line for line in violations(config, 1, "grpo") if "router_replay" in line]
    assert ["and a GPU, where it was never tried; use native, or false" in line for line in found] == [True] * lines
