"""Defines the contracts between trainers and training backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from llmtrain.config.schema import OptimConfig
from llmtrain.model.decoder import Decoder
from llmtrain.types import Address, Batch, Fragment, Metrics, Scores, StepStats

LossFn = Callable[[Scores, Batch], tuple[Tensor, Metrics]]
"""Returns (masked sum over tokens, sequences or pairs; metrics). It is given whole rows, under context parallelism too:
each of those ranks computes the same loss, and the engine keeps the gradient of the rank's own part."""

Admit = Callable[[float, list[int]], bool]
"""Maps (loss, ranks whose loss is not finite, or else those that see such a gradient) to whether the update is made. It
is called before every update, on all ranks with the same values, and must answer the same on all."""

FragmentReader = Callable[[Address], dict[str, Tensor]]
"""Maps an address to the flat fp32 tensors of that piece: `weight` and the optimizer's keys."""


class Scorer(Protocol):
    """Scores batches with a model that is spread over the ranks of a mesh; every rank makes the same calls.

    Models that take turns on one device wait on the host in between: `to_host` and `to_device` move everything they
    hold, in place and bit for bit. While a model is away every other call raises RuntimeError.
    """

    parts: list[Decoder]  # this rank's pipeline stages

    def score(self, microbatches: Sequence[Batch]) -> list[Scores]:
        """Returns the scores of each microbatch, without gradient; the same on every pipeline stage."""

    def to_host(self) -> None:
        """Moves what this rank holds into host memory and frees the device's; nothing happens when it is there."""

    def to_device(self) -> None:
        """Moves it back; nothing happens when it is there."""


class Engine(Scorer, Protocol):
    """Trains a model, a whole step at a time: accumulation, averaging, clipping over all axes, precision, pipeline
    schedule."""

    optim: OptimConfig
    step: int  # updates made
    total_steps: int  # updates that the schedule is laid out for
    admit: Admit  # by default tally.stop_if_not_finite

    def train_step(
        self, microbatches: Sequence[Batch], loss: LossFn, denominator: Tensor, position: int | None = None
    ) -> StepStats:
        """Takes one optimizer step on this data-parallel rank's microbatches (equal number and shape on all ranks).

        The gradient is that of sum over all ranks of `loss` / `denominator` (already global). The learning rate is that
        of update number `position` of the schedule, counted from 0; None: of as many as were made. Without `admit`'s
        leave weights and optimizer state stay as they are, the gradient is dropped, and the norm in StepStats is NaN.
        """

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (canonical name, whole tensor) one at a time, in a fixed order, on every rank (a collective)."""

    def fragments(self) -> Iterator[Fragment]:
        """Yields what this rank owns; over all ranks every element exactly once. No communication.

        The tensors may be views of the live state: they hold until the next step.
        """

    def load_fragments(self, read: FragmentReader, step: int) -> None:
        """Fills weights and optimizer state from `read` and goes on at `step`."""

    def extra_state(self) -> dict[str, float]:
        """Returns what a checkpoint must hold beside the fragments, the same on all ranks (the fp16 loss scale); else
        empty."""

    def load_extra_state(self, state: dict[str, float]) -> None:
        """Goes on with what `extra_state` of any engine gave."""

    def replicas(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yields (group of `Mesh.groups`, canonical name, tensor): weights of which every rank of that group holds the
        same bits, as long as all is well; in the same order on all of them. No communication."""
