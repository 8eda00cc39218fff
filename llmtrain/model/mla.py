"""Multi-head latent attention (arXiv 2405.04434, section 2.1): the keys and values of all heads come from one small
latent, which is all that is cached."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import LayerCache, View
from llmtrain.model.kernels.sdpa import attention
from llmtrain.model.linear import Linear
from llmtrain.model.norm import Norm
from llmtrain.model.rope import apply_rope, yarn_mscale

LATENT_EPS = 1e-6  # of the latents' norms, whatever `norm_eps` is (the released models)


class LatentAttention(nn.Module):
    """x [B, T, hidden] -> the same shape. Head counts are read from the weights, so shards run unchanged.

    A token's latent is its normed kv latent and one rotated key for all heads, [kv_rank + rope_head_dim]. Training and
    prompts expand it to keys and values; a single token that is decoded takes its queries into the latent instead, so
    that what is cached is attended to as it is.
    """

    softcap: float | None = None  # none has one; context parallelism asks

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a, heads, hidden = config.mla, config.num_heads, config.hidden_size
        assert a is not None
        self.nope, self.rope, self.value, self.kv_rank = a.nope_head_dim, a.rope_head_dim, a.v_head_dim, a.kv_rank
        wide = heads * (self.nope + self.rope)
        self.q = Linear(hidden, wide, bias=False) if a.q_rank is None else None
        self.q_a = None if a.q_rank is None else Linear(hidden, a.q_rank, bias=False)
        self.q_a_norm = None if a.q_rank is None else Norm(a.q_rank, LATENT_EPS)
        self.q_b = None if a.q_rank is None else Linear(a.q_rank, wide, bias=False)
        self.kv_a = Linear(hidden, a.kv_rank + a.rope_head_dim, bias=False)
        self.kv_a_norm = Norm(a.kv_rank, LATENT_EPS)
        self.kv_b = Linear(a.kv_rank, heads * (self.nope + self.value), bias=False)
        self.o = Linear(heads * self.value, hidden, bias=False)
        self.interleaved = config.rope_interleaved
        # YaRN's temperature, twice: of queries and of keys (`attention` divides by the root of their width)
        s = config.rope_scaling
        self.q_factor = yarn_mscale(s.factor, s.mscale_all_dim) ** 2 if s and s.type == "yarn" else 1.0

    def forward(self, x: Tensor, view: View, cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x.shape
        q, latent = self.queries(x, view), self.latent(x, view)
        if cache is not None:
            latent, _ = cache(latent, latent[..., :0])
        if cache is not None and T == 1:
            out = self.absorbed(q, latent, view.mask)
        else:
            out = self.attend(q, *self.expanded(latent), view.mask)
        return self.o(out.transpose(1, 2).reshape(B, T, -1))

    def queries(self, x: Tensor, view: View) -> Tensor:
        """[B, heads, T, nope + rope], rotated and scaled."""
        if self.q is not None:
            q = self.q(x)
        else:
            assert self.q_a is not None and self.q_a_norm is not None and self.q_b is not None
            q = self.q_b(self.q_a_norm(self.q_a(x)))
        q = q.view(*x.shape[:2], -1, self.nope + self.rope).transpose(1, 2)
        plain, rotated = q.split([self.nope, self.rope], -1)
        q = torch.cat([plain, self.rotated(rotated, view)], -1)
        return q if self.q_factor == 1.0 else q * self.q_factor

    def latent(self, x: Tensor, view: View) -> Tensor:
        """[B, 1, T, kv_rank + rope], what is cached of each token."""
        latent, key = self.kv_a(x)[:, None].split([self.kv_rank, self.rope], -1)
        return torch.cat([self.kv_a_norm(latent), self.rotated(key, view)], -1)

    def rotated(self, x: Tensor, view: View) -> Tensor:
        """Of the part of a head that has a position."""
        assert view.cos is not None and view.sin is not None
        return apply_rope(x, view.cos, view.sin, self.interleaved)

    def expanded(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, heads, S, nope + rope] and values [B, heads, S, value] of latents."""
        latent, key = latent.split([self.kv_rank, self.rope], -1)
        heads = self.kv_b(latent[:, 0]).view(*latent[:, 0].shape[:2], -1, self.nope + self.value).transpose(1, 2)
        plain, v = heads.split([self.nope, self.value], -1)
        return torch.cat([plain, key.expand(-1, plain.size(1), -1, -1)], -1), v

    def absorbed(self, q: Tensor, latent: Tensor, mask: Tensor | None) -> Tensor:
        """The same as `attend` with `expanded` latents. q [B, heads, 1, nope + rope] -> [B, heads, 1, value].

        Scores are q_nope . (K c) = (K^T q_nope) . c with a head's rows K of kv_b and a latent c; the sum of its values
        is V (sum of c) with the other rows V.
        """
        heads = self.kv_b.whole().view(-1, self.nope + self.value, self.kv_rank)
        to_keys, to_values = heads.split([self.nope, self.value], 1)
        plain, rotated = q.split([self.nope, self.rope], -1)
        q = torch.cat([plain @ to_keys, rotated], -1)
        q = q * (q.size(-1) / (self.nope + self.rope)) ** 0.5  # `attention` divides by the root of the new width
        return attention(q, latent, latent[..., : self.kv_rank], mask) @ to_values.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`attention`. A plan may replace it, and `Decoder.visibility` with it."""
        return attention(q, k, v, mask)
