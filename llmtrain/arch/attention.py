"""States what each attention backend (`engine.attention`) can compute, as far as a configuration tells."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

from llmtrain.arch.parameters import layer_type
from llmtrain.config.schema import ModelConfig

FLASH_WIDTH = 256  # the widest head that FlashAttention 2 has kernels for
FLEX_WIDTH = 16  # the narrowest head that flex attention compiles for
FLEX_TOKENS = 1024  # tokens from which `auto` gives a masked row to flex: shorter rows have few blocks to leave out
# Tokens from which a CPU computes a masked row by tiles: there 1.1 to 1.5 times as fast, with 512 tokens 0.6 to 1.2, so
# that shorter rows keep the numbers they had.
TILE_TOKENS = 1024
FLASH_PRECISIONS = ("bf16", "fp16", "fp8")  # fp8 is for projections only, attention stays bf16


def head_widths(model: ModelConfig) -> tuple[int, int]:
    """Returns the head width of the keys and that of the values."""
    if model.mla is not None:
        return model.mla.nope_head_dim + model.mla.rope_head_dim, model.mla.v_head_dim
    width = model.head_dim or model.hidden_size // model.num_heads
    return width, width


BUCKET_TOKENS = 64  # attended lengths of a KV cache are rounded up to this: few shapes, little masked work


class CacheRow(NamedTuple):
    """Describes what the KV cache keeps of one sequence in one layer: [heads, tokens, key_dim] and values alike."""

    heads: int
    key_dim: int
    value_dim: int  # 0 with latent attention, whose values are in the keys
    tokens: int
    window: int | None  # number of tokens that a token attends to; None = all


def round_up(tokens: int) -> int:
    """Returns the number of tokens, rounded up to a multiple of BUCKET_TOKENS."""
    return -(-tokens // BUCKET_TOKENS) * BUCKET_TOKENS


def cache_row(model: ModelConfig, layer: int, tokens: int) -> CacheRow:
    """Returns what the KV cache keeps of a sequence of at most `tokens`, in a window as many as that is wide."""
    if model.attention == "mla":
        assert model.mla is not None
        return CacheRow(1, model.mla.kv_rank + model.mla.rope_head_dim, 0, tokens, None)
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    window = model.sliding_window if layer_type(model, layer) == "sliding" else None
    places = tokens if window is None else min(round_up(window), tokens)
    return CacheRow(model.num_kv_heads, head_dim, head_dim, places, window)


def flex_faults(model: ModelConfig) -> Iterator[str]:
    """Yields why flex attention cannot compute this model on a GPU, as `rule; remedy`."""
    if min(head_widths(model)) < FLEX_WIDTH:
        width = min(head_widths(model))
        yield f"needs heads of at least {FLEX_WIDTH}, the model has {width}; set sdpa or auto"


def flash_faults(model: ModelConfig, precision: str) -> Iterator[str]:
    """Yields why FlashAttention cannot compute this model on any machine, as `rule; remedy`."""
    keys, values = head_widths(model)
    if keys != values:
        yield f"needs values as wide as keys, attention: mla has {values} and {keys}; set flex, sdpa or auto"
    elif keys > FLASH_WIDTH:
        yield f"has no kernel for heads of {keys}, only up to {FLASH_WIDTH}; set flex, sdpa or auto"
    if precision not in FLASH_PRECISIONS:
        yield f"computes in bf16 or fp16, not engine.precision={precision}; change it, or set flex, sdpa or auto"


def masks_whole_rows(model: ModelConfig, backend: str, tokens: int) -> bool:
    """Tells whether rows with documents or a window have a mask of all their scores: for sdpa, and where `auto` leaves
    them to it. (On a CPU long rows never do. Where flash-attn is installed and takes the model, nor do short ones.)"""
    too_short = tokens < min(FLEX_TOKENS, TILE_TOKENS)
    return backend == "sdpa" or (backend == "auto" and (too_short or any(flex_faults(model))))


def has_flash() -> bool:
    """Returns whether the package flash-attn is installed."""
    return find_spec("flash_attn") is not None
