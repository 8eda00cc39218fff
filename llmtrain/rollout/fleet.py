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
from llmtrain.rollout.shared_weights import Shared
from llmtrain.rollout.wire import unpack
from llmtrain.rollout.worker import request_of
from llmtrain.types import Group, Prompt, Sampling

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


class Fleet:
    """Holds the threads; they end with the board."""

    def __init__(self, board: Board, orders: Orders) -> None:
        self.board, self.orders = board, orders
        workers = range(len(orders.program.settings))
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
        worker = Worker(self.orders.program, index, self._look)
        try:
            heard = time.monotonic()
            while True:
                task = self.board.begin(index, LOOK_S)
                if task is not None:
                    self.board.finish(index, self._sampled(worker, task))
                elif time.monotonic() - heard > worker.deadline_s / 2:
                    worker.ask({"kind": "ping"})
                else:
                    worker.watch()
                    continue
                heard = time.monotonic()
        finally:
            worker.kill()

    def _look(self) -> Shared | None:
        """Returns weights that what is under way goes on with. Raises Closed."""
        newest = self.board.newest()
        return None if self.orders.inflight == "finish" else newest

    def _sampled(self, worker: Worker, task: Task) -> dict[int, Group]:
        """Returns the groups of a task. Raises WorkerFault, and FloatingPointError when the model has diverged."""
        orders, prompts = self.orders, self.orders.prompts_of(task.numbers)
        if worker.sent != task.weights.version:
            worker.give(task.weights)
        request = {"numbers": task.numbers, "inflight": orders.inflight, **request_of(prompts, orders.sampling)}
        load_s, loaded_bytes = worker.load_s, worker.loaded_bytes
        answer = worker.ask({"kind": "generate", **request})
        if answer.head["kind"] == "diverged":
            raise FloatingPointError(answer.head["error"])
        ids = {number: prompt.ids for number, prompt in zip(task.numbers, prompts, strict=True)}
        groups = unpack(torch.frombuffer(answer.payload, dtype=torch.uint8), ids)
        if reason := wrong(groups, task, orders.sampling):
            raise worker.fault(f"generate: {reason}")
        rejected = answer.head["rejected"]
        self.board.count(rejected, worker.load_s - load_s, worker.loaded_bytes - loaded_bytes)
        return groups


def wrong(groups: dict[int, Group], task: Task, sampling: Sampling) -> str | None:
    """Returns what is wrong with the groups that answer a task, None if nothing is."""
    if list(groups) != task.numbers or any(len(group) != sampling.num_samples for group in groups.values()):
        return "the answer is not one group for each prompt"
    oldest = min(version for group in groups.values() for sample in group for version in sample.versions)
    if oldest < task.weights.version:
        return f"sampled with weights of version {oldest}, and {task.weights.version} had been sent"
    return None
