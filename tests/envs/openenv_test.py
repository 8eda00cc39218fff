"""Episodes of a real OpenEnv server: a number that is to be guessed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("openenv")

from llmtrain.envs.openenv import OpenEnv

SERVER = Path(__file__).with_name("openenv_server.py")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen([sys.executable, str(SERVER), str(port)], env=environment)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_an_episode(url: str) -> None:
    env = OpenEnv(url, action="guess", observation="message")
    start = env.start({"prompt": "Guess.", "seed": 41})
    assert start == [{"role": "system", "content": "Guess."}, {"role": "user", "content": "a number from 0 to 99"}]
    low = env.step("7")
    assert low.messages == [{"role": "user", "content": "higher"}] and low.parts == {"openenv": 0.0} and not low.done
    right = env.step("41")
    assert right.done and right.parts == {"openenv": 1.0} and right.messages == []
    env.close()


def test_episodes_side_by_side(url: str) -> None:
    both = [OpenEnv(url, action="guess", observation="message") for _ in range(2)]
    for env, seed in zip(both, (10, 20), strict=True):
        assert env.start({"seed": seed}) == [{"role": "user", "content": "a number from 0 to 99"}]
    assert [env.step("15").messages[0]["content"] for env in both] == ["lower", "higher"]
    for env in both:
        env.close()


def test_what_does_not_fit(url: str) -> None:
    env = OpenEnv(url, action="guess", observation="text")
    with pytest.raises(ValueError, match="has no 'seed'"):
        env.start({"prompt": "x"})
    with pytest.raises(ValueError, match=r"has no field 'text', it has .*message"):
        env.start({"seed": 1})
    env.close()
