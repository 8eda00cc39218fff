"""Stores several trained models of a job in one checkpoint, under one manifest.

Parameters of the main one keep their canonical names, and what state.json says of it stands at its top: whoever reads a
checkpoint finds that model, however many there are. Names of another one begin with its role and a slash, and what
state.json says of it stands under `roles`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.save import Shapes
from llmtrain.engine.base import Engine
from llmtrain.types import Fragment

MAIN = "policy"  # the role that is exported, evaluated, and started from


@dataclass(frozen=True)
class Roles:
    """Gives what several engines own as if one did, for `save.take`."""

    engines: Mapping[str, Engine]

    def fragments(self) -> Iterator[Fragment]:
        """Yields the fragments of all engines, with the names they have in the checkpoint."""
        for role, engine in self.engines.items():
            for fragment in engine.fragments():
                address = replace(fragment.address, name=prefix(role) + fragment.address.name)
                yield replace(fragment, address=address)


def prefix(role: str) -> str:
    """Returns what the names of a role's parameters begin with in a checkpoint."""
    return "" if role == MAIN else f"{role}/"


def joined_shapes(shapes: Mapping[str, Shapes]) -> Shapes:
    """Returns the shapes of all roles, by the names that the parameters have in the checkpoint."""
    return {prefix(role) + name: shape for role, own in shapes.items() for name, shape in own.items()}


def joined_states(states: Mapping[str, dict]) -> dict:
    """Returns what state.json says of each role: of the main one at the top, of the others under `roles`."""
    return {**states[MAIN], "roles": {role: state for role, state in states.items() if role != MAIN}}


def held_roles(reader: CheckpointReader) -> list[str]:
    """Returns the roles that a checkpoint holds, the main one first. (Earlier versions saved that one alone.)"""
    return [MAIN, *reader.state.get("roles", {})]


def read_role(reader: CheckpointReader, role: str) -> CheckpointReader:
    """Returns a reader of one role: its parameters by their names within the model, and its part of the state."""
    return reader if role == MAIN else reader.part(prefix(role), reader.state["roles"][role])
