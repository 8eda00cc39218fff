"""More than 300 hostile programs. None gets out: the world outside is looked at after each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from llmtrain.sandbox import kernel
from llmtrain.sandbox.limits import Limits
from llmtrain.sandbox.pool import Call, Pool, Reply
from tests.sandbox.attack import REFUSED, Attack
from tests.sandbox.attacks_files import FILES
from tests.sandbox.attacks_processes import PROCESSES
from tests.sandbox.attacks_protocol import PROTOCOL
from tests.sandbox.attacks_resources import LONG, RESOURCES
from tests.sandbox.attacks_syscalls import SYSCALLS
from tests.sandbox.world import SECRET, World

QUICK = FILES + PROCESSES + PROTOCOL + RESOURCES + (SYSCALLS if kernel.MACHINE == "x86_64" else [])
RUN = {"run": "llmtrain.sandbox.program:run"}
LIMITS = Limits(memory_bytes=256 * 2**20)
DEADLINE_S, SHORT_S = 3.0, 0.5
SLACK_S = 20.0  # of a machine that does other things too; the worker gives up after 30 s
MODES = [
    (),
    pytest.param(("namespaces",), marks=pytest.mark.slow),
    pytest.param(("landlock",), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    os.environ["LLMTRAIN_SECRET"] = SECRET
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()
    del os.environ["LLMTRAIN_SECRET"]


@pytest.fixture(scope="module", params=MODES, ids=lambda without: f"without {' '.join(without) or 'nothing'}")
def pool(request: pytest.FixtureRequest, world: World) -> Iterator[Pool]:
    pool = Pool(RUN, limits=LIMITS, without=request.param)
    pool.start()
    world.ours = world._children()
    yield pool
    pool.close()


def test_there_are_enough() -> None:
    names = [attack.name for attack in QUICK + LONG]
    assert len(names) == len(set(names)) and len({a.source for a in QUICK + LONG}) == len(names)
    assert len(names) > (600 if kernel.MACHINE == "x86_64" else 300)


def refused(reply: Reply, attack: Attack) -> bool:
    """Whether a program was stopped: by an error that says so, by its limits, or by a signal."""
    if reply.error is not None:
        return reply.value is None
    if not isinstance(reply.value, dict):
        return attack.harmless  # it forged its reply
    error = reply.value["error"]
    return "DONE" not in reply.value["output"] and error is not None and error.startswith(REFUSED)


@pytest.mark.parametrize("attack", QUICK, ids=lambda attack: attack.name)
def test_nothing_gets_out(attack: Attack, pool: Pool, world: World) -> None:
    if attack.whole and not pool.mechanisms.namespaces:
        pytest.skip("Landlock does not hide that a file exists")
    began = time.monotonic()
    reply, after = pool.run(
        [Call("run", (world.fill(attack.source),), DEADLINE_S), Call("run", ("print(6 * 7)",), 60.0)]
    )
    assert time.monotonic() - began < DEADLINE_S + SLACK_S
    assert attack.harmless or refused(reply, attack), reply
    assert SECRET not in repr(reply)
    answer = {"output": "42\n", "error": None, "ended": True}
    assert after == Reply(answer, None)  # by the same worker, which knows nothing of it
    assert world.harm() == []


def test_no_process_is_left(pool: Pool, world: World) -> None:
    (worker,) = pool.workers
    inside = psutil.Process(worker.process.pid).children(recursive=True)
    assert len(inside) == pool.mechanisms.namespaces  # the guard's worker; without namespaces they are one


@pytest.fixture(scope="module")
def ended(world: World) -> dict[str, tuple[Reply, float]]:
    """Runs what takes its whole time, several at once: replies, and the seconds that each took."""
    pools = [Pool(RUN, limits=LIMITS) for _ in range(6)]

    def run(number: int) -> dict[str, tuple[Reply, float]]:
        found = {}
        for attack in LONG[number :: len(pools)]:
            began = time.monotonic()
            (reply,) = pools[number].run([Call("run", (world.fill(attack.source),), SHORT_S)])
            found[attack.name] = (reply, time.monotonic() - began)
        pools[number].close()
        return found

    with ThreadPoolExecutor(len(pools)) as threads:
        parts = list(threads.map(run, range(len(pools))))
    return {name: outcome for part in parts for name, outcome in part.items()}


@pytest.mark.parametrize("attack", LONG, ids=lambda attack: attack.name)
def test_everything_ends(attack: Attack, ended: dict[str, tuple[Reply, float]], world: World) -> None:
    reply, seconds = ended[attack.name]
    assert seconds < SHORT_S + SLACK_S
    assert attack.harmless or refused(reply, attack), reply
    assert len(repr(reply)) < 10 * LIMITS.reply_bytes
    assert world.harm() == []


CONTROLS = {
    "open('$outside/pwned', 'w').close()": "file",
    "import os; os.kill($pid, 10); import time; time.sleep(0.5)": "signals",
    "import socket; socket.create_connection(('127.0.0.1', $port))": "connection",
    "import socket; socket.socket(socket.AF_UNIX).connect('\\0$abstract')": "connection",
    "import os; os.chmod('$secret', 0o640)": "file",
    "import os; os.system('touch $home/pwned')": "made",
    "import subprocess; subprocess.Popen(['sleep', '5'], executable='/bin/sleep').args": "",
}


@pytest.mark.parametrize("source", CONTROLS)
def test_the_world_notices_what_happens_without_a_sandbox(source: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    pool = Pool(RUN, sandboxed=False)
    try:
        (reply,) = pool.run([Call("run", (world.fill(source),), 30.0)])
        assert reply.error is None and reply.value["error"] is None
        assert CONTROLS[source] in " ".join(world.harm())
    finally:
        pool.close()
        world.close()
