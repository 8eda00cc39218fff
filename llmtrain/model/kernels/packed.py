"""Decodes faster on a CPU: weights are kept once more in the layout that oneDNN multiplies with, where products of a
few rows otherwise bring them into it each time; products of one input are one; a norm is one operation.

A model is never changed: `Packed` has a copy of its modules that shares all parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.model.attention import Attention, LayerCache, View
from llmtrain.model.decoder import Decoder
from llmtrain.model.feedforward import FeedForward
from llmtrain.model.heads import LMHead
from llmtrain.model.linear import Linear
from llmtrain.model.norm import Norm
from llmtrain.model.rope import apply_rope

LEAST_WEIGHTS = 2**18  # of a product; below, calling oneDNN takes longer than it saves
FEW_ROWS, PADDED_ROWS = 2, 4  # oneDNN's kernel for one or two rows is 1.1 to 1.3 times as slow as that for four


class Product:
    """Multiplies with the matrices of several modules, one below the other, as oneDNN wants them."""

    def __init__(self, *parts: Linear | LMHead) -> None:
        self.parts = parts
        self.free()

    @property
    def memory_bytes(self) -> int:
        """Returns the bytes that the copy of the weights takes."""
        return 0 if self.weight is None else sum(part.weight.nbytes for part in self.parts)

    def pack(self) -> None:
        """Copies the weights as they are now."""
        weights = [part.weight for part in self.parts]
        biases = [part.bias for part in self.parts if getattr(part, "bias", None) is not None]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weights[0] if len(weights) == 1 else torch.cat(weights))
        self.bias = torch.cat(biases) if biases else None

    def free(self) -> None:
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Returns x weight^T + bias, [..., rows of all parts]."""
        rows = x.flatten(0, -2)
        if len(rows) <= FEW_ROWS:
            rows = torch.cat([rows] * (PADDED_ROWS // len(rows)))
        y = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return y[: x.numel() // x.size(-1)].view(*x.shape[:-1], -1)


class Mirrored:
    """Computes RMSNorm as torch's fused LayerNorm of (x, -x), whose mean is 0 and whose variance is the mean of x^2: on
    a CPU RMSNorm itself is eight operations."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm
        self.free()

    memory_bytes = 0  # of what counts

    def pack(self) -> None:
        self.weight = self.norm.weight.repeat(2)

    def free(self) -> None:
        self.weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        size = x.size(-1)
        return F.layer_norm(torch.cat([x, -x], -1), (2 * size,), self.weight, None, self.norm.eps)[..., :size]


class PackedNorm(Norm):
    packed: Mirrored

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x)


class PackedLinear(Linear):
    packed: Product

    def weighted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.packed(x)


class PackedHead(LMHead):
    packed: Product

    def product(self, hidden: Tensor) -> Tensor:
        return self.packed(hidden)


class PackedAttention(Attention):
    """Projects to queries, keys and values by one product, and rotates queries and keys together."""

    packed: Product

    def forward(self, x: Tensor, view: View, cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x.shape
        heads = self.packed(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        k_heads = self.k.out_features // self.head_dim
        both, v = heads[:, :-k_heads], heads[:, -k_heads:]
        if self.q_norm is None and view.cos is not None and view.sin is not None:
            both = apply_rope(both, view.cos, view.sin, self.interleaved)
            view = view._replace(cos=None, sin=None)
        q, k = self.prepared(both[:, :-k_heads], both[:, -k_heads:], view)
        if cache is not None:
            k, v = cache(k, v)
        return self.o(self.attend(q, k, v, view.mask).transpose(1, 2).reshape(B, T, -1))


class PackedFeedForward(FeedForward):
    """Projects to gate and up by one product."""

    packed: Product

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.packed(x).chunk(2, -1)
        return self.down(self.act(gate) * up)


CLASSES: dict[type[nn.Module], tuple[type[nn.Module], tuple[str, ...]]] = {
    Attention: (PackedAttention, ("q", "k", "v")),
    FeedForward: (PackedFeedForward, ("gate", "up")),
    Linear: (PackedLinear, ()),
    LMHead: (PackedHead, ()),
}
"""Maps plain classes to their packed forms, and to the projections of theirs that become one product."""


class Packed:
    """Holds a model in the form that decodes fastest: `decoder`, a copy of its modules, with the same parameters, in
    which the larger products are packed; the model itself where none gains. It is for inference only."""

    def __init__(self, model: Decoder) -> None:
        self.decoder = packed_modules(model)
        self.operations: list[Product | Mirrored] = [m.packed for m in self.decoder.modules() if "packed" in vars(m)]
        self.parameters = list(model.parameters())
        self.versions: list[int] | None = None  # of the parameters, when they were packed; None = they are not

    @property
    def memory_bytes(self) -> int:
        """Returns the bytes of the packed weights."""
        return sum(operation.memory_bytes for operation in self.operations)

    @torch.no_grad()
    def refreshed(self) -> Decoder:
        """Returns `decoder`, its weights packed anew if any was written to since, by whomever: torch counts that."""
        if self.operations and self.versions != (versions := [p._version for p in self.parameters]):
            for operation in self.operations:
                operation.pack()
            self.versions = versions
        return self.decoder

    def free(self) -> None:
        """Frees the packed weights, until `refreshed`."""
        self.versions = None
        for operation in self.operations:
            operation.free()


def packed_modules(model: Decoder) -> Decoder:
    """Returns what `Packed.decoder` is, with nothing packed yet. Modules of which no part is replaced are the model's
    own, so that a hook on one of them (a router's) is called in both."""
    products = _products(model) if _packs(model.embed.weight) else {}
    if not products:
        return model
    norms = {m for m in model.modules() if type(m) is Norm and m.kind == "rms" and not m.offset}
    kept = (m for m in model.modules() if not any(x in products or x in norms for x in m.modules()))
    decoder = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers(), *kept)})
    for old, new in zip(list(model.modules()), list(decoder.modules()), strict=True):
        if old in products:
            new.__class__, parts = products[old]
            new.packed = Product(*parts)
        elif old in norms:
            new.__class__, new.packed = PackedNorm, Mirrored(old)
    return decoder


def _packs(weight: Tensor) -> bool:
    """Tells whether oneDNN packs weights of this device and dtype: bf16 only on a CPU with AVX-512 or the like."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def _products(model: Decoder) -> dict[nn.Module, tuple[type[nn.Module], list[nn.Module]]]:
    """Returns which modules get which class, and whose weights are their product's. Outer ones come first: what is a
    part of theirs is not replaced itself."""
    found, joined = {}, set[nn.Module]()
    for module in model.modules():
        if type(module) not in CLASSES or module in joined:
            continue
        cls, names = CLASSES[type(module)]
        parts = [getattr(module, name) for name in names] or [module]
        if _gains(parts):
            found[module] = cls, parts
            joined.update(parts)
    return found


def _gains(parts: Sequence[nn.Module | None]) -> bool:
    """Tells whether the modules can be one product, and one that is large enough to gain."""
    if len(parts) > 1 and not all(type(part) is Linear and part.lora is None for part in parts):
        return False
    return sum(part.weight.numel() for part in parts) >= LEAST_WEIGHTS
