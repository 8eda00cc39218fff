from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from llmtrain.observe.wandb import start

BLOCK = 32768  # a .wandb file is a LevelDB log: blocks of records (crc32 u32, length u16, type u8, payload)


def _records(path: Path) -> list:
    """Every protobuf record of a .wandb file, after its header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, at, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(pb.Record.FromString(parts))
            parts = b""
    return records


def _history(path: Path) -> list[dict[str, float]]:
    items = [r.history.item for r in _records(path) if r.HasField("history")]
    return [{(i.key or i.nested_key[0]): json.loads(i.value_json) for i in item} for item in items]


HEAD = """
import sys
from llmtrain.observe.wandb import start
sink = start("offline", "p", "tiny", sys.argv[1], {"model": {"num_layers": 2}}, resume=len(sys.argv) > 2)
"""


def _run(code: str, *args: str) -> None:
    """In its own process, for W&B keeps global state; it must say nothing and obey `start`, not its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"WANDB_MODE": "online"}
    command = [sys.executable, "-c", HEAD + code, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_offline_run_holds_the_metrics_and_resumes(tmp_path: Path) -> None:
    code = "for i in range({}, {}): sink.log(i, {{'loss': 1 / i, 'lr': 3e-4}})\nsink.finish()"
    _run(code.format(1, 400), str(tmp_path))
    _run(code.format(400, 402), str(tmp_path), "resume")
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime_ns)
    history = [row for file in files for row in _history(file)]
    assert [row["_step"] for row in history] == list(range(1, 402))
    assert history[3]["loss"] == 0.25 and history[3]["lr"] == 3e-4
    runs = [r.run for file in files for r in _records(file) if r.HasField("run")]
    assert len({r.run_id for r in runs}) == 1 and {(r.project, r.display_name) for r in runs} == {("p", "tiny")}
    assert json.loads(next(u.value_json for u in runs[0].config.update if u.key == "model")) == {"num_layers": 2}


def _alive(process: psutil.Process) -> bool:
    """Not ended; one that ended and waits to be reaped by the machine's init has."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_service_ends_with_a_killed_process(tmp_path: Path) -> None:
    code = HEAD + "print('ready', flush=True)\nsys.stdin.read()"
    trainer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout.readline() == "ready\n"
    services = psutil.Process(trainer.pid).children(recursive=True)
    assert any("wandb-core" in service.name() for service in services)
    trainer.kill()
    trainer.communicate()
    deadline = time.monotonic() + 30
    while any(_alive(service) for service in services) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(service) for service in services)


@pytest.mark.parametrize("mode", ["off", "disabled"])
def test_off_touches_nothing(mode: str, tmp_path: Path) -> None:
    sink = start(mode, "p", "n", str(tmp_path), {}, resume=False)
    sink.log(1, {"loss": 1.0})
    sink.finish()
    assert list(tmp_path.iterdir()) == []


class Broken:
    """A W&B run whose service is gone, and a library that opens none."""

    def __init__(self, *modes: str) -> None:
        self.modes, self.asked = modes, []

    def __call__(self, *_: object, **keys: object) -> Broken:
        self.asked.append(keys.get("mode"))
        if keys.get("mode") in self.modes:
            raise ConnectionError("no\nroute")
        return self

    Settings = dict
    init = __call__

    def log(self, metrics: dict, step: int) -> None:
        raise BrokenPipeError(f"step {step}")

    def finish(self, exit_code: int) -> None:
        raise TimeoutError("late")


def test_an_outage_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken("online")
    monkeypatch.setitem(sys.modules, "wandb", broken)
    sink = start("online", "p", "n", str(tmp_path), {}, resume=False)
    assert broken.asked == ["online", "offline"]
    for step in (1, 2):
        sink.log(step, {"loss": 1.0})
    sink.finish()
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases: ConnectionError: no route; the run goes on, offline",
        "Weights & Biases: BrokenPipeError: step 1; the metrics from here on are in metrics.jsonl alone",
    ]
    caplog.clear()
    start("offline", "p", "n", str(tmp_path), {}, resume=False).finish()
    assert caplog.messages == ["Weights & Biases: TimeoutError: late; its last metrics may be in metrics.jsonl alone"]
    caplog.clear()
    broken.modes = ("online", "offline")
    start("online", "p", "n", str(tmp_path), {}, resume=False).finish()
    assert [message.partition("; ")[2] for message in caplog.messages] == [
        "the run goes on, offline",
        "the run goes on",
    ]


def test_online_with_a_key_goes_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    fake = SimpleNamespace(Settings=lambda **keys: keys, init=lambda **keys: asked.update(keys))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    start("online", "project", "name", str(tmp_path), {"seed": 1}, resume=False)
    assert (asked["mode"], asked["project"], asked["name"], asked["config"]) == (
        "online",
        "project",
        "name",
        {"seed": 1},
    )
