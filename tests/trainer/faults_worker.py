"""Runs `llmtrain` as it is, with accidents: under torchrun, or alone, with the arguments of `llmtrain`.

ACCIDENTS is a JSON list of {"attempt", "rank", "at", "count"}: the count-th time this rank is at that point, in that
attempt of torchrun, it is killed, or gets "signal", or sleeps "sleep" seconds, or has a bit of its weights flipped
("flip", at `step`). The points: `step` (its begin), `batch` (a microbatch, in the accumulation), `write` (a file of a
checkpoint), `publish` (before the rename), `prune` (after it), `log` (a metrics line); `random`:
`count` ms after the first step began.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable

import torch

from llmtrain import cli
from llmtrain.checkpoint import files, save
from llmtrain.engine import tally
from llmtrain.engine.zero import ZeroEngine
from llmtrain.observe import metrics
from llmtrain.parallel.plan import parameters_of

RANK, ATTEMPT = (int(os.environ.get(name, "0")) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
MINE = [a for a in json.loads(os.environ.get("ACCIDENTS", "[]")) if (a["rank"], a["attempt"]) == (RANK, ATTEMPT)]
visits: Counter[str] = Counter()


def happen(accident: dict, *args: object) -> None:
    print(f"accident {accident}", flush=True)
    if "sleep" in accident:
        return time.sleep(accident["sleep"])
    if "flip" in accident:
        return flip(args[0])
    os.kill(os.getpid(), signal.Signals[accident.get("signal", "SIGKILL")])


def flip(engine: ZeroEngine) -> None:
    p = next(p for p in parameters_of(engine.parts) if p.placement.name == "layers.1.attention_norm.weight")
    p.data.view(torch.int32)[3] ^= 1


def at(point: str, action: Callable) -> Callable:
    """Returns `action` behind a look at whether this visit is an accident's."""

    def visited(*args: object, **kwargs: object) -> object:
        visits[point] += 1
        for accident in MINE:
            if accident["at"] == "random" and (point, visits[point]) == ("step", 1):
                threading.Thread(target=later, args=(accident,), daemon=True).start()
            if (accident["at"], accident["count"]) == (point, visits[point]):
                happen(accident, *args)
        return action(*args, **kwargs)

    return visited


def later(accident: dict) -> None:
    time.sleep(accident["count"] / 1000)
    happen(accident)


ZeroEngine.train_step = at("step", ZeroEngine.train_step)
save._publish, save._prune = at("publish", save._publish), at("prune", save._prune)
save.write_durably = at("write", files.write_durably)
tally.Tally.add = at("batch", tally.Tally.add)
metrics.MetricsFile.write = at("log", metrics.MetricsFile.write)

if __name__ == "__main__":
    cli.entry()
