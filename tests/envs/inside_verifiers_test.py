"""Environments of the library verifiers as programs of `rollout.agent`, where launch/verifiers.sh has installed it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.agent import AgentConfig
from llmtrain.envs.program import Program, Task
from llmtrain.sandbox.pool import Reply
from tests.conftest import ROOT
from tests.servers import Server, reply, serving
from tests.verifiers_python import verifiers_python

FUNCTION, GUESS = "llmtrain.envs.inside_verifiers:Verifiers", str(ROOT / "configs/grpo/guess.py")
OWN = '''
import verifiers as vf
from datasets import Dataset

def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: one
        b: other
    """
    return a + b

def right(completion, answer):
    return float(answer in completion[-1].content)

def best(completions):
    return [1.0] * len(completions)

def load_environment(reward="right"):
    data = Dataset.from_list([{"question": "4 + 5?", "answer": "9"}])
    return vf.ToolEnv(tools=[add], dataset=data, rubric=vf.Rubric(funcs=[globals()[reward]]), max_turns=4)
'''


def made(environment: str, **args: Any) -> Program:
    """Returns the program, started."""
    given = {"environment": environment, "args": args}
    program = Program(AgentConfig(function=FUNCTION, args=given, python=verifiers_python(), processes=1, deadline_s=60))
    program.start()
    return program


def played(program: Program, server: Server, row: dict[str, Any]) -> Reply:
    server.asked.clear()
    return program.run([Task(row, server.url, "a-key")])[0]


class Policy:
    """Answers with the messages of a list, or refuses with a status."""

    def __init__(self) -> None:
        self.says: list[Any] = []

    def __call__(self, handler: Any, body: dict[str, Any]) -> None:
        said = self.says.pop(0)
        if isinstance(said, tuple):
            reply(handler, said[0], {"error": {"message": said[1]}})
            return
        message = {"role": "assistant", **(said if isinstance(said, dict) else {"content": said})}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        reply(handler, 200, {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy()


@pytest.fixture(scope="module")
def server(policy: Policy) -> Iterator[Server]:
    with serving(policy) as server:
        yield server


def test_rows_and_rollouts_of_the_example(server: Server, policy: Policy, tmp_path: Path) -> None:
    rows = tmp_path / "made" / "rows.jsonl"
    command = [verifiers_python(), "-m", "llmtrain.envs.inside_verifiers", GUESS, str(rows), '{"rows": 3, "most": 5}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0 and done.stdout == f"{rows}: 3 rows\n", done.stderr
    first, *others = [json.loads(line) for line in rows.read_text().splitlines()]
    question = {"role": "user", "content": "I think of a number from 1 to 5. Guess it, with one number."}
    assert first["prompt"] == [question] and (first["example_id"], first["answer"]) == (0, "4") and len(others) == 2

    program = made(GUESS, turns=2)
    policy.says = ["1", "4"]
    assert played(program, server, first) == Reply(0.5, None)
    (path, headers, body), (_, _, again) = server.asked
    sent = {name.lower(): value for name, value in headers.items()}
    assert path == "/v1/chat/completions" and sent["authorization"] == "Bearer a-key" and "n" not in body
    assert body["messages"] == [question] and body["model"] == "policy"
    said = [(message["role"], message["content"]) for message in again["messages"][1:]]
    assert said == [("assistant", "1"), ("user", "It is higher. Guess again.")]
    policy.says = ["I say 4."]
    assert played(program, server, first) == Reply(1.0, None)
    policy.says = ["5", "no", "4"]
    assert played(program, server, first) == Reply(0.0, None) and len(policy.says) == 1

    policy.says = ["5", (400, "together they must be at most 512, the context length here")]  # cut, no failure
    assert played(program, server, first) == Reply(0.0, None)
    policy.says = [(500, "the server failed")]
    failed = played(program, server, first)
    assert failed.value is None and failed.error.startswith("RuntimeError: ModelError") and "500" in failed.error
    program.close()


def test_tools_of_an_environment(server: Server, policy: Policy, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    program = made(str(own))
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 4, "b": 5}'}}
    policy.says = [{"content": None, "tool_calls": [call]}, "It is 9."]
    row = {"prompt": [{"role": "user", "content": "4 + 5?"}], "answer": "9", "example_id": 0}
    assert played(program, server, row) == Reply(1.0, None)
    first, last = (body for _, _, body in server.asked)
    assert first["tools"][0]["function"]["name"] == "add" and last["tools"] == first["tools"]
    assert last["messages"][-1] == {"role": "tool", "tool_call_id": "c1", "content": "9"}
    program.close()


def test_what_cannot_be_played_is_refused_at_the_start(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    with pytest.raises(
        ValueError, match=r"rollout.agent.function=.*own.py: rewards of a whole group are not supported"
    ):
        made(str(own), reward="best")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*'no-such-environment'"):
        made("no-such-environment")
