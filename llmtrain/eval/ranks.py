"""Lets several ranks evaluate one model: each answers its share of the prompts, and what follows from the answers is
done once, on rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from llmtrain.checkpoint.group import CheckpointGroup
from llmtrain.parallel.mesh import Mesh
from llmtrain.rollout.generator import Generator
from llmtrain.rollout.worker import Answer, ColocatedGenerator, asked_by, request_of
from llmtrain.types import Group, Prompt, Sampling

T = TypeVar("T")

LEAVE_S = 1.0
KINDS = {"ValueError": ValueError, "OSError": OSError, "RuntimeError": RuntimeError}
TOLD = (*KINDS.values(), FloatingPointError)  # what llmtrain raises to tell the user something
IDLE_S = 86400  # how long a rank waits to be asked, while rank 0 judges; the launcher ends it when rank 0 is gone


def agreed(group: CheckpointGroup, action: Callable[[], T]) -> T:
    """Runs `action` on every rank and returns what it makes on this one (a collective).

    Where it fails on any rank, all of them end: rank 0 raises ValueError, OSError or RuntimeError, naming the ranks
    that failed, and the others SystemExit with the exit code of that error, so that one line tells of it. What llmtrain
    does not raise by intent is raised where it happened.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as e:  # any kind: the other ranks must learn of it, or they wait for this rank
        error = e
    outcomes = group.all_gather_json(None if error is None else (str(error) or repr(error), kind_of(error)))
    failures = [(f"rank {rank}: {each[0]}", *each) for rank, each in enumerate(outcomes) if each is not None]
    if not failures:
        return result
    told, alone, kind = zip(*failures, strict=True)
    raised = KINDS[kind[0]](alone[0] if len(failures) == group.size and len(set(alone)) == 1 else "; ".join(told))
    if error is not None and not isinstance(error, TOLD):
        raise error
    if group.rank:
        leave(exit_code(raised))
    raise raised from error


def leave(code: int) -> NoReturn:
    """Ends a rank, silently, whose error rank 0 tells: a little later, as the launcher ends all when one has left."""
    time.sleep(LEAVE_S)
    raise SystemExit(code)


def kind_of(error: Exception) -> str:
    """Returns the name in `KINDS` of the kind that an error is told as."""
    return next((name for name, kind in KINDS.items() if isinstance(error, kind)), "RuntimeError")


def exit_code(error: Exception) -> int:
    """Returns with what a command ends that raises the error: 2 for wrong input, else 1."""
    return 2 if isinstance(error, ValueError) else 1


def sharing(local: Generator, mesh: Mesh, answer_by: Answer | None = None) -> ColocatedGenerator:
    """Returns a generator of all ranks, each of which answers its share by `local`, or by what is more than that
    (`answer_by`); what fails on one of them ends all, see `agreed`."""
    generate = answer_by or local.generate

    def answer(prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return agreed(mesh, lambda: generate(prompts, sampling))

    return ColocatedGenerator(local, mesh, answer)


class Leading:
    """Answers on rank 0 as `Generator.generate` does, by a generator of all ranks: tells the others each call."""

    def __init__(self, group: CheckpointGroup, generator: Generator) -> None:
        self.group, self.generator, self.served = group, generator, True

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Returns all groups, in the order of the prompts."""
        self.group.all_gather_json(request_of(prompts, sampling))
        self.served = False  # what fails in here has ended the others too
        groups = self.generator.generate(prompts, sampling)
        self.served = True
        return groups


def lead(group: CheckpointGroup, generator: Generator, work: Callable[[Leading], T]) -> T | None:
    """Runs `work` on rank 0 alone, with a generator that all ranks answer for; returns its result there, None on the
    others (a collective).

    `generate` of `generator` is a collective that all ranks call with the same prompts. An error of `work` is raised on
    rank 0; the others end by SystemExit with its exit code.
    """
    if group.rank:
        return serve(group, generator)
    leading, code = Leading(group, generator), 0
    try:
        return work(leading)
    except Exception as error:
        code = exit_code(error)
        raise
    finally:
        if leading.served:
            group.all_gather_json({"exit_code": code})


def serve(group: CheckpointGroup, generator: Generator) -> None:
    """Answers what rank 0 asks for until its work has ended. Raises SystemExit when that failed."""
    while "exit_code" not in (request := group.all_gather_json(None)[0]):
        generator.generate(*asked_by(request))
    if request["exit_code"]:
        leave(request["exit_code"])
