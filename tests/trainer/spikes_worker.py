"""Pretrains several times in one process, on data of which some steps' worth is poisoned.

Arguments: the configuration and a JSON list of runs, each {"dir", "set": [overrides], "poison": {data step: factor},
"jump": [step, data steps] (data that the order leaves out from a step on), "die": [step, visit] (an exception at the
n-th time the run is there)}. Prints one JSON line a run: what it raised.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import torch

from llmtrain.config.load import load
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import shutdown
from llmtrain.recipes import pretrain
from llmtrain.recipes.pretrain import phase_batches
from tests.json_output import print_json


class Interrupted(Exception):
    """Stands for a kill."""


def run(config_path: str, spec: dict) -> str:
    poison = {int(step): float(factor) for step, factor in spec.get("poison", {}).items()}
    jump_at, jump = spec.get("jump", (0, 0))
    current, visits = {"factor": 1.0}, Counter()

    def batches(rows: object, phase: object, step: int, skipped: int, *rest: object) -> list:
        visits[step] += 1
        if spec.get("die") == [step, visits[step]]:
            raise Interrupted
        skipped += phase.tokens_per_step * (jump if step >= jump_at else 0)
        current["factor"] = poison.get(step + skipped // phase.tokens_per_step, 1.0)
        return phase_batches(rows, phase, step, skipped, *rest)

    def loss(scores: tuple, batch: object) -> tuple:
        total, metrics = token_loss(scores, batch)
        return total * current["factor"], metrics

    pretrain.phase_batches, pretrain.token_loss = batches, loss
    try:
        pretrain.main(load(config_path, [f"run_dir={spec['dir']}", *spec.get("set", [])]))
        return ""
    except (FloatingPointError, Interrupted) as error:
        shutdown()
        return str(error) or type(error).__name__


def main() -> None:
    torch.set_num_threads(1)
    for spec in json.loads(sys.argv[2]):
        print_json({"dir": spec["dir"], "raised": run(sys.argv[1], spec)})


if __name__ == "__main__":
    main()
