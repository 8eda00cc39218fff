"""What a trainer takes from the process of a worker."""

from __future__ import annotations

import socket
import time
from collections import deque

import pytest
import torch

from llmtrain.rollout.channel import Cut, send
from llmtrain.rollout.process import Worker
from llmtrain.rollout.shared_weights import share


def test_weights_that_are_loaded_late_are_compared_with_what_was_sent_then() -> None:
    """A worker that answers just before it loads weights may be sent newer ones before it has said so."""
    worker = Worker.__new__(Worker)
    worker.sock, other = socket.socketpair()
    worker.deadline_s, worker.checksums, worker.load_s, worker.loaded_bytes = 10.0, deque(), 0.0, 0
    sent = [share([("w", torch.full((2,), float(v)))], v, torch.float32, verify=True) for v in (1, 2)]
    with worker.sock, other:
        for weights in sent:
            worker.give(weights)
        for weights in sent:
            said = {"version": weights.version, "load_s": 0.1, "bytes": 8, "checksums": weights.checksums}
            send(other, {"kind": "loaded", **said})
            assert worker._received(time.monotonic() + 10, 1.0) is None and worker.held == weights.version
        send(other, {"kind": "loaded", **said})
        with pytest.raises(Cut, match="that nobody sent"):
            worker._received(time.monotonic() + 10, 1.0)
