"""Divides prompts among the trainers that keep workers, the first of each machine, and gathers the answers: by
collectives of the trainers, so that nothing else connects the machines.

Each of them waits for its own share. One that has no worker left owes the rest of it, which the others then get; they
wait again, until nobody owes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

from torch import Tensor

from llmtrain.rollout.board import Board, WorkersFail
from llmtrain.rollout.wire import pack, unpack
from llmtrain.types import Group

Said = dict[str, Any]
"""Holds, as JSON, what a trainer says when it has waited."""


class Gathering(Protocol):
    """Stands for ranks that exchange what they have, such as a Mesh."""

    rank: int
    size: int

    def all_gather_json(self, value: object) -> list:
        """Returns the JSON values of all ranks."""

    def all_gather_bytes(self, data: Tensor) -> list[Tensor]:
        """Returns the uint8 tensors, of any length, of all ranks."""


def waited(board: Board, wait: Callable[[], dict[int, Group]]) -> tuple[dict[int, Group], Said]:
    """Returns what was waited for, nothing where that failed, and what to say of it: why it failed, as the others wait
    to hear of it, and how many workers are left."""
    groups, error = {}, None
    try:
        groups = wait()
    except Exception as failed:  # of any kind
        error = [type(failed).__name__, str(failed)]
    return groups, {"error": error, "live": len(board.live), "last_fault": board.last_fault}


def heard(every: Sequence[Said]) -> tuple[list[int], list[int]]:
    """Returns the rank that keeps each worker which is left, and the prompts that ranks owe, of what all have said.
    Raises FloatingPointError where a model has diverged, WorkersFail where another trainer failed, or a prompt is owed
    and nobody is left who samples."""
    for kind, reason in (said["error"] for said in every if said["error"] is not None):
        raise FloatingPointError(reason) if kind == "FloatingPointError" else WorkersFail(reason or kind)
    owners = [rank for rank, said in enumerate(every) for _ in range(said["live"])]
    owed = sorted(chain.from_iterable(said["owed"] for said in every))
    if owed and not owners:
        last = next(said["last_fault"] for said in every if said["last_fault"])
        raise WorkersFail(f"no rollout worker is left; the last one: {last}")
    return owners, owed


def gathered(ranks: Gathering, groups: dict[int, Group], prompts: Mapping[int, list[int]]) -> list[Group]:
    """Returns the groups of all ranks in the order of the prompts, which are ids by number (a collective)."""
    if ranks.size > 1:
        parts = [unpack(part, prompts) for part in ranks.all_gather_bytes(pack(groups, prompts))]
        groups = {number: group for part in parts for number, group in part.items()}
        assert len(groups) == sum(map(len, parts)), "a prompt was answered twice"
    assert groups.keys() == prompts.keys(), "a prompt was not answered"
    return [groups[number] for number in prompts]
