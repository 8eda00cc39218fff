"""Balances the load of experts: counts what each gets, adds auxiliary losses, updates the router's bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from llmtrain.config.schema import MoeConfig


class Routing(NamedTuple):
    """Holds what a router did with B rows of T tokens."""

    logits: Tensor  # fp32 [B, T, E]
    counts: Tensor  # int64 [B, E]: (token, slot) pairs that went to each expert, padding left out
    tokens: Tensor  # int64 [B]: number of tokens that are no padding
    valid: Tensor  # bool [B, T]: True = no padding

    @classmethod
    def of(cls, logits: Tensor, indices: Tensor, rows: int) -> Routing:
        """Counts the routing from logits [B T, E] and the chosen experts [B T, k], where E stands for none."""
        experts, k = logits.size(1), indices.size(1)
        chosen = indices.view(rows, -1)
        counts = torch.zeros(rows, experts + 1, dtype=torch.int64, device=indices.device)
        counts = counts.scatter_add_(1, chosen, torch.ones_like(chosen))[:, :experts]
        valid = chosen[:, ::k] < experts
        return cls(logits.view(rows, -1, experts), counts, valid.sum(1), valid)


def shares(logits: Tensor, gate: str) -> Tensor:
    """Returns the scores [..., E] of each token as shares that sum to 1: those of a sigmoid gate are divided by their
    sum (arXiv 2412.19437, equation 19)."""
    if gate == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)


def losses(routing: Routing, config: MoeConfig) -> tuple[Tensor, Tensor]:
    """Returns (auxiliary loss, z-loss), each the sum over rows of its sum over tokens, fp32.

    The auxiliary loss (arXiv 2101.03961, equations 4 to 6; 2412.19437, 17 to 20) is taken for each row alone, so that
    neither the batch nor the ranks around it change it: n sum_i f_i P_i with n tokens, P_i the mean share of expert i
    and f_i = E / (k n) times the tokens that chose it; it is n at perfect balance. The z-loss (arXiv 2202.08906,
    equation 5) is logsumexp(logits)^2.
    """
    share = shares(routing.logits, config.gate)
    aux = (_load_factors(routing, config) * share).sum(-1)
    z = routing.logits.logsumexp(-1).square()
    return (aux * routing.valid).sum(), (z * routing.valid).sum()


def _load_factors(routing: Routing, config: MoeConfig) -> Tensor:
    """Returns f_i of `losses`, [B, 1, E]."""
    even = routing.tokens.clamp(min=1) * config.top_k / config.num_experts
    return (routing.counts / even[:, None])[:, None]


def loss_gradient(routing: Routing, config: MoeConfig) -> Tensor:
    """Returns the gradient of aux_coef x auxiliary loss + z_coef x z-loss by the logits, [B, T, E]; f_i is constant."""
    grad = torch.zeros_like(routing.logits)
    if "aux" in config.balance:
        share, factors = shares(routing.logits, config.gate), _load_factors(routing, config)
        slope = share * (factors - (factors * share).sum(-1, keepdim=True))
        if config.gate == "sigmoid":
            slope = slope * (1 - routing.logits.sigmoid())
        grad += config.aux_coef * slope
    if config.z_coef:
        z = routing.logits.logsumexp(-1, keepdim=True)
        grad += config.z_coef * 2 * z * (routing.logits - z).exp()
    return grad * routing.valid[..., None]


class RouterCounts:
    """Counts what a router did since the last `reset`, and says how much of its losses the backward adds.

    It counts in the backward: once for each microbatch that is trained, rematerialised or not, and never for one that
    is only scored.
    """

    loss_factor: float = 0.0  # multiplies the losses' gradient: 1 / the token loss's denominator, times any loss scale
    tp_ranks: int = 1  # number of ranks that compute the same tokens, and over which the router's gradient is summed
    row_sum: Callable[[Tensor], Tensor] | None = None  # sums over the ranks that hold parts of the same rows
    travels = False  # True = tokens go to experts of other ranks, so `computed` is counted apart from `load`

    def __init__(self, config: MoeConfig) -> None:
        self.config = config
        number = next(_numbers)
        self.handle = torch.tensor(number, device="cpu")  # also within `torch.device("meta")`
        ROUTER_COUNTS[number] = self
        self.load: Tensor | None = None  # int64 [E]: tokens that each expert got; None = nothing was trained
        self.tokens: Tensor | None = None  # int64: routed ones, each of which takes top_k experts
        self.losses: Tensor | None = None  # fp32 [2]: sums of `losses`
        self.computed: Tensor | None = None  # int64: rows that the experts of this rank computed, if it `travels`

    def __deepcopy__(self, memo: dict[int, Any]) -> RouterCounts:
        """Returns empty counts with the same settings: what a copy of the module does is counted by itself."""
        copied = RouterCounts(self.config)
        copied.loss_factor, copied.tp_ranks, copied.row_sum = self.loss_factor, self.tp_ranks, self.row_sum
        copied.travels = self.travels
        return copied

    def reset(self) -> None:
        """Forgets what was counted."""
        self.load = self.tokens = self.losses = self.computed = None

    def watch(self, y: Tensor, rows: Tensor) -> None:
        """Counts, in the backward of the experts' output `y`, the `rows` (int64) that this rank's experts computed."""
        if y.requires_grad:
            y.register_hook(lambda _: self._compute(rows))

    def _compute(self, rows: Tensor) -> None:
        self.computed = rows if self.computed is None else self.computed + rows

    @torch.no_grad()
    def add(self, logits: Tensor, indices: Tensor, rows: int) -> Tensor:
        """Counts a microbatch, given as to `Routing.of`; returns what its losses add to the gradient of the logits."""
        routing = Routing.of(logits, indices, rows)
        load, tokens = routing.counts.sum(0), routing.tokens.sum()
        if self.row_sum is not None:
            routing = routing._replace(counts=self.row_sum(routing.counts), tokens=self.row_sum(routing.tokens))
        both = torch.stack(losses(routing, self.config))
        if self.load is None:
            self.load, self.tokens, self.losses = load, tokens, both
        else:
            self.load, self.tokens, self.losses = self.load + load, self.tokens + tokens, self.losses + both
        if not self.loss_factor:
            return torch.zeros_like(logits)
        return loss_gradient(routing, self.config).view_as(logits) * (self.loss_factor / self.tp_ranks)


ROUTER_COUNTS: WeakValueDictionary[int, RouterCounts] = WeakValueDictionary()
_numbers = count()


def counted(weights: Tensor, logits: Tensor, indices: Tensor, rows: int, router_counts: RouterCounts) -> Tensor:
    """Returns the weights [B T, k] unchanged; their backward updates the counts and adds the losses' gradient."""
    return count_backward(weights, logits, indices, router_counts.handle, rows)


