from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.arch.mesh import mesh_sizes
from llmtrain.config.schema import ParallelConfig
from llmtrain.parallel.mesh import expert_ranks, init_mesh


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


def test_experts_are_divided_among_neighbours() -> None:
    shard = [1, 3, 5, 7, 9, 11]
    assert [expert_ranks(shard, rank, 2) for rank in (1, 7, 11)] == [[1, 3], [5, 7], [9, 11]]
    assert expert_ranks(shard, 5, 6) == shard and expert_ranks(shard, 5, 1) == [5]


def test_roles_in_one_job(forked: Callable) -> None:
    """Each role has its own default group; the link joins them; JSON and bytes arrive whole."""
    result = forked(3, Path(__file__).with_name("roles_worker.py"), timeout_s=90)
    assert result.returncode == 0, result.stdout[-3000:]
    seen = sorted(json.loads(line) for line in result.stdout.splitlines() if line.startswith("["))
    assert [s[:3] for s in seen] == [["rollout", 0, 1], ["trainer", 0, 2], ["trainer", 1, 2]]
    assert all(s[3] == {"pi": 3.141592653589793} and s[4] == [[0], [1, 1], [2, 2, 2]] for s in seen)
    assert [s[5] for s in seen] == [1, 3, 3]  # sums over the own role only


def test_a_taken_port_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "2"}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(ValueError, match=f"MASTER_PORT={port}: the port is taken on this machine; set a free one"):
            init_mesh(ParallelConfig(), None, timeout_s=5)


def test_a_rank_0_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "RANK": "1", "WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="MASTER_PORT=9: rank 0 does not answer there: ") as told:
        init_mesh(ParallelConfig(), None, timeout_s=1)
    assert "\n" not in str(told.value)
