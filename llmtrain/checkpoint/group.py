"""Defines what a checkpoint needs from the ranks that write or read it together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class CheckpointGroup(Protocol):
    """Stands for the ranks that share a checkpoint; all of them see the same directory."""

    rank: int
    size: int

    def all_gather_json(self, value: object) -> list:
        """Returns the JSON values of all ranks, in rank order, on every rank."""


class LocalGroup:
    """Stands for a single process."""

    rank = 0
    size = 1

    def all_gather_json(self, value: object) -> list:
        return [value]


def together(group: CheckpointGroup, action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank and returns the (JSON) results of all.

    Raises on every rank, naming the ranks that failed: OSError where a file system did, else ValueError.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as e:  # any kind: the other ranks must learn of it, or they wait for this rank forever
        error = e
    own = None if error is None else str(error) if isinstance(error, OSError | ValueError) else repr(error)
    outcomes = group.all_gather_json([result, own, isinstance(error, OSError)])
    failures = [f"rank {rank}: {reason}" for rank, (_, reason, _) in enumerate(outcomes) if reason is not None]
    if failures:
        kind = OSError if any(is_os_error for _, _, is_os_error in outcomes) else ValueError
        raise kind("; ".join(failures)) from error
    return [value for value, _, _ in outcomes]