# A compiler sees the counts of a router as a number in a tensor: one graph serves all layers, whatever they hold.


@torch.library.custom_op("llmtrain::count_backward", mutates_args=())
def count_backward(weights: Tensor, logits: Tensor, indices: Tensor, handle: Tensor, rows: int) -> Tensor:
    """Returns the weights; see `counted`."""
    return weights.clone()


@torch.library.custom_op("llmtrain::count_routing", mutates_args=())
def count_routing(grad: Tensor, logits: Tensor, indices: Tensor, handle: Tensor, rows: int) -> Tensor:
    """Returns `RouterCounts.add` of the one whose number is `handle`. `grad` is not read, but what depends on it stays
    in the backward: a compiler could otherwise move it into the forward, which rematerialisation runs twice."""
    return ROUTER_COUNTS[int(handle)].add(logits, indices, rows)


@count_backward.register_fake
def _(weights: Tensor, logits: Tensor, indices: Tensor, handle: Tensor, rows: int) -> Tensor:
    return torch.empty_like(weights)


@count_routing.register_fake
def _(grad: Tensor, logits: Tensor, indices: Tensor, handle: Tensor, rows: int) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.rows = inputs[4]


def _backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return grad, count_routing(grad, *ctx.saved_tensors, ctx.rows), None, None, None


count_backward.register_autograd(_backward, setup_context=_save)


# After the backward of all microbatches


def update_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """Returns the bias [E] after a step of loss-free balance (arXiv 2408.15664, algorithm 1).

    The bias of an expert that got more than its share of `load`, int64 [E], falls by `rate`; that of one that got less
    rises. The comparison is exact.
    """
    return bias + rate * torch.sign(load.sum() - load * load.numel()).to(bias.dtype)


def balance_metrics(
    loads: Mapping[str, Tensor], computed: Mapping[str, Tensor], tokens: Mapping[str, Tensor], top_k: int
) -> dict[str, float]:
    """Returns for each layer the largest load over the mean load (1 = even), the entropy of the load over that of an
    even one (1 = even), and the share of choices that no expert computed.

    Example: loads {"2": [6, 2]}, computed {"2": 8}, tokens {"2": 4}, top_k 2 -> {"load_max.2": 1.5,
    "load_entropy.2": 0.81, "load_dropped.2": 0.0}
    """
    found: dict[str, float] = {}
    for layer, load in loads.items():
        share = load.double() / load.sum().clamp(min=1)
        entropy = -torch.special.xlogy(share, share).sum() / torch.log(torch.tensor(float(max(2, load.numel()))))
        wanted = int(tokens[layer]) * top_k
        found[f"load_max.{layer}"] = float(share.max() * load.numel())
        found[f"load_entropy.{layer}"] = float(entropy)
        found[f"load_dropped.{layer}"] = 1 - int(computed[layer]) / wanted if wanted else 0.0
    return found
