"""Runs `llmtrain` several times, one after the other, by the same ranks: starting them costs more than a small run
takes. Runs on several ranks with a JSON list of lists of arguments; put one that fails last. Rank 0 prints the exit
codes."""

from __future__ import annotations

import json
import os
import sys

from llmtrain import cli
from llmtrain.parallel.mesh import shutdown

if __name__ == "__main__":
    codes = []
    for number, arguments in enumerate(json.loads(sys.argv[1])):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # as after a restart: the store keeps the old keys
        codes.append(cli.main(arguments))
        shutdown()
    if os.environ["RANK"] == "0":  # lines of several ranks may run into each other
        print(f"exit codes {codes}", flush=True)
    os._exit(max(codes))  # see cli.entry
