from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.config.check import mesh_sizes
from llmtrain.config.schema import ParallelConfig
from llmtrain.parallel.pipeline import stage_layers, stage_of


def test_dp_shard_takes_what_is_left() -> None:
    assert mesh_sizes(ParallelConfig(pp=2, tp=2), 8) == {
        "pp": 2,
        "dp_replicate": 1,
        "dp_shard": 2,
        "cp": 1,
        "tp": 2,
    }


def test_ranks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="6 trainer ranks"):
        mesh_sizes(ParallelConfig(pp=2, tp=2), 6)


def test_stages_cover_every_layer_once() -> None:
    for layers in range(1, 12):
        for pp in range(1, layers + 1):
            covered = [i for stage in range(pp) for i in stage_layers(layers, pp, stage)]
            assert covered == list(range(layers))
    with pytest.raises(ValueError, match="at most one stage a layer"):
        stage_layers(2, 3, 0)


def test_owner_of_a_parameter() -> None:
    assert stage_of("embed.weight", 5, 2) == 0
    assert [stage_of(f"layers.{i}.attention.q.weight", 5, 2) for i in range(5)] == [0, 0, 0, 1, 1]
    assert stage_of("norm.weight", 5, 2) == stage_of("head.weight", 5, 2) == 1


def test_roles_in_one_job(torchrun: Callable) -> None:
    """Each role has its own default group; the link joins them; JSON and bytes arrive whole."""
    result = torchrun(3, Path(__file__).with_name("roles_worker.py"), timeout_s=90)
    assert result.returncode == 0, result.stdout[-3000:]
    seen = sorted(json.loads(line) for line in result.stdout.splitlines() if line.startswith("["))
    assert [s[:3] for s in seen] == [["rollout", 0, 1], ["trainer", 0, 2], ["trainer", 1, 2]]
    assert all(s[3] == {"pi": 3.141592653589793} and s[4] == [[0], [1, 1], [2, 2, 2]] for s in seen)
    assert [s[5] for s in seen] == [1, 3, 3]  # sums over the own role only
