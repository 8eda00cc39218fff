"""Records which part of which global tensor a parameter of this rank is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from llmtrain.arch.mup import lr_factor
from llmtrain.model.decoder import Decoder
from llmtrain.types import Address


@dataclass
class Placement:
    """Describes a parameter of a parallel model; it is the parameter's attribute `placement`.

    Example: rows 2-3 of the head, on the second of two tensor-parallel ranks:
        Placement("head.weight", (4, 8), tp_dim=0, cut=(1, 2))
    """

    name: str  # canonical, as in a Decoder in one process
    global_shape: tuple[int, ...]
    tp_dim: int | None = None  # the dimension that is divided among ranks; None = every rank has it whole
    cut: tuple[int, int] = (0, 1)  # (number of this rank's piece, number of pieces) along tp_dim
    expert: bool = False  # of experts that are divided among expert-parallel ranks
    is_copy: bool = False  # the second copy of a tied embedding, on the last pipeline stage
    lr_factor: float = 1.0  # muP's factor of the learning rate

    def address(self, start: int, numel: int) -> Address:
        """Returns where a piece of this rank's flattened parameter lies."""
        return Address(self.name, self.global_shape, self.tp_dim, *self.cut, start, numel)


def place(part: Decoder, shapes: dict[str, tuple[int, ...]]) -> None:
    """Gives every parameter of a pipeline stage its placement before it is divided. `shapes` are those of the whole
    model."""
    for name, p in part.named_parameters():
        tied = name == "head.weight" and part.config.tie_embeddings
        assert tied or name in shapes, f"{name}: no parameter of the whole model"
        origin = "embed.weight" if tied else name
        factor = lr_factor(origin, shapes[origin], part.config)
        p.placement = Placement(origin, shapes[origin], is_copy=tied, lr_factor=factor)


def copy_placement(source: nn.Parameter, target: nn.Parameter) -> None:
    """Gives a parameter the placement of the one that it replaces."""
    target.placement = replace(source.placement)
