"""A worker without torch or model, which starts in no time: it answers each prompt with its own ids, and misbehaves as
its settings say. It speaks the messages of `llmtrain.rollout.worker_process` by itself."""

import hashlib
import json
import os
import signal
import socket
import struct
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from llmtrain.rollout.channel import receive, send
from llmtrain.sandbox.kernel import die_with_parent


def packed(head: dict[str, Any], version: int) -> bytes:
    """The groups as safetensors: every sample is the ids of its prompt, by weights of this version."""
    prompts, samples = head["prompts"], head["sampling"]["num_samples"]
    rows = [(n, p["ids"]) for n, p in zip(head["numbers"], prompts, strict=True) for _ in range(samples)]
    ids = [i for _, row in rows for i in row]
    heads = array("q", [x for n, row in rows for x in (n, len(row), 1)])
    lists = {"ids": ("I32", array("i", ids)), "trained": ("U8", array("B", [1] * len(ids)))}
    lists |= {"logprobs": ("F32", array("f", [-1.0] * len(ids))), "versions": ("I32", array("i", [version] * len(ids)))}
    index, data = {}, b""
    for name, (dtype, values) in {"heads": ("I64", heads), **lists}.items():
        shape = [len(rows), 3] if name == "heads" else [len(ids)]
        index[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values.tobytes())]}
        data += values.tobytes()
    text = json.dumps(index).encode()
    return struct.pack("<Q", len(text)) + text + data


def misbehave(phase: str, settings: dict[str, Any], sock: socket.socket) -> None:
    """Does what the settings say for this phase, in the first life of all workers."""
    if settings.get("phase") != phase:
        return
    try:
        os.close(os.open(settings["flag"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    print(f"about to {settings['how']} while {phase}", flush=True)
    match settings["how"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "slow":
            time.sleep(60)
        case "cut":
            sock.shutdown(socket.SHUT_RDWR)
            time.sleep(60)
        case "leave":
            sys.exit(3)


def main() -> None:
    die_with_parent()
    sock = socket.socket(fileno=int(sys.argv[1]))
    settings = receive(sock).head
    misbehave("start", settings, sock)
    send(sock, {"kind": "ready"})
    version = -1
    while (message := receive(sock)) is not None:
        head = message.head
        if head["kind"] == "weights":
            misbehave("weights", settings, sock)
            version = head["version"]
            told = {"kind": "loaded", "version": version, "load_s": 0.0, "bytes": head["bytes"]}
            if head["verify"]:  # of the one tensor `w`, four numbers in fp32
                held = os.pread(message.file, 16, 0) if version < settings.get("wrong", 2**31) else b"other"
                told["checksums"] = {"w": hashlib.sha256(held).hexdigest()[:16]}
            os.close(message.file)
            send(sock, told)
            continue
        if head["kind"] == "ping":
            misbehave("idle", settings, sock)
            send(sock, {"kind": "pong"})
            continue
        if settings.get("diverges"):
            send(sock, {"kind": "diverged", "error": "the logits are not finite"})
            continue
        time.sleep(settings.get("pause_s", 0.0))
        of_step = head["sampling"]["num_samples"] == 2
        assert head["inflight"] == (settings["inflight"] if of_step else "finish")
        misbehave("sample" if of_step else "beside", settings, sock)
        data = packed(head, version - settings.get("stale", 0))
        if settings.get("phase") == "answer" and not Path(settings["flag"]).exists():
            sock.sendall(struct.pack("<QQ", 30, len(data)) + b"{")  # the beginning of a message
            misbehave("answer", settings, sock)
        send(sock, {"kind": "groups", "rejected": 0}, data)


main()
