"""Defines what every contestant of the pretraining benchmark trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig, OptimConfig
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.types import Batch, WeightSource

OPTIM = OptimConfig(schedule="constant", warmup_steps=0)
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Task:
    """Holds model, batch and number of steps."""

    model: ModelConfig
    seqs: int
    seq_len: int
    total_steps: int
    precision: str  # bf16 or fp32

    @property
    def step_tokens(self) -> int:
        return self.seqs * self.seq_len

    def source(self) -> WeightSource:
        """Returns initial weights by canonical name."""
        shapes = parameter_shapes(self.model)
        return lambda name: init_tensor(name, shapes[name], self.model, seed=0)

    def rows(self) -> Tensor:
        """Returns ids for all steps, [steps x seqs, seq_len + 1].

        Word frequencies are as in text (Zipf), so there is something to learn and the losses show whether everyone
        learns it.
        """
        frequencies = 1.0 / torch.arange(10, self.model.vocab_size + 10)
        count = self.total_steps * self.seqs * (self.seq_len + 1)
        ids = torch.multinomial(frequencies, count, replacement=True, generator=torch.Generator().manual_seed(0))
        return ids.view(-1, self.seq_len + 1)

    def batches(self) -> Iterator[Batch]:
        """Yields one batch for each step."""
        for ids in self.rows().split(self.seqs):
            inputs, positions = ids[:, :-1].contiguous(), torch.arange(self.seq_len).repeat(self.seqs, 1)
            yield Batch(inputs, ids[:, 1:].contiguous(), torch.ones_like(inputs, dtype=torch.bool), positions)
