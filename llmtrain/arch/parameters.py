"""Computes names and shapes of a decoder's parameters, and how tensor parallelism shards each. No torch here.

`model` is a resolved ModelConfig (see `arch.resolve`) everywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache

from llmtrain.arch.families import family_of
from llmtrain.config.schema import ModelConfig

Shape = tuple[int, ...]

# Module name -> kind of tensor parallelism. `column` and `vocab` shard rows of the weight, `row` its columns, `expert`
# whole experts. The others are replicated: `norm` stands in front of sharded matrices, `inner` is a norm elsewhere;
# `replica` computes on activations that differ between the ranks.
PLAN = {
    r"embed": "vocab",
    r"position_embed": "position",
    r"(.*\.)?(attention|feedforward)_norm": "norm",
    r"(.*\.)?(attention|feedforward)_post_norm": "inner",
    r".*\.attention\.(q|k|v|q_b|kv_b)": "column",
    r".*\.attention\.(q_norm|k_norm|q_a|q_a_norm|kv_a|kv_a_norm)": "replica",
    r".*\.attention\.o": "row",
    r".*\.feedforward\.(shared\.)?(gate|up)": "column",
    r".*\.feedforward\.(shared\.)?down": "row",
    r".*\.feedforward\.router": "replica",
    r".*\.feedforward\.experts": "expert",
    r"mtp\.\d+\.hidden_norm": "replica",
    r"mtp\.\d+\.(embed_)?norm": "norm",
    r"mtp\.\d+\.proj": "row",
    r"norm": "norm",
    r"head": "column",
}
TP_DIM = {"vocab": 0, "column": 0, "row": 1, "expert": 0}


@lru_cache(maxsize=8192)
def kind_of(module: str) -> str | None:
    """Returns the kind that `PLAN` gives a module, None if no pattern matches its name."""
    return next((kind for pattern, kind in PLAN.items() if re.fullmatch(pattern, module)), None)


def tp_dim(parameter: str, model: ModelConfig, tp: int) -> int | None:
    """Returns the dimension along which `tp` ranks shard a parameter, None if each holds all of it.

    Raises KeyError for a parameter that `PLAN` does not know.
    """
    module, _, leaf = parameter.rpartition(".")
    adapter, module = module.endswith(".lora"), module.removesuffix(".lora")
    kind = kind_of(module)
    if kind is None:
        raise KeyError(parameter)
    if re.fullmatch(r".*\.attention\.[kv]", module) and model.num_kv_heads % tp:
        return None  # fewer K/V heads than ranks: each rank has them all
    if adapter:  # the product of b [out, rank] and a [rank, in] is cut as the weight is
        return {("column", "b"): 0, ("row", "a"): 1}.get((kind, leaf))
    if parameter == "head.weight" and model.head == "scalar":
        return 1  # its only row has no parts: a rank multiplies its columns with its part of the hidden state
    return None if kind == "row" and leaf == "bias" else TP_DIM.get(kind)


def layer_type(model: ModelConfig, layer: int) -> str:
    """Returns the attention type of a layer: full or sliding."""
    return model.layer_types[layer % len(model.layer_types)] if model.layer_types else "full"


def has_experts(model: ModelConfig, layer: int) -> bool:
    """Returns whether a layer is a mixture of experts."""
    return model.moe is not None and layer not in model.moe.dense_layers


def kinds_of(model: ModelConfig, layers: Iterable[int]) -> list[list[int]]:
    """Returns these layers in up to two lists, with experts and without: the blocks of each have the same shapes."""
    kinds: dict[bool, list[int]] = {}
    for layer in layers:
        kinds.setdefault(has_experts(model, layer), []).append(layer)
    return list(kinds.values())


def layer_shapes(model: ModelConfig, layer: int) -> dict[str, Shape]:
    """Returns the shapes of one block by names relative to it, in module order, those of buffers (a router's bias)
    included."""
    m, h = model, model.hidden_size
    experts = has_experts(m, layer)
    own = family_of(m.family).feedforward_shapes
    parts: dict[str, dict[str, Shape]] = {"attention_norm": _norm(m)}
    if m.block == "sandwich":
        parts["attention_post_norm"] = _norm(m)
    parts["attention"] = _mla(m) if m.attention == "mla" else _gqa(m)
    if m.block != "parallel":
        parts["feedforward_norm"] = _norm(m)
    if m.block == "sandwich":
        parts["feedforward_post_norm"] = _norm(m)
    parts["feedforward"] = own(m) if own else _moe(m) if experts else _ffn(h, m.ffn_size, m.gated, m.ffn_bias)
    return {f"{part}.{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()}


def outer_shapes(model: ModelConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Returns the shapes of what lies before the blocks and of what lies after them; a tied head is left out."""
    m = model
    front: dict[str, Shape] = {"embed.weight": (m.vocab_size, m.hidden_size)}
    if m.positions == "learned":
        front["position_embed.weight"] = (m.max_positions, m.hidden_size)
    behind = {f"norm.{name}": shape for name, shape in _norm(m).items()}
    if not m.tie_embeddings:
        behind["head.weight"] = (head_rows(m), m.hidden_size)
    return front, behind


def head_rows(model: ModelConfig) -> int:
    """Returns how many numbers the head gives at a position: a logit for each token of the vocabulary, or one value."""
    return 1 if model.head == "scalar" else model.vocab_size


def mtp_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Returns the shapes of the multi-token prediction modules by canonical names, in module order."""
    shapes: dict[str, Shape] = {}
    norm, h = _norm(model), model.hidden_size
    for depth in range(model.mtp_layers):
        block = layer_shapes(model, model.num_layers + depth)
        parts = {"hidden_norm": norm, "embed_norm": norm, "proj": {"weight": (h, 2 * h)}, "block": block, "norm": norm}
        own = {f"{part}.{name}": shape for part, found in parts.items() for name, shape in found.items()}
        shapes |= {f"mtp.{depth}.{name}": shape for name, shape in own.items()}
    return shapes


def in_block(name: str) -> bool:
    """Returns whether a canonical parameter belongs to a layer, or to the block in a multi-token prediction module."""
    return name.startswith("layers.") or ".block." in name


def is_block_matrix(name: str, shape: Shape) -> bool:
    """Returns whether a canonical parameter is a matrix of a block, or the matrices [experts, rows, columns] of its
    experts: what Muon updates."""
    experts = len(shape) == 3 and kind_of(name.rpartition(".")[0]) == "expert"
    return in_block(name) and (len(shape) == 2 or experts)


def local_shape(name: str, shape: Shape, model: ModelConfig, tp: int, ep: int = 1) -> Shape:
    """Returns the shape of one rank's shard of a parameter, with `tp` tensor-parallel and `ep` expert-parallel
    ranks."""
    dim = tp_dim(name, model, tp)
    if dim is None:
        return shape
    parts = tp * ep if kind_of(name.rpartition(".")[0]) == "expert" else tp
    return tuple(size // parts if d == dim else size for d, size in enumerate(shape))


def padded_vocab_size(tokens: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `tokens`: rows of an embedding that tp can divide.

    >>> padded_vocab_size(50_257, 128)
    50304
    """
    if tokens < 1 or multiple < 1:
        raise ValueError(f"tokens={tokens}, multiple={multiple}: both must be at least 1")
    return -(-tokens // multiple) * multiple


def numel(shapes: Iterable[Shape]) -> int:
    """Returns the total number of elements of all shapes."""
    return sum(math.prod(shape) for shape in shapes)


def _norm(m: ModelConfig, size: int | None = None) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"weight": (size or m.hidden_size,)}
    return shapes | ({"bias": (m.hidden_size,)} if m.norm == "layer" and m.norm_bias else {})


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _gqa(m: ModelConfig) -> dict[str, Shape]:
    head_dim = m.head_dim or m.hidden_size // m.num_heads
    q, kv, h = m.num_heads * head_dim, m.num_kv_heads * head_dim, m.hidden_size
    shapes = _linear("q", q, h, m.qkv_bias) | _linear("k", kv, h, m.qkv_bias) | _linear("v", kv, h, m.qkv_bias)
    shapes |= _linear("o", h, q, m.o_bias)
    return shapes | ({"q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)} if m.qk_norm else {})


def _mla(m: ModelConfig) -> dict[str, Shape]:
    a, h = m.mla, m.hidden_size
    assert a is not None
    q = m.num_heads * (a.nope_head_dim + a.rope_head_dim)
    if a.q_rank is None:
        shapes = _linear("q", q, h)
    else:
        shapes = _linear("q_a", a.q_rank, h) | {"q_a_norm.weight": (a.q_rank,)} | _linear("q_b", q, a.q_rank)
    shapes |= _linear("kv_a", a.kv_rank + a.rope_head_dim, h) | {"kv_a_norm.weight": (a.kv_rank,)}
    shapes |= _linear("kv_b", m.num_heads * (a.nope_head_dim + a.v_head_dim), a.kv_rank)
    return shapes | _linear("o", h, m.num_heads * a.v_head_dim)


def _ffn(hidden: int, inner: int, gated: bool = True, bias: bool = False) -> dict[str, Shape]:
    shapes = _linear("gate", inner, hidden, bias) if gated else {}
    return shapes | _linear("up", inner, hidden, bias) | _linear("down", hidden, inner, bias)


def _moe(m: ModelConfig) -> dict[str, Shape]:
    e, h = m.moe, m.hidden_size
    assert e is not None
    shapes: dict[str, Shape] = {"router.weight": (e.num_experts, h)}
    if e.selection_bias:
        shapes["router.bias"] = (e.num_experts,)
    wide = (e.num_experts, e.expert_ffn_size, h)
    shapes |= {"experts.gate": wide, "experts.up": wide, "experts.down": (e.num_experts, h, e.expert_ffn_size)}
    shared = _ffn(h, e.shared_ffn_size) if e.shared_ffn_size else {}
    return shapes | {f"shared.{name}": shape for name, shape in shared.items()}
