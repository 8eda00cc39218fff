"""Runs the program of `rollout.agent`, once for a sample, in processes with a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.config.agent import AgentConfig
from llmtrain.rewards.scorer import absolute
from llmtrain.sandbox.pool import Call, Pool, Reply, printable

KEEPER = Path(__file__).with_name("keeper.py")
REWARD = "agent"  # the name of a reward that is one number
MOST_OUTPUT_BYTES = 1 << 16  # of what a command prints, from its end, that is read


class Task(NamedTuple):
    """Holds what one run of the program is given. Example: Task({"prompt": "1 + 1"}, "http://127.0.0.1:9/v1", "key")"""

    example: Mapping[str, Any]
    base_url: str
    api_key: str


class Program:
    """Runs the program for many samples, `processes` at a time."""

    def __init__(self, settings: AgentConfig) -> None:
        self.settings = settings
        self.pool: Pool | None = None
        if settings.function is not None:
            functions, made = (
                {"run": absolute(settings.function)},
                {} if settings.args is None else {"run": settings.args},
            )
            own = {"takes": {"run": 3}, "made": made, "python": settings.python}
            self.pool = Pool(functions, settings.processes, sandboxed=False, **own)

    def start(self) -> None:
        """Starts the processes of a function. Raises ValueError when it cannot be loaded."""
        try:
            if self.pool is not None:
                self.pool.start()
        except ImportError as error:
            raise ValueError(f"rollout.agent.function={self.settings.function}: cannot be loaded: {error}") from None

    def run(self, tasks: Sequence[Task]) -> list[Reply]:
        """Returns what came of each: what the program returned, or why it did not."""
        if self.pool is not None:
            return self.pool.run([Call("run", (dict(t.example), *t[1:]), self.settings.deadline_s) for t in tasks])
        with ThreadPoolExecutor(self.settings.processes) as threads:
            return list(threads.map(self._command, tasks))

    def close(self) -> None:
        """Ends the processes."""
        if self.pool is not None:
            self.pool.close()

    def _command(self, task: Task) -> Reply:
        """Runs the command, with all that it starts in a process group of its own, which ends with this process."""
        if shutil.which(self.settings.command[0]) is None:
            return Reply(None, f"cannot be started: {self.settings.command[0]} is no program here")
        environment = {**os.environ, "OPENAI_BASE_URL": task.base_url, "OPENAI_API_KEY": task.api_key}
        temporary = tempfile.TemporaryFile
        with temporary() as given, temporary() as said, temporary() as told, open_while_alive() as pipe:
            given.write(json.dumps(task.example).encode())
            given.seek(0)
            streams = {"stdin": given, "stdout": said, "stderr": told}
            kept = [sys.executable, "-I", "-S", str(KEEPER), str(pipe), *self.settings.command]
            process = subprocess.Popen(kept, env=environment, start_new_session=True, pass_fds=[pipe], **streams)
            try:
                status = process.wait(self.settings.deadline_s)
            except subprocess.TimeoutExpired:
                return Reply(None, f"took longer than {self.settings.deadline_s:g} s")
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # none of it is left
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if status != 0:
                return Reply(None, f"ended with {status}: {_last_line(told) or 'without a word'}")
            return _value(_last_line(said))


@contextlib.contextmanager
def open_while_alive() -> Iterator[int]:
    """Yields one end of a pipe, to hand on. The other is closed behind it, or when this process ends in any way."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def _last_line(file: Any) -> str:
    """Returns the last line of a file that is not empty."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - MOST_OUTPUT_BYTES))
    lines = file.read().decode(errors="replace").split("\n")
    return next((printable(line.strip())[:300] for line in reversed(lines) if line.strip()), "")


def _value(line: str) -> Reply:
    """Returns what the last line of a command's output says, as JSON; nothing where there is none."""
    try:
        return Reply(json.loads(line) if line else None, None)
    except (ValueError, RecursionError):
        return Reply(None, f"the last line that it printed is {line[:60]!r}, no JSON number or object of numbers")


def rewards_of(reply: Reply, needed: bool) -> tuple[dict[str, float], str | None]:
    """Returns the rewards by name in what a program returned, and what is wrong with it. `needed`: there are no other
    rewards, so it must return one.

    Example: rewards_of(Reply(1, None), True) is ({"agent": 1.0}, None)
    """
    if reply.error is not None:
        return {}, reply.error
    found = {} if reply.value is None else reply.value if isinstance(reply.value, dict) else {REWARD: reply.value}
    if needed and not found:
        return {}, "returned no reward, and the section rewards is empty; return a number, or add an entry there"
    for name, value in found.items():
        if not isinstance(value, bool | int | float) or not abs(value) <= sys.float_info.max:  # nor for NaN
            return {}, f"returned {value!r:.60} as the reward {name!r:.60}, which is no finite number"
    return {name: float(value) for name, value in found.items()}, None
