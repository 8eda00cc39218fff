"""Computes token log-probs and entropies from hidden states, chunk by chunk: full logits never exist. Beside the label
a position may have candidates, whose log-probs are wanted too, or ask for its likeliest tokens.

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
from llmtrain.parallel.collectives import all_gather, all_reduce
from llmtrain.types import IGNORE


class ScoringHead(LMHead):
    """Scores labels while holding at most `chunk_tokens` rows of (this rank's part of the) logits.

    With `compiled`, all operations on a chunk's logits are one kernel, but for the forward of a sharded vocabulary,
    which communicates, and for candidates.
    """

    group: ProcessGroup | None
    first_id: int  # first token id of this rank's vocabulary shard
    chunk_tokens: int
    compiled = False

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        temperature: Tensor | None = None,
        candidates: Tensor | None = None,
        top_k: int = 0,
    ) -> Tensor | tuple[Tensor, ...]:
        """Returns log-probs and entropies of the labels, and what is asked of candidates, see LMHead. Positions whose
        label is IGNORE cost nothing. The log-probs of the `top_k` likeliest tokens have no gradient."""
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
            None if candidates is None else candidates.flatten(0, 1)[rows] - self.first_id,
            top_k,
            self.first_id,
        )
        return tuple(_spread(s, wanted) for s in scores)


def _spread(x: Tensor, wanted: Tensor) -> Tensor:
    """Returns [B, T, ...] with the entries of `x` [N, ...] where `wanted` [B, T] is True, in order, and 0 elsewhere."""
    there = wanted.view(*wanted.shape, *[1] * (x.dim() - 1)).expand(*wanted.shape, *x.shape[1:])
    return x.new_zeros(there.shape).masked_scatter(there, x)


def _part(x: Tensor | None, piece: slice) -> Tensor | None:
    return None if x is None else x[piece]


class _TokenScores(torch.autograd.Function):
    """Computes hidden [N, hidden], weight [V / tp, hidden], labels [N] (relative to the shard) -> log-probs, entropies
    [N], and the log-probs [N, K] of candidates [N, K] (relative to the shard), or of the `top_k` likeliest tokens with
    their ids, of which `first_id` is the shard's first.

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
        candidates: Tensor | None,
        top_k: int,
        first_id: int,
    ) -> tuple[Tensor, ...]:
        N, K = hidden.size(0), top_k if candidates is None else candidates.size(1)
        out, among = torch.empty(4, N, device=hidden.device), torch.empty(N, K, device=hidden.device)
        ids = torch.empty(N, top_k, dtype=torch.int64, device=hidden.device)
        logits = None
        score_chunk = _fused(_score_chunk) if compiled and group is None else _score_chunk
        for start in range(0, hidden.size(0), chunk_tokens):
            piece = slice(start, start + chunk_tokens)
            logits = None  # freed before the next are computed
            logits = hidden[piece] @ weight.t()
            out[:, piece] = score_chunk(logits, _part(scale, piece), labels[piece], group, softcap)
            if candidates is not None:
                chosen = _chosen(logits, candidates[piece], _part(scale, piece), out[3, piece], softcap)
                among[piece] = chosen if group is None else all_reduce(chosen, group)
            elif top_k:
                best, ids[piece] = _likeliest(logits, top_k, group, first_id)
                among[piece] = _scaled(best, _part(scale, piece), softcap) - out[3, piece, None]
        logp, entropy, normalizer, left = out
        ctx.save_for_backward(hidden, weight, labels, scale, normalizer.clone(), left.clone(), candidates)
        ctx.kept = logits if any(ctx.needs_input_grad) else None
        ctx.chunk_tokens, ctx.compiled, ctx.softcap = chunk_tokens, compiled, softcap
        entropy = entropy.clone()
        scores = (logp.clone(), entropy, *([among] if K else []), *([ids] if top_k else []))
        ctx.mark_non_differentiable(entropy, *(scores[2:] if top_k else []))
        return scores

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad: Tensor, _: Tensor, grad_among: Tensor | None = None, *ids: None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, scale, normalizer, left, candidates = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        fused = ctx.compiled and candidates is None
        gradient_chunk = _fused(_gradient_in_one_pass) if fused else _gradient_chunk
        kept, ctx.kept = ctx.kept, None  # a second backward (of a retained graph) recomputes it
        for start in reversed(range(0, hidden.size(0), ctx.chunk_tokens)):
            piece = slice(start, start + ctx.chunk_tokens)
            logits, norm = (hidden[piece] @ weight.t(), normalizer) if kept is None else (kept, left)
            kept = None
            of_label = (_part(scale, piece), labels[piece], norm[piece], grad[piece], ctx.softcap)
            asked = () if candidates is None else (candidates[piece], grad_among[piece])
            d = gradient_chunk(logits, *of_label, *asked)
            grad_hidden[piece] = d @ weight
            grad_weight += d.t() @ hidden[piece]
            del logits, d  # freed before the next are computed
        return grad_hidden, grad_weight.to(weight.dtype), *[None] * 9


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
    logits: Tensor,
    scale: Tensor | None,
    labels: Tensor,
    normalizer: Tensor,
    grad: Tensor,
    softcap: float | None,
    candidates: Tensor | None = None,
    grad_among: Tensor | None = None,
) -> Tensor:
    """Returns the gradient of the logits before capping and scaling, in their dtype.

    d logp / d (scaled logits) = onehot - softmax, of the label as of each candidate. The candidates of a position are
    distinct, and are added after the label: each sum has one order, on a GPU too.
    """
    total = grad if grad_among is None else grad + grad_among.sum(1)
    d = _scaled(logits, scale, softcap).sub_(normalizer[:, None]).exp_().mul_(-total[:, None])
    target, mine = _local_target(labels, logits.size(1))
    d.scatter_add_(1, target[:, None], (grad * mine)[:, None])
    if candidates is not None:
        targets, mine = _local_target(candidates, logits.size(1))
        d.scatter_add_(1, targets, grad_among * mine)
    if scale is not None:
        d.mul_(scale[:, None])
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


def _chosen(
    logits: Tensor, candidates: Tensor, scale: Tensor | None, normalizer: Tensor, softcap: float | None
) -> Tensor:
    """Returns the log-probs [n, K] of the candidates that lie in this rank's shard, 0 for the others."""
    targets, mine = _local_target(candidates, logits.size(1))
    return (_scaled(logits.gather(1, targets), scale, softcap) - normalizer[:, None]) * mine


def _likeliest(logits: Tensor, top_k: int, group: ProcessGroup | None, first_id: int) -> tuple[Tensor, Tensor]:
    """Returns the logits of the `top_k` likeliest tokens of the whole vocabulary, the largest first, and their ids,
    [n, top_k] each. Softcap and temperature do not change the order."""
    best, ids = logits.topk(min(top_k, logits.size(1)), 1)
    ids = ids + first_id
    if group is None:
        return best, ids
    best, places = all_gather(best, 1, group).topk(top_k, 1)
    return best, all_gather(ids, 1, group).gather(1, places)


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
