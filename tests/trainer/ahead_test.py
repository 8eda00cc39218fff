"""Which trainer keeps which workers, and where they compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llmtrain.parallel.mesh import Mesh
from llmtrain.trainer.ahead import own_workers


def kept(leaders: list[int], size: int, workers: int, device: str = "cpu") -> list[dict[int, str]]:
    """What each trainer keeps."""
    config = SimpleNamespace(rollout=SimpleNamespace(workers=workers))

    def mesh(rank: int) -> SimpleNamespace:
        return SimpleNamespace(rank=rank, size=size, device=torch.device(device), leaders=lambda: leaders)

    return [own_workers(SimpleNamespace(config=config, mesh=mesh(rank))) for rank in range(size)]


def test_machines_get_workers_in_turn() -> None:
    assert kept([0], 3, 2) == [{0: "cpu", 1: "cpu"}, {}, {}]
    assert kept([0, 2], 4, 3) == [{0: "cpu", 2: "cpu"}, {}, {1: "cpu"}, {}]
    assert kept([0, 1, 2], 3, 1) == [{0: "cpu"}, {}, {}]


def test_gpus_behind_those_of_the_trainers_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert kept([0, 2], 5, 6, "cuda") == [
        {0: "cuda:2", 2: "cuda:3", 4: "cuda:0"},
        {},
        {1: "cuda:3", 3: "cuda:0", 5: "cuda:1"},
        {},
        {},
    ]


@pytest.mark.parametrize(
    ("local", "leaders"), [([0], [0]), ([0, 1, 0, 1, 2, 0], [0, 2, 5]), ([1, 0, 1], [0, 1]), ([0, 0], [0, 1])]
)
def test_the_first_rank_of_each_machine_leads(local: list[int], leaders: list[int]) -> None:
    assert Mesh.leaders(SimpleNamespace(all_gather_json=lambda own: local)) == leaders
