"""Chooses the attention backend of a batch in training: torch's `scaled_dot_product_attention`, tiles of it, flex
attention (arXiv 2412.05496) or FlashAttention (arXiv 2307.08691). `attend` tells them apart by the type of their mask:

    sdpa    bool [B, 1, T, T], or None = causal. With a mask it computes every score.
    tiles   Tiles: the rectangles of scores that hold anything, on a CPU. Nothing else is computed.
    flex    BlockMask: the rule of visibility, and which blocks of scores hold anything. Empty blocks cost nothing.
    flash   Documents: where each begins. Each document of a row is computed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.arch.attention import FLEX_TOKENS, TILE_TOKENS, flash_faults, flex_faults, has_flash, head_widths
from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import Attention, attention_mask
from llmtrain.model.kernels.flex_masks import block_mask
from llmtrain.model.kernels.sdpa import attention
from llmtrain.model.kernels.tile_plan import Span, Tiles, places_of, plan_tiles, whole_row
from llmtrain.model.kernels.tiles import attend_tiles, tile_side
from llmtrain.model.mla import LatentAttention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLASH_CAPABILITY = (8, 0)


class Documents(NamedTuple):
    """Says where the documents of a batch begin, its rows laid end to end. A document is one run of a row.

    Of a part of the rows' places, each run of neighbours in a document counts as one, with the keys from the
    document's start to the last of the run.
    """

    starts: Tensor  # [documents + 1] int32, the last = the number of queries
    longest: int  # tokens
    window: int | None
    key_starts: Tensor  # [documents + 1] int32
    longest_keys: int
    keys: Tensor | None = None  # [keys], places in the rows laid end to end; None = all


Mask = Tensor | Documents | Tiles  # or a BlockMask, whose module is slow to import


@dataclass(frozen=True)
class Kernels:
    """Holds the backends among which a model chooses for each batch, and what they need of the model."""

    backends: tuple[str, ...]
    softcap: float | None = None
    unfused: bool = False  # sdpa would store the scores of a causal row
    flex: Callable[..., Tensor] | None = None


def set_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Makes a decoder compute attention by these kernels, in place."""
    model.visibility = partial(visibility, kernels=kernels)
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention):
            module.attend = partial(attend, kernels=kernels)


def kernels_of(config: ModelConfig, backend: str, device: torch.device, precision: str) -> Kernels:
    """Returns the kernels that `engine.attention` = `backend` names.

    Raises ValueError when this device cannot train with it.
    """
    check_backend(backend, device)
    if backend == "sdpa" and device.type == "cpu":
        return make_kernels(config, ("sdpa", "tiles"), device)
    return make_kernels(config, usable(config, device, precision) if backend == "auto" else (backend,), device)


def make_kernels(config: ModelConfig, backends: tuple[str, ...], device: torch.device) -> Kernels:
    softcap, (keys, values) = config.attention_softcap, head_widths(config)
    unfused = softcap is not None or (device.type == "cpu" and keys != values)
    return Kernels(backends, softcap, unfused, flex_kernel(device, softcap) if "flex" in backends else None)


def check_backend(backend: str, device: torch.device) -> None:
    """Raises ValueError when the device cannot train with the backend."""
    if backend in ("flex", "flash") and device.type != "cuda":
        what = "its backward is" if backend == "flex" else "it is"
        raise ValueError(f"engine.attention={backend}: {what} for GPUs only, this is a {device.type}; set sdpa or auto")
    if backend == "flash" and (found := torch.cuda.get_device_capability(device)) < FLASH_CAPABILITY:
        raise ValueError(
            f"engine.attention=flash: needs a GPU of compute capability 8.0 or higher, this is one of {found[0]}."
            f"{found[1]}; set flex, sdpa or auto"
        )


def usable(config: ModelConfig, device: torch.device, precision: str) -> tuple[str, ...]:
    """Returns the backends that can train this model on this device."""
    if device.type != "cuda":
        return ("sdpa", "tiles") if device.type == "cpu" else ("sdpa",)
    strong = torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    flash = strong and has_flash() and not any(flash_faults(config, precision))
    flex = not any(flex_faults(config))
    return ("sdpa",) + ("flex",) * flex + ("flash",) * flash


def fastest(backends: tuple[str, ...], masked: bool, branches: bool, unfused: bool, tokens: int) -> str:
    """Returns the backend that a batch goes to, by what is measured on a CPU and known of the kernels on GPUs.

    `masked` = more than causal, `branches` = the batch has ends, `unfused`: see `Kernels`, `tokens` = length of a
    row. For other causal rows sdpa has fused kernels. With documents or a window it computes and masks all scores;
    FlashAttention does not, nor do tiles and flex, which need rows of many tiles or blocks.
    """
    if len(backends) == 1:
        return backends[0]
    if not masked and not unfused:
        return "sdpa"
    if "flash" in backends and not branches:
        return "flash"
    if "flex" in backends and tokens >= FLEX_TOKENS:
        return "flex"
    return "tiles" if "tiles" in backends and tokens >= TILE_TOKENS else "sdpa"


