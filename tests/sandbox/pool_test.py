"""Workers: what a call sees, what it cannot leave behind, and what becomes of one that breaks."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import llmtrain
from llmtrain.sandbox import lock
from llmtrain.sandbox.limits import Limits, Mechanisms
from llmtrain.sandbox.pool import Call, Pool, Reply, Worker

HERE = str(Path(__file__).with_name("functions.py"))
NAMES = ("count", "echo", "fail", "sleep", "descriptors", "variables", "end", "numpy_number")
FUNCTIONS = {name: f"{HERE}:{name}" for name in NAMES}


def calls(name: str, *arguments: object, times: int = 1, deadline_s: float = 30.0) -> list[Call]:
    return [Call(name, arguments, deadline_s)] * times


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(FUNCTIONS, workers=2)
    yield pool
    pool.close()


@pytest.fixture
def open_pool() -> Iterator[Pool]:
    pool = Pool(FUNCTIONS, sandboxed=False)
    yield pool
    pool.close()


def test_values_come_back_in_order(pool: Pool) -> None:
    values = [1, 2.5, None, "é\n", [1, [2]], {"a": {"b": True}}, "x" * 100_000]
    assert pool.run([Call("echo", (value,), 30.0) for value in values]) == [Reply(value, None) for value in values]
    assert pool.run([]) == []


def test_numbers_of_numpy_are_numbers(open_pool: Pool) -> None:
    kinds = ("float32", "float64", "int64", "bool_", "array")
    *fine, array = open_pool.run([Call("numpy_number", (kind,), 30.0) for kind in kinds])
    assert fine == [Reply(1.0, None)] * 4
    assert array.value is None and array.error.startswith("TypeError: returned a value of type ndarray")


def test_no_call_sees_an_earlier_one(pool: Pool) -> None:
    assert pool.run(calls("count", times=5)) == [Reply(1, None)] * 5


def test_a_batch_shares_a_process_until_a_call_fails() -> None:
    pool = Pool(FUNCTIONS, batch=8)
    try:
        assert pool.run(calls("count", times=5)) == [Reply(n, None) for n in (1, 2, 3, 4, 5)]
        mixed = [Call("sleep", (60 if n == 1 else 0,), 0.4) for n in range(4)]
        late = Reply(None, "took longer than 0.4 s")
        assert pool.run(mixed) == [Reply("slept", None), late, *[Reply("slept", None)] * 2]
        gone = Reply(None, "ended without a reply (exit code 3)")
        assert pool.run(calls("end", times=3)) == [gone] * 3
        assert pool.run([*calls("count", times=10), *calls("echo", 1), *calls("count")])[7:] == [
            *[Reply(n, None) for n in (8, 1, 2, 1)],  # a ninth has another process, and so has another function
            Reply(1, None),
        ]
    finally:
        pool.close()


def test_an_error_is_told(pool: Pool) -> None:
    assert pool.run(calls("fail", "no\n\x1b[2J\ud800number")) == [Reply(None, "ValueError: no  [2J number")]
    assert pool.run(calls("end")) == [Reply(None, "ended without a reply (exit code 3)")]
    (reply,) = pool.run(calls("fail", "x" * 10_000))
    assert len(reply.error) == 300


def test_a_late_call_is_ended_and_the_worker_lives_on(pool: Pool) -> None:
    began, before = time.monotonic(), {worker.process.pid for worker in pool.workers}
    late, fine = pool.run([Call("sleep", (60,), 0.3), Call("echo", (1,), 30.0)])
    assert late == Reply(None, "took longer than 0.3 s") and fine == Reply(1, None)
    assert time.monotonic() - began < 20 and {worker.process.pid for worker in pool.workers} == before


def test_a_call_has_four_descriptors_and_no_environment(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, _ = os.pipe()
    os.set_inheritable(reading, True)
    assert pool.run(calls("descriptors")) == [Reply([0, 1, 2, 3], None)]
    (reply,) = pool.run(calls("variables"))
    assert reply.value.keys() == {"HOME", "TMPDIR"}


def test_a_worker_that_dies_is_replaced(pool: Pool) -> None:
    pool.workers[0].process.kill()
    pool.workers[0].process.wait()
    first, *others = pool.run(calls("echo", 7, times=4))
    assert first == Reply(None, "the worker ended") and others == [Reply(7, None)] * 3


def test_workers_end_with_the_process_that_started_them() -> None:
    source = (
        "import os, sys; from llmtrain.sandbox.pool import *\n"
        f"p = Pool({{'sleep': {HERE + ':sleep'!r}}}); p.start(); w = p.workers[0]\n"
        "w.send([Call('sleep', (600,), 600.0)])\n"
        "import time, psutil; time.sleep(1)\n"
        "print(w.process.pid, *[c.pid for c in psutil.Process(w.process.pid).children(True)], flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    told = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, timeout=60).stdout
    pids = [int(pid) for pid in told.split()]
    assert len(pids) >= 2
    give_up = time.monotonic() + 30
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids))


def test_a_function_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    for spec, reason in {
        f"{tmp_path}/bad.py:f": "ModuleNotFoundError: No module named 'nothing_of_this_name'",
        f"{HERE}:missing": "AttributeError: module 'functions' has no attribute 'missing'",
        "no.such.module:f": "ModuleNotFoundError: No module named 'no'",
    }.items():
        with pytest.raises(ImportError) as caught:
            Pool({"f": spec}).start()
        assert str(caught.value).startswith(reason)


def test_outside_the_sandbox_a_worker_remembers(open_pool: Pool) -> None:
    assert open_pool.run(calls("count", times=3)) == [Reply(1, None), Reply(2, None), Reply(3, None)]
    late, fine = open_pool.run([Call("sleep", (60,), 0.3), Call("count", (), 30.0)])
    assert late == Reply(None, "took longer than 0.3 s") and fine == Reply(1, None)  # a new worker
    assert open_pool.run(calls("end"))[0] == Reply(None, "the worker ended")
    assert open_pool.run(calls("variables"))[0].value.keys() >= {"PATH"}


CHILDREN = """
import subprocess, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
def start(seconds):
    child = subprocess.Popen(["sleep", "600"])
    print(child.pid, file=open(__file__ + ".pid", "w"))
    time.sleep(seconds)
