"""Implements multi-head latent attention (arXiv 2405.04434, section 2.1): the keys and values of all heads come from
one small latent, which is all that is cached."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import LayerCache, View
from llmtrain.model.kernels.sdpa import attention
from llmtrain.model.linear import Linear
from llmtrain.model.norm import Norm
from llmtrain.model.rope import apply_rope, yarn_mscale

LATENT_EPS = 1e-6  # eps of the latents' norms, whatever `norm_eps` is (as in the released models)


class LatentAttention(nn.Module):
    """Computes attention whose keys and values are projections of a latent, x [B, T, hidden] -> the same shape.

    A token's latent is its normed kv latent and one rotated key for all heads, [kv_rank + rope_head_dim]. Training and
    prompts expand it to keys and values. When a single token is decoded, its queries are projected into the latent
    space instead, so that the cached latents are attended to as they are. Head counts are read from the weights, so
    shards run unchanged.
    """

    softcap: float | None = None  # no such model has one; context parallelism reads it

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
        # YaRN's factor of the scores, put into the queries (`attention` divides by the root of their width)
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
        """Returns queries [B, heads, T, nope + rope], rotated and scaled."""
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
        """Returns what is cached of each token, [B, 1, T, kv_rank + rope]."""
        latent, key = self.kv_a(x)[:, None].split([self.kv_rank, self.rope], -1)
        return torch.cat([self.kv_a_norm(latent), self.rotated(key, view)], -1)

    def rotated(self, x: Tensor, view: View) -> Tensor:
        """Returns x, the part of queries or keys that depends on the position, rotated."""
        assert view.cos is not None and view.sin is not None
        return apply_rope(x, view.cos, view.sin, self.interleaved)

    def expanded(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys [B, heads, S, nope + rope] and values [B, heads, S, value] of latents."""
        latent, key = latent.split([self.kv_rank, self.rope], -1)
        heads = self.kv_b(latent[:, 0]).view(*latent[:, 0].shape[:2], -1, self.nope + self.value).transpose(1, 2)
        plain, v = heads.split([self.nope, self.value], -1)
        return torch.cat([plain, key.expand(-1, plain.size(1), -1, -1)], -1), v

    def absorbed(self, q: Tensor, latent: Tensor, mask: Tensor | None) -> Tensor:
        """Returns what `attend` gives for `expanded` latents, without expanding them.

        q [B, heads, 1, nope + rope] -> [B, heads, 1, value]. Scores are q_nope . (K c) = (K^T q_nope) . c with a head's
        rows K of kv_b and a latent c; the sum of its values is V (sum of c) with the other rows V.
        """
        heads = self.kv_b.whole().view(-1, self.nope + self.value, self.kv_rank)
        to_keys, to_values = heads.split([self.nope, self.value], 1)
        plain, rotated = q.split([self.nope, self.rope], -1)
        q = torch.cat([plain @ to_keys, rotated], -1)
        q = q * (q.size(-1) / (self.nope + self.rope)) ** 0.5  # `attention` divides by the root of the new width
        return attention(q, latent, latent[..., : self.kv_rank], mask) @ to_values.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Calls `attention`. A backend or context parallelism that replaces it replaces `Decoder.visibility` too."""
        return attention(q, k, v, mask)
