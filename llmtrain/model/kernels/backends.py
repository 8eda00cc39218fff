"""Chooses the attention backend of a batch in training: torch's `scaled_dot_product_attention`, flex attention
(arXiv 2412.05496) or FlashAttention (arXiv 2307.08691). `attend` tells them apart by the type of their mask:

    sdpa    bool [B, 1, T, T], or None = causal. With a mask it computes every score.
    flex    BlockMask: the rule of visibility, and which blocks of scores hold anything. Empty blocks cost nothing.
    flash   Documents: where each begins. Each document of a row is computed by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.arch.attention import flash_faults, flex_faults, has_flash
from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import Attention, attention_mask
from llmtrain.model.kernels.flex_masks import block_mask
from llmtrain.model.kernels.sdpa import attention
from llmtrain.model.mla import LatentAttention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLASH_CAPABILITY = (8, 0)
FLEX_TOKENS = 1024  # tokens from which `auto` gives a masked row to flex: shorter rows have few blocks to leave out


class Documents(NamedTuple):
    """Says where the documents of a batch begin, its rows laid end to end. A document is one run of a row."""

    starts: Tensor  # [documents + 1] int32, the last = B T
    longest: int  # tokens
    window: int | None


Mask = Tensor | Documents  # or a BlockMask, whose module is slow to import


def use_backend(model: nn.Module, backend: str, device: torch.device, precision: str) -> None:
    """Makes a decoder compute attention by `backend`, a value of `engine.attention`, in place.

    Raises ValueError when this device cannot train with it.
    """
    check_backend(backend, device)
    if backend == "auto":
        set_backend(model, usable(model.config, device, precision), device)
    else:
        set_backend(model, (backend,), device)


def set_backend(model: nn.Module, backends: tuple[str, ...], device: torch.device) -> None:
    """Makes a decoder compute attention by one of `backends`: each batch by the one that `fastest` names."""
    if backends == ("sdpa",):
        return  # what a decoder does by itself
    softcap = model.config.attention_softcap
    flex = flex_kernel(device, softcap) if "flex" in backends else None
    model.visibility = partial(visibility, backends=backends, capped=softcap is not None)
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention):
            module.attend = partial(attend, softcap=softcap, flex=flex)


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
        return ("sdpa",)
    strong = torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    flash = strong and has_flash() and not any(flash_faults(config, precision))
    flex = not any(flex_faults(config))
    return ("sdpa",) + ("flex",) * flex + ("flash",) * flash


def fastest(backends: tuple[str, ...], masked: bool, branches: bool, capped: bool, tokens: int) -> str:
    """Returns the backend that a batch goes to, by what is known of the kernels on GPUs.

    `masked` = more than causal, `branches` = the batch has branch ids, `capped` = the scores have a softcap, `tokens` =
    length of a row. For causal rows without softcap sdpa has fused kernels. With documents or a window it computes and
    masks all scores, with a softcap it stores them; FlashAttention does neither, nor does flex, which needs rows of
    many blocks.
    """
    if len(backends) == 1:
        return backends[0]
    if not masked and not capped:
        return "sdpa"
    if "flash" in backends and not branches:
        return "flash"
    return "flex" if "flex" in backends and tokens >= FLEX_TOKENS else "sdpa"


def visibility(
    segment_ids: Tensor | None,
    branch_ids: Tensor | None,
    positions: Tensor,
    window: int | None,
    backends: tuple[str, ...],
    capped: bool,
) -> Mask | BlockMask | None:
    """Returns the mask that `attend` takes. The ids are [B, T]."""
    T = positions.size(1)
    window = None if window is not None and window >= T else window
    masked = segment_ids is not None or window is not None
    chosen = fastest(backends, masked, branch_ids is not None, capped, T)
    if chosen == "flash":
        assert branch_ids is None, "a rule of the configuration"
        return documents(segment_ids, positions, window)
    if chosen == "flex":
        return block_mask(segment_ids, branch_ids, positions, window)
    if not masked:
        return None
    segments = torch.zeros_like(positions) if segment_ids is None else segment_ids
    return attention_mask(segments, branch_ids, positions=positions, window=window)


def documents(segment_ids: Tensor | None, positions: Tensor, window: int | None) -> Documents:
    """Returns the documents of rows whose segments are runs; padding counts as one. Waits for the device, to know how
    many there are."""
    B, T = positions.shape
    if segment_ids is None:
        return Documents(torch.arange(0, B * T + 1, T, dtype=torch.int32, device=positions.device), T, window)
    first = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    starts = F.pad(first.flatten().nonzero()[:, 0], (0, 1), value=B * T)
    return Documents(starts.int(), int(starts.diff().max()), window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | BlockMask | None,
    softcap: float | None = None,
    flex: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Returns what `model.kernels.sdpa.attention` does, by the backend that the mask is made for; `flex` is made by
    `flex_kernel`."""
    if isinstance(mask, Documents):
        return _attend_flash(q, k, v, mask, softcap)
    if mask is None or isinstance(mask, Tensor):
        return attention(q, k, v, mask, softcap)
    assert flex is not None
    return flex(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))


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

    out = flash_attn_varlen_func(
        *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)),  # [B T, heads, head_dim]
        *(mask.starts, mask.starts, mask.longest, mask.longest),
        causal=True,
        window_size=(-1, -1) if mask.window is None else (mask.window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.unflatten(0, (q.size(0), q.size(2))).transpose(1, 2)
