"""Computes rotary position embeddings (arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmtrain.config.schema import RopeScaling
from llmtrain.model.kernels.eager import Rotation, is_eager_cpu_fp32, pairs


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Returns the radians per position of each pair of dimensions, [head_dim / 2] fp32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    freqs = 1.0 / theta**exponent
    if scaling is None:
        return freqs
    if scaling.type == "linear":
        return freqs / scaling.factor
    return _llama3(freqs, scaling) if scaling.type == "llama3" else _yarn(freqs, theta, scaling)


def _llama3(freqs: Tensor, s: RopeScaling) -> Tensor:
    """Returns Llama 3.1's frequencies: low ones divided by `factor`, high ones kept, interpolated between
    (arXiv 2407.21783)."""
    wavelength = 2 * math.pi / freqs
    smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    mixed = (1 - smooth) * freqs / s.factor + smooth * freqs
    scaled = torch.where(wavelength > s.original_max_positions / s.low_freq_factor, freqs / s.factor, mixed)
    return torch.where(wavelength < s.original_max_positions / s.high_freq_factor, freqs, scaled)


def _yarn(freqs: Tensor, theta: float, s: RopeScaling) -> Tensor:
    """Returns YaRN's frequencies (arXiv 2309.00071, section 3.2): pairs that turn often stay, slow ones are divided by
    `factor`, with a linear ramp over the pairs between."""
    dim = 2 * freqs.numel()

    def pair(turns: float) -> float:
        """Returns the (fractional) pair that turns so often within the original positions."""
        return dim * math.log(s.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(s.beta_fast)), 0), min(math.ceil(pair(s.beta_slow)), dim - 1)
    places = torch.arange(freqs.numel(), dtype=torch.float32, device=freqs.device)
    ramp = ((places - low) / max(high - low, 0.001)).clamp(0, 1)
    return freqs / s.factor * ramp + freqs * (1 - ramp)


def yarn_mscale(factor: float, weight: float) -> float:
    """Returns the square root of the factor by which YaRN multiplies attention scores (its equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rope_magnitude(scaling: RopeScaling | None) -> float:
    """Returns the factor of cos and sin, which is 1 except with YaRN."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def rope_angles(positions: Tensor, freqs: Tensor, dtype: torch.dtype, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, [B, 1, T, head_dim / 2]; angles are computed in fp32 whatever the model's precision."""
    angle = positions[:, None, :, None].float() * freqs
    cos, sin = angle.cos(), angle.sin()
    if magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    return cos.to(dtype), sin.to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Returns x [B, heads, T, head_dim] with each pair (a, b) rotated to (a cos - b sin, b cos + a sin).

    A pair is the i-th value of the first half and the i-th of the second, as in the released Llama weights; or, if
    `interleaved`, two neighbours. The first values of all pairs always come out in front: queries and keys are permuted
    alike, so scores are the same.
    """
    if is_eager_cpu_fp32(x):  # the same values in fewer passes over memory
        return Rotation.apply(x, cos, sin, interleaved)
    a, b = pairs(x, interleaved)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
