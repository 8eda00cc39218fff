"""Runs `llmtrain` several times with rollout workers, of which the last may take no weights after the first, and say
that it has the newest. Runs on several ranks with a JSON list of [whether it is so, arguments]."""

from __future__ import annotations

import json
import os
import sys

from llmtrain import cli
from llmtrain.parallel.mesh import shutdown
from llmtrain.rollout.native import NativeGenerator
from llmtrain.trainer import rollouts
from llmtrain.trainer.job import Job
from tests.trainer.verify_test import Stale

build = rollouts.local_generator


def stale(job: Job) -> NativeGenerator:
    """Returns the generator of a rank, on the last worker one that is stale."""
    generator = build(job)
    if job.mesh.rank == job.mesh.size - 1:
        generator.__class__ = Stale
    return generator


if __name__ == "__main__":
    codes = []
    for number, (wrong, arguments) in enumerate(json.loads(sys.argv[1])):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # as after a restart: the store keeps the old keys
        rollouts.local_generator = stale if wrong else build
        codes.append(cli.main(arguments))
        shutdown()
    if os.environ["RANK"] == "0":
        print(f"exit codes {codes}", flush=True)
    os._exit(max(codes))
