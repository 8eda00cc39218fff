"""`llmtrain` as it is, with accidents: run under torchrun with the arguments of `llmtrain`.

ACCIDENTS is a JSON list of {"attempt", "rank", "at", "count"}: the count-th time this rank is at that point, in that
attempt of torchrun, it is killed, or stopped with "signal". The points: `batch` (a microbatch's forward: accumulation),
`write` (a chunk of a checkpoint's file), `publish` (before the rename), `prune` (after it), `log` (before a metrics
line); `random`: after `count` milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable

from llmtrain import cli
from llmtrain.checkpoint import files, save
from llmtrain.engine import tally
from llmtrain.observe import metrics

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
MINE = [a for a in json.loads(os.environ.get("ACCIDENTS", "[]")) if (a["rank"], a["attempt"]) == (RANK, ATTEMPT)]
visits: Counter[str] = Counter()


def happen(accident: dict) -> None:
    os.kill(os.getpid(), signal.Signals[accident.get("signal", "SIGKILL")])


def at(point: str, action: Callable) -> Callable:
    """`action` behind a look at whether this visit is an accident's."""

    def visited(*args: object, **kwargs: object) -> object:
        visits[point] += 1
        for accident in MINE:
            if (accident["at"], accident["count"]) == (point, visits[point]):
                happen(accident)
        return action(*args, **kwargs)

    return visited


def later(accident: dict) -> None:
    time.sleep(accident["count"] / 1000)
    happen(accident)


save._publish, save._prune = at("publish", save._publish), at("prune", save._prune)
save.write_durably = at("write", files.write_durably)
tally.Tally.add = at("batch", tally.Tally.add)
metrics.MetricsFile.write = at("log", metrics.MetricsFile.write)
for accident in MINE:
    if accident["at"] == "random":
        threading.Thread(target=later, args=(accident,), daemon=True).start()

if __name__ == "__main__":
    cli.entry()
