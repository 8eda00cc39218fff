"""Records which experts a model chooses while it generates, so that the update can use the same ones (rollout routing
replay, arXiv 2510.11370).

A sample holds them as [tokens, layers with experts x top_k], uint8 (int16 with more than 256 experts), for each token
that was an input: those of the prompt and all that were sampled but the last.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtrain.model.decoder import Decoder, routed_layers

SMALL = 256  # experts that uint8 tells apart


def dtype_of(num_experts: int) -> torch.dtype:
    """Returns the dtype in which a sample holds experts."""
    return torch.uint8 if num_experts <= SMALL else torch.int16


class ChosenExperts:
    """Notes the choices of all routers of a model, in the order of its layers, from forward to forward."""

    def __init__(self, model: Decoder) -> None:
        layers = routed_layers(model.config)
        assert layers, "a model with experts"
        self.dtype = dtype_of(model.config.moe.num_experts)
        self.noted: list[Tensor] = []
        for name in layers:
            model.layers[name].feedforward.router.register_forward_hook(self._note)

    def _note(self, router: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        self.noted.append(output[0])

    def take(self, rows: int) -> Tensor:
        """Returns those of the last forward, of so many rows, [rows, T, layers with experts x top_k] in host memory,
        and forgets them."""
        chosen = torch.cat(self.noted, -1)
        self.noted.clear()
        return chosen.to(self.dtype).cpu().unflatten(0, (rows, -1))
