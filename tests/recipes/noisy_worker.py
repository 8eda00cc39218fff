"""Runs `llmtrain` several times with a generator that is noisy on purpose: what it samples from, and the log-probs that
it reports, are those of the weights with random noise on every logit. Runs on one rank with a JSON list of [standard
deviation of the noise, arguments]."""

from __future__ import annotations

import json
import os
import sys

import torch
from torch import Tensor

from llmtrain import cli
from llmtrain.parallel.mesh import shutdown
from llmtrain.rollout.native import NativeGenerator
from llmtrain.trainer import rollouts
from llmtrain.trainer.job import Job

build = rollouts.local_generator


def noisy(std: float) -> None:
    """Makes every generator that is built from now on noisy."""

    def local_generator(job: Job) -> NativeGenerator:
        generator, draw = build(job), torch.Generator().manual_seed(0)
        clean = generator.model.head.forward

        def forward(hidden: Tensor, *others: object) -> Tensor:
            logits = clean(hidden, *others)
            return logits + std * torch.randn(logits.shape, generator=draw)

        generator.model.head.forward = forward
        return generator

    rollouts.local_generator = local_generator


if __name__ == "__main__":
    codes = []
    for number, (std, arguments) in enumerate(json.loads(sys.argv[1])):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        noisy(std)
        codes.append(cli.main(arguments))
        shutdown()
    print(f"exit codes {codes}", flush=True)
    os._exit(max(codes))
