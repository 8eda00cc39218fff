"""Python as a tool: what a policy reads of a run, in the sandbox."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmtrain.envs.python_tool import PythonRunner, printed
from llmtrain.envs.toolbox import Tool, ToolBox, ToolFault


@pytest.fixture(scope="module")
def box() -> Iterator[ToolBox]:
    runner = PythonRunner(deadline_s=2.0, workers=1)
    tool = Tool("python", "", {"code": {"type": "string"}}, runner.run, close=runner.close)
    box = ToolBox([tool], most_characters=200)
    yield box
    box.close()
    assert not any(pool.workers for pool in runner.pools)


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("print(6 * 7)\nprint('x')", "42\nx"),
        ("6 * 7", "(nothing was printed)"),
        ("print(1)\n1 / 0", "1\nZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("print('a' * 10_000)", "a" * 200 + "\n... 9800 more characters"),
        ("open('/etc/passwd').read()", "Error"),
        ("import socket; socket.create_connection(('127.0.0.1', 1))", "Error"),
        ("import os; os.kill(os.getppid(), 9)", "Error"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_what_a_policy_reads(box: ToolBox, code: str, result: str) -> None:
    found = box.call("python", {"code": code})
    assert result in found if result == "Error" else found == result


def test_what_does_not_end_is_ended(box: ToolBox) -> None:
    assert box.call("python", {"code": "while True: pass"}) == "error: the program took longer than 2 s"
    assert box.call("python", {"code": "import os; os._exit(1)"}).startswith("error: the program ended without a reply")
    assert box.call("python", {"code": "print(2)"}) == "2"


def test_one_program_sees_nothing_of_another(box: ToolBox) -> None:
    box.call("python", {"code": "import builtins; builtins.x = 1; open('file', 'w').write('1')"})
    assert box.call("python", {"code": "print(x)"}) == "NameError: name 'x' is not defined"
    assert "FileNotFoundError" in box.call("python", {"code": "open('file')"})


def test_threads_share_the_workers(box: ToolBox) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: box.call("python", {"code": f"print({i})"}), range(8)))
    assert found == [str(i) for i in range(8)]


@pytest.mark.parametrize("value", [None, 3, {}, {"output": 3}])
def test_a_broken_reply_is_told_of(value: object) -> None:
    with pytest.raises(ToolFault, match="broke what runs it"):
        printed(value)
