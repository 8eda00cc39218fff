"""Rotary position embedding (arXiv 2104.09864), half-split layout as in the released Llama weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmtrain.config.schema import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians a position for each pair of dimensions, [head_dim / 2] fp32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    freqs = 1.0 / theta**exponent
    return freqs if scaling is None else _llama3(freqs, scaling)


def _llama3(freqs: Tensor, s: RopeScaling) -> Tensor:
    """Llama 3.1: divide low frequencies by `factor`, keep high ones, interpolate between (arXiv 2407.21783)."""
    wavelength = 2 * math.pi / freqs
    smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    mixed = (1 - smooth) * freqs / s.factor + smooth * freqs
    scaled = torch.where(wavelength > s.original_max_positions / s.low_freq_factor, freqs / s.factor, mixed)
    return torch.where(wavelength < s.original_max_positions / s.high_freq_factor, freqs, scaled)


def rope_angles(positions: Tensor, freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, [B, 1, T, head_dim / 2]; the angle is taken in fp32 whatever the model's precision."""
    angle = positions[:, None, :, None].float() * freqs
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, T, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
