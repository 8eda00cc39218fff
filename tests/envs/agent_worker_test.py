"""Runs of a program in a worker that samples ahead: whose weights wrote which token, and that nothing of the program
outlives the worker."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from openai import OpenAI

from llmtrain.data.tokenizer import Tokenizer
from llmtrain.envs.agents import Agents
from llmtrain.rollout.native import NativeGenerator
from llmtrain.types import Group, Sample
from tests.data.families import family
from tests.envs.agents_test import ASK, Here, say
from tests.envs.whole_row import whole_row_logprobs
from tests.envs.worker_process_test import Side

pytest.importorskip("uvicorn")
MORE = {"role": "user", "content": "More"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return family("qwen", tmp_path_factory.mktemp("families"))


class Runs(Side):
    """A worker of this process that runs a program four times together: it asks, goes on with that, and rewrites it.
    Newer weights come when all first answers are there."""

    def over(self, generator: NativeGenerator) -> Agents:
        self.agents = Agents(generator, self.tokenizer, Here(self.talk), False, 4)
        self.firsts, self.given, self.wait = threading.Barrier(4), False, False
        return self.agents

    def talk(self, example: dict, client: OpenAI) -> float:
        answer = say(client, ASK)
        if self.firsts.wait(10) == 0 and not self.given:
            self.given = True
            self.give(2)
        give_up = time.monotonic() + 10
        while self.wait and self.agents.generator.version != 2:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        say(client, [*ASK, answer, MORE])
        say(client, [*ASK, {**answer, "content": "(left out)"}, MORE])
        return 1.0

    def expected(self, sample: Sample, version: int) -> torch.Tensor:
        return whole_row_logprobs(self.models[version], sample, 1.5)


@pytest.fixture
def side(tokenizer: Tokenizer) -> Iterator[Runs]:
    """A worker that holds weights of version 1."""
    side = Runs(tokenizer)
    thread = threading.Thread(target=side.run)
    thread.start()
    assert side.next().head == {"kind": "ready"}
    side.give(1)
    side.next()
    yield side
    side.sock.close()
    thread.join(10)
    side.agents.close()
    assert not thread.is_alive()


def check(side: Runs, groups: list[Group], early: int, late: int) -> None:
    """Asserts who wrote what: first answers version `early`, later ones `late`, each with the log-probs that these
    weights have for the whole row. fp32, other sums: 1e-4."""
    for sample in (sample for group in groups for sample in group):
        turns = [ids for own, ids in sample.turns() if own]
        first = len(turns) == 2  # the row that goes on
        by = [v for v, own in zip(sample.versions, sample.trained, strict=True) if own]
        head = len(turns[0]) if first else 0
        assert by == [early] * head + [late] * (len(by) - head)
        found, trained = torch.tensor(sample.logprobs), torch.tensor(sample.trained)
        for version in {early, late}:
            mine = trained & (torch.tensor(sample.versions) == version)
            torch.testing.assert_close(found[mine], side.expected(sample, version)[mine], atol=1e-4, rtol=0)
    attempts = [[sample.attempt for sample in group] for group in groups]
    assert attempts == [[0, 0, 1, 1]] * 2


def test_runs_are_ended_under_the_weights_that_began_them(side: Runs) -> None:
    groups, rejected = side.asked("finish")
    assert rejected == 0 and side.given
    check(side, groups, 1, 1)
    assert side.next().head["version"] == 2  # loaded behind the answer
    again, _ = side.asked("finish")
    check(side, again, 2, 2)
    assert [[s.ids for s in g] for g in groups] != [[s.ids for s in g] for g in again]


def test_runs_go_on_under_the_new_weights(side: Runs) -> None:
    side.wait = True
    groups, rejected = side.asked("continue")
    assert rejected == 0
    check(side, groups, 1, 2)
    assert side.agents.server.continuous.sequences == 0


PROGRAM = """
import os, subprocess, time

def run(example, base_url, api_key):
    child = subprocess.Popen(["sleep", "300"])
    with open(f"{example['folder']}/pids", "a") as file:
        print(os.getpid(), child.pid, file=file)
    time.sleep(300)
"""
COMMAND = 'read -r x; sleep 300 & echo $$ $! >> "$FOLDER/pids"; sleep 300'

ASKING = """
import json, sys
from llmtrain.config.agent import AgentConfig
from llmtrain.envs.program import Program, Task

settings, example = json.loads(sys.argv[1])
Program(AgentConfig(**settings)).run([Task(example, "http://x/v1", "k")] * 2)
"""


def lives(number: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("kind", ["function", "command"])
def test_nothing_of_a_program_outlives_the_process_that_runs_it(kind: str, tmp_path: Path) -> None:
    """Two runs stand, each with a process that it has started, when the process that wants them is killed. (The slow
    tests of recipes/agent_ahead_test.py kill a whole worker.)"""
    (tmp_path / "program.py").write_text(PROGRAM)
    own = {"function": f"{tmp_path}/program.py:run"} if kind == "function" else {"command": ["bash", "-c", COMMAND]}
    given = json.dumps([{**own, "processes": 2}, {"folder": str(tmp_path)}])
    asking = subprocess.Popen([sys.executable, "-c", ASKING, given], env={**os.environ, "FOLDER": str(tmp_path)})
    try:
        pids = await_pids(tmp_path / "pids")
        assert all(map(lives, pids)) and len(set(pids)) == 4
    finally:
        asking.kill()
        asking.wait()
    give_up = time.monotonic() + 10
    while any(map(lives, pids)) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not any(map(lives, pids))


def await_pids(file: Path) -> list[int]:
    """Returns the four numbers that two runs write."""
    give_up = time.monotonic() + 30
    while not file.exists() or len(file.read_text().split()) < 4:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    return list(map(int, file.read_text().split()))
