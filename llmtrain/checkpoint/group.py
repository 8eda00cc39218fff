"""What a checkpoint needs from the ranks that write or read it together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class CheckpointGroup(Protocol):
    """The ranks that share a checkpoint; they see the same directory."""

    rank: int
    size: int

    def all_gather_json(self, value: object) -> list:
        """The JSON value of every rank, in rank order, on every rank."""


class LocalGroup:
    """One process on its own."""

    rank = 0
    size = 1

    def all_gather_json(self, value: object) -> list:
        return [value]


def together(group: CheckpointGroup, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return the (JSON) results of all; no rank waits for one that failed.

    Raises on every rank, naming the failed ranks: OSError where the file system failed, else ValueError.
    """
    result, kind, reason = None, None, None
    try:
        result = action()
    except OSError as e:
        kind, reason = "OSError", str(e)
    except ValueError as e:
        kind, reason = "ValueError", str(e)
    outcomes = group.all_gather_json([result, kind, reason])
    failures = [f"rank {rank}: {why}" for rank, (_, _, why) in enumerate(outcomes) if why is not None]
    if failures:
        raise (OSError if any(k == "OSError" for _, k, _ in outcomes) else ValueError)("; ".join(failures))
    return [value for value, _, _ in outcomes]
