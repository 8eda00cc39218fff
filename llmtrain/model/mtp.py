"""Implements multi-token prediction (arXiv 2412.19437, section 2.2): module d = 1, 2, ... behind the decoder predicts
the token d places after the next one, from the hidden states of module d - 1 and the embedding of the token d places
on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import View
from llmtrain.model.linear import Linear
from llmtrain.model.norm import hidden_norm
from llmtrain.types import IGNORE


class Rows(NamedTuple):
    """Holds what of a microbatch is trained, as in `types.Batch`."""

    ids: Tensor  # [B, T]
    labels: Tensor  # [B, T]
    segment_ids: Tensor | None  # [B, T]

    def following(self, depth: int) -> Tensor:
        """Returns the token `depth` places on, [B, T]; 0 where the row ends before."""
        one = torch.where(self.labels == IGNORE, _shifted(self.ids, 1, 0), self.labels)
        return _shifted(one, depth - 1, 0)

    def targets(self, depth: int) -> Tensor:
        """Returns the label `depth` places on, [B, T], where all labels up to it are trained and of the same segment,
        else IGNORE."""
        labels = self.labels
        for _ in range(depth):
            apart = self.labels == IGNORE
            if self.segment_ids is not None:
                apart = apart | (self.segment_ids != _shifted(self.segment_ids, 1, -1))
            labels = _shifted(labels, 1, IGNORE).masked_fill(apart, IGNORE)
        return labels


def _shifted(x: Tensor, places: int, fill: int) -> Tensor:
    """Returns, at each place of x [B, T], what stands so many `places` on; `fill` where the row ends before."""
    return torch.nn.functional.pad(x[:, places:], (0, min(places, x.size(1))), value=fill)


class Joint(Linear):
    """Projects several inputs, concatenated over their last dim, at once."""

    def forward(self, *parts: Tensor) -> Tensor:
        return super().forward(torch.cat(parts, -1))


class Depth(nn.Module):
    """Computes norm(block(proj [norm(embedding); norm(hidden)])), [B, T, hidden], for the head and the next depth.

    The order of the two inputs, and that the states passed on are the normed ones, is that of the released DeepSeek-V3.
    """

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.hidden_norm = hidden_norm(config)
        self.embed_norm = hidden_norm(config)
        self.proj = Joint(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = block
        self.norm = hidden_norm(config)

    def forward(self, hidden: Tensor, embedded: Tensor, view: View) -> Tensor:
        return self.norm(self.block(self.proj(self.embed_norm(embedded), self.hidden_norm(hidden)), view))


class MultiToken(nn.ModuleDict):
    """Holds the modules of all depths, under the names `0`, `1`, ...

    A decoder returns no loss, so the gradient of theirs is added in the backward of the hidden states that go to the
    head.
    """

    loss_factor: float = 0.0  # multiplies the loss's gradient: 1 / the token loss's denominator, times any loss scale

    def __init__(self, config: ModelConfig, blocks: Sequence[nn.Module]) -> None:
        super().__init__({str(depth): Depth(config, block) for depth, block in enumerate(blocks)})
        self.weight = config.mtp_coef / len(blocks)  # of each depth's loss: the coefficient of their mean
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.sum: Tensor | None = None  # fp32: of -log p over tokens and depths, since the reset
        self.tokens: Tensor | None = None  # int64: number of terms in that sum

    def add(self, loss: Tensor, tokens: Tensor) -> Tensor:
        """Counts a microbatch and returns the gradient of its loss. The backward calls it."""
        self.sum, self.tokens = (loss, tokens) if self.sum is None else (self.sum + loss, self.tokens + tokens)
        return torch.full_like(loss, self.weight * self.loss_factor)

    def attached(
        self,
        hidden: Tensor,
        rows: Rows,
        views: Mapping[str, View],
        embed: Callable[[Tensor], Tensor],
        head: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Returns the hidden states [B, T, hidden] unchanged. Their backward adds the gradient of loss_factor x coef x
        the mean over depths of `losses`.

        The hidden states are normed, as the head takes them; `embed` and `head` are the decoder's own.
        """
        losses, tokens = self.losses(hidden, rows, views, embed, head)
        return _Attached.apply(hidden, torch.stack(losses).sum(), torch.stack(tokens).sum(), self)

    def losses(
        self,
        hidden: Tensor,
        rows: Rows,
        views: Mapping[str, View],
        embed: Callable[[Tensor], Tensor],
        head: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns, for each depth, the sum of -log p of the label `depth` places on, fp32, and how many such labels
        there are. Positions without such a label are seen by no position that has one."""
        losses, tokens = [], []
        for depth, module in enumerate(self.values(), 1):
            assert isinstance(module, Depth)
            hidden = module(hidden, embed(rows.following(depth)), views[module.block.kind])
            targets = rows.targets(depth)
            losses.append(-head(hidden, targets)[0].sum())
            tokens.append((targets != IGNORE).sum())
        return losses, tokens


class _Attached(torch.autograd.Function):
    """Passes hidden states and their gradient on, and gives `loss` the gradient that `MultiToken.add` returns."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, loss: Tensor, tokens: Tensor, modules: MultiToken) -> Tensor:
        ctx.save_for_backward(loss, tokens)
        ctx.modules = modules
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return grad, ctx.modules.add(*ctx.saved_tensors), None, None
