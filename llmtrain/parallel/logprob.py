"""Computes token log-probs and entropies from hidden states, chunk by chunk: full logits never exist.

No other file knows about vocabulary shards. Cross entropy over a sharded vocabulary as in arXiv 1909.08053, 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

from llmtrain.model.heads import LMHead
from llmtrain.parallel.collectives import all_reduce
from llmtrain.types import IGNORE


class ScoringHead(LMHead):
    """Scores labels while holding at most `chunk_tokens` rows of (this rank's part of the) logits.

    With `compiled`, all operations on a chunk's logits are one kernel, but for the forward of a sharded vocabulary,
    which communicates.
    """

    group: ProcessGroup | None
    first_id: int  # first token id of this rank's vocabulary shard
    chunk_tokens: int
    compiled = False

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, temperature: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns log-probs and entropies of the labels, see LMHead. Positions whose label is IGNORE cost nothing."""
        if labels is None:
            assert self.group is None, "whole logits are never assembled from shards"
            return super().forward(hidden)
        flat, wanted = labels.flatten(), labels != IGNORE
        rows = wanted.flatten().nonzero()[:, 0]
        scale = None if temperature is None else (1 / temperature.float()).repeat_interleave(labels.size(1))[rows]
        scores = _TokenScores.apply(
            self.scaled(hidden).flatten(0, 1).index_select(0, rows),
            self.weight,
            flat[rows] - self.first_id,
            scale,
            self.group,
            self.chunk_tokens,
            self.compiled,
            self.softcap,
        )
        return tuple(s.new_zeros(labels.shape).masked_scatter(wanted, s) for s in scores)


def _part(x: Tensor | None, piece: slice) -> Tensor | None:
    return None if x is None else x[piece]


class _TokenScores(torch.autograd.Function):
    """Computes hidden [N, hidden], weight [V / tp, hidden], labels [N] (relative to the shard) -> log-probs, entropies
    [N].

    The backward recomputes the logits of each chunk rather than keeping them, except those of the last chunk, which are
    still in memory when it begins. The gradient of `hidden` is this rank's part of a sum over the group, which the norm
    in front of the head completes.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor | None,
        group: ProcessGroup | None,
        chunk_tokens: int,
        compiled: bool,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty(4, hidden.size(0), device=hidden.device)
        logits = None
        score_chunk = _fused(_score_chunk) if compiled and group is None else _score_chunk
        for start in range(0, hidden.size(0), chunk_tokens):
            piece = slice(start, start + chunk_tokens)
            logits = None  # freed before the next are computed
            logits = hidden[piece] @ weight.t()
            out[:, piece] = score_chunk(logits, _part(scale, piece), labels[piece], group, softcap)
        logp, entropy, normalizer, left = out
        ctx.save_for_backward(hidden, weight, labels, scale, normalizer.clone(), left.clone())
        ctx.kept = logits if any(ctx.needs_input_grad) else None
        ctx.chunk_tokens, ctx.compiled, ctx.softcap = chunk_tokens, compiled, softcap
        entropy = entropy.clone()
        ctx.mark_non_differentiable(entropy)
        return logp.clone(), entropy

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, scale, normalizer, left = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        gradient_chunk = _fused(_gradient_in_one_pass) if ctx.compiled else _gradient_chunk
        kept, ctx.kept = ctx.kept, None  # a second backward (of a retained graph) recomputes it
        for start in reversed(range(0, hidden.size(0), ctx.chunk_tokens)):
            piece = slice(start, start + ctx.chunk_tokens)
            logits, norm = (hidden[piece] @ weight.t(), normalizer) if kept is None else (kept, left)
            kept = None
            d = gradient_chunk(logits, _part(scale, piece), labels[piece], norm[piece], grad[piece], ctx.softcap)
            grad_hidden[piece] = d @ weight
            grad_weight += d.t() @ hidden[piece]
            del logits, d  # freed before the next are computed
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None


@cache
def _fused(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiles a kernel into one pass over the logits instead of one for each operation."""
    return torch.compile(kernel, dynamic=True)  # the last chunk has another length


def _scaled(logits: Tensor, scale: Tensor | None, softcap: float | None) -> Tensor:
    logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if scale is None else logits * scale[:, None]


def _gradient_chunk(
    logits: Tensor, scale: Tensor | None, labels: Tensor, normalizer: Tensor, grad: Tensor, softcap: float | None
) -> Tensor:
    """Returns the gradient of the logits before capping and scaling, in their dtype.

    d logp / d (scaled logits) = onehot - softmax.
    """
    d = _scaled(logits, scale, softcap).sub_(normalizer[:, None]).exp_().neg_()
    target, mine = _local_target(labels, logits.size(1))
    d.scatter_add_(1, target[:, None], mine[:, None].float())
    d.mul_((grad if scale is None else grad * scale)[:, None])
    if softcap is not None:
        d.mul_(1 - torch.tanh(logits.float() / softcap).square())
    return d.to(logits.dtype)


def _gradient_in_one_pass(
    logits: Tensor, scale: Tensor | None, labels: Tensor, normalizer: Tensor, grad: Tensor, softcap: float | None
) -> Tensor:
    """Computes `_gradient_chunk` in a form for the compiler, and writes it over the logits.

    A scatter would split it into three kernels, with an fp32 copy between them.
    """
    scaled = _scaled(logits, scale, softcap)
    chosen = torch.arange(logits.size(1), device=logits.device) == labels[:, None]  # another shard's label: nowhere
    d = (chosen.float() - (scaled - normalizer[:, None]).exp()) * (grad if scale is None else grad * scale)[:, None]
    if softcap is not None:
        d = d * (1 - torch.tanh(logits.float() / softcap).square())
    return logits.copy_(d)


def _local_target(labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the label's index in the shard, and whether the label lies in it."""
    return labels.clamp(0, rows - 1), (labels >= 0) & (labels < rows)


def _score_chunk(
    logits: Tensor, scale: Tensor | None, labels: Tensor, group: ProcessGroup | None, softcap: float | None
) -> Tensor:
    """Returns [4, n]: log-prob of the label, entropy, log of the normalizer, and that of `logits` as this call leaves
    them.

    fp32 logits that are neither scaled nor capped are shifted by their maximum in place. Compiled, they are left
    unchanged: there the shifted logits are never written to memory.
    """
    compiled = torch.compiler.is_compiling()
    in_place = logits.dtype == torch.float32 and scale is None and softcap is None and not compiled
    logits = _scaled(logits, scale, softcap)
    top = logits.amax(-1)
    if group is not None:
        top = all_reduce(top, group, "max")
    shifted = logits - top[:, None] if compiled else logits.sub_(top[:, None])
    target, mine = _local_target(labels, logits.size(1))
    chosen = shifted.gather(1, target[:, None])[:, 0] * mine
    exp = shifted.exp()
    total = exp.sum(-1)
    sums = torch.stack([total, exp.mul_(shifted).sum(-1), chosen])
    if group is not None:
        sums = all_reduce(sums, group)
    total, weighted, chosen = sums
    log_total = total.log()
    normalizer = log_total + top
    left = log_total if in_place else normalizer
    return torch.stack([chosen - log_total, log_total - weighted / total, normalizer, left])