def visibility(
    segment_ids: Tensor | None,
    ends: Tensor | None,
    positions: Tensor,
    window: int | None,
    kernels: Kernels,
    queries: Sequence[Span] | None = None,
) -> Mask | BlockMask | None:
    """Returns the mask that `attend` takes. Ids and ends are [B, T]; `queries`: the places asked for, None = all.

    With None the queries of a row see the keys that are not later.
    """
    T = positions.size(1)
    window = None if window is not None and window >= T else window
    masked = segment_ids is not None or window is not None
    chosen = fastest(kernels.backends, masked or queries is not None, ends is not None, kernels.unfused, tokens=T)
    if chosen == "tiles":
        side, whole = tile_side(positions.device, kernels.softcap), whole_row(T)
        return plan_tiles(segment_ids, ends, positions, window, queries or whole, whole, side)
    places = None if queries is None else places_of(queries, positions.device)
    if chosen == "flash":
        assert ends is None, "a rule of the configuration"
        return documents(segment_ids, positions, window, places)
    if chosen == "flex":
        return block_mask(segment_ids, ends, positions, window, places)
    if not masked:
        return None
    segments = torch.zeros_like(positions) if segment_ids is None else segment_ids
    return attention_mask(segments, ends, places, positions=positions, window=window)


def documents(
    segment_ids: Tensor | None, positions: Tensor, window: int | None, queries: Tensor | None = None
) -> Documents:
    """Returns the documents of rows whose segments are runs; padding counts as one. `queries` [Q]: places in a row,
    None = all. Waits for the device, to know how many there are."""
    B, T = positions.shape
    places = torch.arange(T, device=positions.device)
    first = torch.zeros(B, T, dtype=torch.bool, device=positions.device)
    if segment_ids is not None:
        first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first[:, 0] = True
    if queries is None:
        starts = _starts(first.flatten().nonzero()[:, 0], B * T)
        longest = int(starts.diff().max())
        return Documents(starts, longest, window, starts, longest)
    begins = first[:, queries] | (F.pad(queries[1:] - queries[:-1], (1, 0), value=0) != 1)
    starts = _starts(begins.flatten().nonzero()[:, 0], begins.numel())
    own = (torch.arange(B, device=positions.device)[:, None] * T + queries).flatten()
    of_row = (places * first).cummax(1).values + torch.arange(0, B * T, T, device=positions.device)[:, None]
    begin, end = of_row.flatten()[own[starts[:-1].long()]], own[starts[1:].long() - 1] + 1
    lengths = end - begin
    key_starts = F.pad(lengths.cumsum(0), (1, 0))
    keys = torch.arange(int(key_starts[-1]), device=positions.device)
    keys = keys + (begin - key_starts[:-1]).repeat_interleave(lengths)
    return Documents(starts, int(starts.diff().max()), window, key_starts.int(), int(lengths.max()), keys)


def _starts(found: Tensor, end: int) -> Tensor:
    return F.pad(found, (0, 1), value=end).int()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | BlockMask | None, kernels: Kernels) -> Tensor:
    """Returns what `model.kernels.sdpa.attention` does, by the backend that the mask is made for."""
    if isinstance(mask, Documents):
        return _attend_flash(q, k, v, mask, kernels.softcap)
    if isinstance(mask, Tiles):
        return attend_tiles(q, k, v, mask, kernels.softcap)
    if mask is None or isinstance(mask, Tensor):
        return attention(q, k, v, mask, kernels.softcap)
    assert kernels.flex is not None
    return kernels.flex(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))


def flex_kernel(device: torch.device, softcap: float | None) -> Callable[..., Tensor]:
    """Returns flex attention. All layers of a model share one, so that they share what is compiled.

    On a GPU it must be compiled, or it would store all scores. In a compiled block it becomes a part of that.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    kernel = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
    return kernel if softcap is None else partial(kernel, score_mod=score_mod)


# `torch.compiler.disable` would import the compiler (2 s) when this file is imported; this one does when called.
@torch._disable_dynamo  # the length of the longest document is another in every batch
def _attend_flash(q: Tensor, k: Tensor, v: Tensor, mask: Documents, softcap: float | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    flat_q, *flat = (x.flatten(0, 1) for x in (q, k, v))  # [B T, heads, head_dim]
    out = flash_attn_varlen_func(
        flat_q,
        *(x if mask.keys is None else x[mask.keys] for x in flat),
        *(mask.starts, mask.key_starts, mask.longest, mask.longest_keys),
        causal=True,  # the last query of a document sees its last key
        window_size=(-1, -1) if mask.window is None else (mask.window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.unflatten(0, q.shape[:2]).transpose(1, 2)