"""


def gone(pid: int) -> bool:
    """Says whether a process ends within 10 s; one that nobody has waited for yet has ended."""
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("end", ["deadline", "close", "stdin"])
def test_outside_the_sandbox_no_process_is_left(end: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(CHILDREN)
    pool = Pool({"start": f"{tmp_path}/own.py:start"}, sandboxed=False)
    pool.start()
    worker = pool.workers[0].process
    (reply,) = pool.run([Call("start", (600 if end == "deadline" else 0,), 1.5 if end == "deadline" else 30.0)])
    child = int((tmp_path / "own.py.pid").read_text())
    if end == "deadline":
        assert reply.error == "took longer than 1.5 s"
    elif end == "stdin":  # as when the process that started it is killed
        worker.stdin.close()
        worker.wait(10)
    else:
        pool.close()
    assert gone(child) and worker.poll() is not None
    pool.close()


@pytest.mark.parametrize(
    ("held", "fault"),
    [
        (Mechanisms(7, True, True), None),
        (Mechanisms(3, False, True), None),
        (Mechanisms(0, True, True), None),
        (Mechanisms(2, False, True), "neither Landlock 3 (this kernel has 2) nor user namespaces"),
        (Mechanisms(0, False, True), "neither Landlock 3 (this kernel has none) nor user namespaces"),
        (Mechanisms(7, True, False), "the kernel takes no seccomp filter"),
    ],
)
def test_what_a_machine_needs(held: Mechanisms, fault: str | None) -> None:
    assert held.fault is None if fault is None else held.fault.startswith(fault)
    assert str(Mechanisms(7, True, True)) == "Landlock 7, namespaces, seccomp" and str(Mechanisms()) == "none"


def test_without_mechanisms_nothing_runs() -> None:
    with pytest.raises(RuntimeError, match=r"no sandbox on this machine: neither Landlock .* nor user namespaces"):
        Worker(FUNCTIONS, Limits(), without=("landlock", "namespaces")).await_ready()


def test_the_example_of_the_docs_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text()
    lines = re.search(r"```python\n(.*?)```", page, re.S).group(1).splitlines()
    names: dict = {"Reply": Reply}
    exec("\n".join(lines[:3]), names)
    source, _, result = lines[3].partition("  # -> ")
    assert eval(source, names) == eval(result, names)
    exec(lines[4], names)


def test_memory_counts_beside_what_is_loaded() -> None:
    held = lock.Lock(Limits(memory_bytes=100), ["/"], Mechanisms(), loaded_bytes=1000, null=0)
    bounds = lock.resource_limits(held, 2.5)
    assert bounds[resource.RLIMIT_AS] == 1100 and bounds[resource.RLIMIT_CPU] == 4


SHOWS = """import sys
class Shows:
    def __init__(self, word): self.word, self.calls = word, 0
    def __call__(self, more):
        self.calls += 1
        return [self.word + more, self.calls, sys.executable, sys.path, sys.modules["llmtrain"].__file__]
"""


def test_a_function_may_run_in_another_interpreter(tmp_path: Path) -> None:
    """It has its own packages, and of this one's llmtrain alone; what is made for it stays from call to call."""
    (tmp_path / "mine.py").write_text(SHOWS)
    base, own = sys._base_executable, {"sandboxed": False, "takes": {"run": 1}, "python": sys._base_executable}
    pool = Pool({"run": f"{tmp_path}/mine.py:Shows"}, made={"run": {"word": "a"}}, **own)
    values = [reply.value for reply in pool.run([Call("run", (each,), 5.0) for each in "bc"])]
    pool.close()
    assert [value[:2] for value in values] == [["ab", 1], ["ac", 2]]
    assert values[0][2] == base and values[0][4] == llmtrain.__file__
    assert not {str(Path(module.__file__).parents[1]) for module in (pytest, llmtrain)} & set(values[0][3])
    with pytest.raises(ImportError, match=r"TypeError: .*unexpected keyword argument 'words'"):
        Pool({"run": f"{tmp_path}/mine.py:Shows"}, made={"run": {"words": "a"}}, **own).start()
    with pytest.raises(ValueError, match="another interpreter has no sandbox; run it outside"):
        Pool({}, python=base)
