"""Offers Python as a tool: a whole program, which runs in the sandbox, the only place where text of a model may run."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from typing import Any

from llmtrain.envs.toolbox import Tool, ToolFault
from llmtrain.rewards.scorer import workers_of_rank
from llmtrain.sandbox.pool import Call, Pool


class PythonRunner:
    """Runs programs in the sandbox, as many at a time as the rank has workers; what one leaves behind, none sees."""

    def __init__(self, deadline_s: float, workers: int) -> None:
        self.deadline_s = deadline_s
        self.pools = [Pool({"run": "llmtrain.sandbox.program:run"}) for _ in range(workers)]
        self.free: queue.SimpleQueue[Pool] = queue.SimpleQueue()
        for pool in self.pools:
            self.free.put(pool)

    def start(self) -> None:
        """Starts the workers. Raises RuntimeError where the machine has no sandbox."""
        for pool in self.pools:
            pool.start()

    def run(self, arguments: Mapping[str, Any]) -> str:
        """Returns what a program printed, and the last line of its traceback behind it. Raises ToolFault where it ran
        too long or took too much."""
        pool = self.free.get()
        try:
            (reply,) = pool.run([Call("run", (arguments["code"],), self.deadline_s)])
        finally:
            self.free.put(pool)
        if reply.error is not None:
            raise ToolFault(f"the program {reply.error}")
        return printed(reply.value)

    def close(self) -> None:
        """Ends the workers."""
        for pool in self.pools:
            pool.close()


def printed(value: Any) -> str:
    """Returns what a policy reads of a run. `value` came out of the sandbox, and may be anything."""
    if not isinstance(value, dict) or not isinstance(value.get("output"), str):
        raise ToolFault("the program broke what runs it")
    error = value.get("error")
    lines = [value["output"].rstrip("\n"), error if isinstance(error, str) else ""]
    return "\n".join(filter(None, lines)) or "(nothing was printed)"


def python_tool(deadline_s: float) -> Tool:
    """Returns the tool; its workers start now. Raises RuntimeError where the machine has no sandbox."""
    runner = PythonRunner(deadline_s, workers_of_rank())
    runner.start()
    return Tool(
        "python",
        "Runs a Python program and returns what it prints. Every call is a program of its own.",
        {"code": {"type": "string", "description": "the program; print() what you want to know"}},
        runner.run,
        close=runner.close,
    )
