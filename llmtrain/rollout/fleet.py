"""Keeps the processes that sample for a trainer: a thread for each starts it, gives it prompts, notices its faults,
starts it again, or gives it up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from llmtrain.rollout.board import Board, Closed, Task
from llmtrain.rollout.process import Program, Worker, WorkerFault
from llmtrain.rollout.wire import unpack
from llmtrain.rollout.worker import request_of
from llmtrain.types import Group, Prompt, Sampling, attempts

LOOK_S = 0.2  # between looks at a worker without a prompt
END_S = 10.0  # for a thread to kill its worker


@dataclass(frozen=True)
class Orders:
    """Says what the workers do. `prompts_of` returns the prompts of these numbers."""

    program: Program
    prompts_of: Callable[[Sequence[int]], list[Prompt]]
    sampling: Sampling
    inflight: Literal["finish", "continue", "restart"]  # what becomes of an unfinished sample under newer weights
    restarts: int  # of each worker
    episodes: bool = False  # they play episodes: a sample is an attempt of each side
    runs: bool = False  # of a program: a sample has as many rows as it began conversations


class Fleet:
    """Holds the threads; they end with the board."""

    def __init__(self, board: Board, orders: Orders) -> None:
        self.board, self.orders = board, orders
        workers = orders.program.settings
        self.threads = [threading.Thread(target=self._keep, args=(i,), daemon=True) for i in workers]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Ends threads and processes."""
        self.board.close()
        for thread in self.threads:
            thread.join(END_S)

    def _keep(self, index: int) -> None:
        """Runs a worker, again after a fault, until the board is closed or it is given up."""
        try:
            for starts_left in reversed(range(self.orders.restarts + 1)):
                try:
                    self._serve(index)
                except WorkerFault as fault:
                    self.board.fail(index, str(fault), starts_left)
        except Closed:
            pass
        except Exception as error:  # the trainer must learn of it
            self.board.stop(error)

    def _serve(self, index: int) -> None:
        """Runs a process from its start to its end. Raises WorkerFault, Closed."""
        worker = Worker(self.orders.program, index, self.board.newest)
        try:
            heard = time.monotonic()
            while True:
                task = self.board.begin(index, LOOK_S)
                if task is not None:
                    self.board.finish(index, self._sampled(worker, task), task.question)
                elif time.monotonic() - heard > worker.deadline_s / 2:
                    worker.ask({"kind": "ping"})
                else:
                    worker.watch()
                    continue
                heard = time.monotonic()
        finally:
            worker.kill()

    def _sampled(self, worker: Worker, task: Task) -> dict[int, Group]:
        """Returns the groups of a task. Raises WorkerFault; FloatingPointError when the model has diverged, ValueError
        for what no worker can answer."""
        prompts, sampling, inflight = self._asked(task)
        if worker.sent != task.weights.version:
            worker.give(task.weights)
        request = {"numbers": task.numbers, "inflight": inflight, **request_of(prompts, sampling)}
        load_s, loaded_bytes = worker.load_s, worker.loaded_bytes
        answer = worker.ask({"kind": "generate", **request}, renew=inflight != "finish")
        if answer.head["kind"] == "diverged":
            raise FloatingPointError(answer.head["error"])
        if answer.head["kind"] == "refused":
            raise ValueError(answer.head["error"])
        ids = {number: prompt.ids for number, prompt in zip(task.numbers, prompts, strict=True)}
        groups = unpack(torch.frombuffer(answer.payload, dtype=torch.uint8), ids)
        if reason := wrong(groups, task, sampling.num_samples, self.orders.episodes, self.orders.runs):
            raise worker.fault(f"generate: {reason}")
        rejected = answer.head["rejected"]
        self.board.count(rejected, worker.load_s - load_s, worker.loaded_bytes - loaded_bytes)
        return groups

    def _asked(self, task: Task) -> tuple[list[Prompt], Sampling, str]:
        """Returns what a worker is asked: prompts, how they are sampled, and what newer weights do to them."""
        orders, question = self.orders, task.question
        if question is None:
            return orders.prompts_of(task.numbers), orders.sampling, orders.inflight
        return [question.prompts[place] for place in task.numbers], question.sampling, "finish"


def wrong(groups: dict[int, Group], task: Task, num_samples: int, episodes: bool, runs: bool = False) -> str | None:
    """Returns what is wrong with the groups that answer a task, None if nothing is. Of `episodes` each is as many
    attempts as it has sides, of `runs` of a program each has as many rows as it wanted: the worker alone knows both."""
    if runs and any(not _all_attempts(group, num_samples) for group in groups.values()):
        return f"a group does not hold rows of {num_samples} runs of the program, one behind the other"
    tries = [len(attempts(group)) % num_samples if episodes else len(group) - num_samples for group in groups.values()]
    if list(groups) != task.numbers or (any(tries) and not runs):
        return "the answer is not one group for each prompt"
    wanted = task.weights.version
    versions = {version for group in groups.values() for sample in group for version in sample.versions}
    if other := {v for v in versions if v < wanted or (task.question is not None and v > wanted)}:
        return f"sampled with weights of version {min(other)}, and {wanted} had been sent"
    return None


def _all_attempts(group: Group, num_samples: int) -> bool:
    """Returns whether a group holds rows of each attempt, in their order."""
    attempts = [-1 if sample.attempt is None else sample.attempt for sample in group]
    return attempts == sorted(attempts) and list(dict.fromkeys(attempts)) == list(range(num_samples))
