"""The seam between trainers and whatever samples completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from llmtrain.types import Prompt, Rollout, Sampling


class Generator(Protocol):
    """Tokens in, tokens out."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """`num_samples` rollouts a prompt, in the order of the prompts."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights (canonical names); later rollouts carry `version`."""

    def sleep(self) -> None:
        """Free what is only needed to generate (the cache)."""

    def wake(self) -> None:
        """Undo `sleep`."""
