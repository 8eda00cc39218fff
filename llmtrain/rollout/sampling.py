"""Samples one token a row from logits by inverse CDF, which needs one uniform number a row instead of one an entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmtrain.config.section import LEAST_TEMPERATURE
from llmtrain.types import Prompt, Sampling

_CANDIDATES = 1024  # top-p first searches its nucleus among this many tokens; sorting a whole vocabulary is 50x slower


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for a value outside its range."""
    rules = {
        "max_new_tokens": (sampling.max_new_tokens >= 1, "at least 1"),
        "num_samples": (sampling.num_samples >= 1, "at least 1"),
        "temperature": (
            sampling.temperature == 0 or sampling.temperature >= LEAST_TEMPERATURE,
            f"0 (greedy) or at least {LEAST_TEMPERATURE:g}, less divides by 0 in fp32; set 0 for the likeliest token",
        ),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1 (1 = all)"),
        "top_k": (sampling.top_k >= 0, "0 (all) or more"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name}={getattr(sampling, name)}: must be {rule}")


def check_prompts(prompts: Sequence[Prompt], max_seq_tokens: int) -> None:
    """Raises ValueError for a prompt that is empty or leaves no room for a token."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt.ids) < max_seq_tokens:
            raise ValueError(
                f"prompt {i} has {len(prompt.ids)} tokens: must be 1 to {max_seq_tokens - 1}, as a sequence "
                f"may have {max_seq_tokens}; shorten it or raise model.max_positions"
            )


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Returns (tokens [B] int64, log-probs [B] fp32), given logits [B, vocabulary] and uniforms [B] fp32 in [0, 1).

    The log-prob is that of the whole distribution at the sampling temperature, before truncation; greedy (temperature
    0) reports temperature 1.
    """
    top = logits.amax(-1, keepdim=True).float()
    scaled = logits - top
    if sampling.temperature not in (0, 1):
        scaled.div_(sampling.temperature)
    weights = scaled.exp()
    if sampling.temperature == 0 or sampling.top_k == 1:
        tokens = scaled.argmax(-1)  # in fp32, which is 4x as fast as in bf16
    elif sampling.top_k == 0 and sampling.top_p == 1:
        tokens = _invert(weights.cumsum(-1), uniforms)
    else:
        tokens = _truncated(weights, uniforms, sampling.top_k, sampling.top_p)
    return tokens, scaled.gather(-1, tokens[:, None])[:, 0] - weights.sum(-1).log()


def _invert(cdf: Tensor, uniforms: Tensor) -> Tensor:
    """Returns the first index with cdf > u * total: a token of weight 0 is never chosen. (The clamp matters only for
    NaN.)"""
    target = uniforms[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=cdf.size(-1) - 1)


def _truncated(weights: Tensor, uniforms: Tensor, top_k: int, top_p: float) -> Tensor:
    """Samples from the top k, and of these from the smallest set that holds `top_p` of their mass (nucleus, arXiv
    1904.09751)."""
    vocab_size = weights.size(-1)
    for count in (min(top_k or _CANDIDATES, vocab_size), vocab_size):
        chosen, ids = weights.topk(count)
        cdf = chosen.cumsum(-1)
        mass = top_p * (cdf[:, -1] if top_k else weights.sum(-1))
        if top_k or bool((cdf[:, -1] >= mass).all()):
            break
    outside = cdf - chosen >= mass[:, None]  # the tokens before this one already hold the mass
    chosen = chosen.masked_fill(outside, 0)
    return ids.gather(-1, _invert(chosen.cumsum(-1), uniforms)[:, None])[:, 0]
