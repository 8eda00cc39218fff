"""What sampling ahead of training refuses, in its words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.config.load import load
from llmtrain.rules.check import violations

AHEAD = ("rollout.placement=ahead", "rollout.workers=1", "rollout.max_staleness=1", "rollout.verify=checksum")


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., list[str]]:
    """lines(ranks, *overrides) -> what GRPO is told of the section rollout."""
    (tmp_path / "x.yaml").write_text("name: x")

    def find(ranks: int, *overrides: str) -> list[str]:
        found = violations(load(str(tmp_path / "x.yaml"), list(overrides)), ranks, "grpo")
        return [line for line in found if line.startswith("rollout.")]

    return find


def test_what_goes_together(lines: Callable[..., list[str]]) -> None:
    assert lines(1) == lines(1, *AHEAD) == lines(1, *AHEAD, "rollout.inflight=continue") == []
    assert lines(2, *AHEAD, "rollout.deadline_s=299") == []
    tools = ("rollout.environment={tools: [calculator]}", "rollout.record=true")
    assert lines(1, *AHEAD, *tools) == lines(1, *AHEAD, *tools, "rollout.inflight=restart") == lines(1, *tools) == []


@pytest.mark.parametrize(
    ("ranks", "overrides", "expected"),
    [
        (
            1,
            ["rollout.max_staleness=2"],
            "rollout.max_staleness=2: needs rollout.placement=ahead, whose processes sample while the ranks train; set "
            "it, or max_staleness=0",
        ),
        (
            1,
            [*AHEAD, "rollout.max_staleness=0"],
            "rollout.max_staleness=0: must be at least 1 with rollout.placement=ahead; raise it or use colocated",
        ),
        (
            1,
            [*AHEAD, "rollout.workers=0"],
            "rollout.workers=0: must be at least 1 with rollout.placement=ahead; raise it or use colocated",
        ),
        (
            1,
            ["rollout.inflight=restart"],
            "rollout.inflight=restart: in step no weights come while it samples; remove it",
        ),
        (
            1,
            ["rollout.deadline_s=30"],
            "rollout.deadline_s=30: is read with rollout.placement=ahead alone, not colocated; remove it",
        ),
        (
            2,
            ["rollout.restarts=0", "rollout.placement=separate", "rollout.workers=1"],
            "rollout.restarts=0: is read with rollout.placement=ahead alone, not separate; remove it",
        ),
        (
            1,
            [*AHEAD, "data.curriculum={min_pass_rate: 0.1}"],
            "rollout.max_staleness=1: not with data.curriculum, which chooses prompts by the rewards of earlier ones, "
            "that are not there yet; use colocated or separate, or remove the curriculum",
        ),
        (
            1,
            [*AHEAD, "rollout.verify=probe"],
            "rollout.verify=probe: not with rollout.placement=ahead, whose workers have other weights before a probe "
            "is back; set checksum, which compares all weights when a worker has loaded them, or off",
        ),
        (
            1,
            ["rollout.replay=nowhere"],
            "rollout.replay=nowhere: does not exist; give an existing path or make it first",
        ),
        (
            1,
            ["rollout.replay=/", "rollout.record=true"],
            "rollout.record=true: rollout.replay=/ is a record already; remove one of them",
        ),
        (
            2,
            ["rollout.replay=/", "rollout.placement=separate", "rollout.workers=1"],
            "rollout.placement=separate: nobody samples with rollout.replay; use colocated",
        ),
        (
            2,
            [*AHEAD, "rollout.deadline_s=300"],
            "rollout.deadline_s=300: must be below half of engine.timeout_s=600 on several ranks, which wait for the "
            "first in a collective while it waits for a worker, and again for who does its work; lower it or raise "
            "timeout_s",
        ),
    ],
)
def test_what_does_not(ranks: int, overrides: list[str], expected: str, lines: Callable[..., list[str]]) -> None:
    assert lines(ranks, *overrides) == [expected]


def test_distillation_on_own_samples_is_in_step(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("distill: {on_policy: true, teacher: [{path: t}]}")
    found = violations(load(str(tmp_path / "x.yaml"), list(AHEAD)), 1, "distill")
    assert any(line.startswith("rollout.max_staleness=1: must be 0 with distill.on_policy") for line in found)
