"""Defines the heads, which turn the last hidden states into what is trained: logits of a language model, or values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.types import IGNORE


class LMHead(nn.Module):
    """Maps hidden states to logits, or, when labels are given, to the log-probs of the labels and the entropies.

    It holds all logits at once and is the reference. Training replaces it with `parallel.logprob.ScoringHead`, which
    computes them in chunks.
    """

    def __init__(self, hidden_size: int, vocab_size: int, softcap: float | None = None, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.softcap = softcap  # logits z become softcap tanh(z / softcap)
        self.factor = factor  # muP's; multiplies the logits before the softcap

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        temperature: Tensor | None = None,
        candidates: Tensor | None = None,
        top_k: int = 0,
    ) -> Tensor | tuple[Tensor, ...]:
        """Returns logits [B, T, vocabulary] without `labels`, else log-probs and entropies, both fp32 [B, T]; behind
        them, if asked for, the log-probs [B, T, K] of `candidates` [B, T, K], or those of the `top_k` likeliest tokens
        and these tokens, int64 [B, T, K].

        `hidden` is [B, T, hidden], `labels` [B, T], `temperature` [B]. Where a label is IGNORE all results are 0.
        """
        logits = self.product(self.scaled(hidden))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if labels is None:
            return logits
        logits = logits.float() if temperature is None else logits.float() / temperature[:, None, None]
        logp = logits.log_softmax(-1)
        trained = labels != IGNORE
        chosen = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        scores = (chosen * trained, entropy * trained)
        if candidates is not None:
            return *scores, logp.gather(-1, candidates) * trained[..., None]
        if top_k:
            best, ids = logp.topk(top_k, -1)
            return *scores, best * trained[..., None], ids * trained[..., None]
        return scores

    def product(self, hidden: Tensor) -> Tensor:
        """Returns hidden weight^T, the logits before the softcap."""
        return F.linear(hidden, self.weight)

    def scaled(self, hidden: Tensor) -> Tensor:
        """Returns the hidden states times `factor`: their products with the weights are the logits."""
        return hidden if self.factor == 1.0 else hidden * self.factor


class ScalarHead(nn.Module):
    """Gives one fp32 number a position: the value of a critic, or the score of a reward model."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))

    def forward(self, hidden: Tensor, *asked: object) -> Tensor:
        """Returns values [B, T] of hidden states [B, T, hidden], at every position: a last token, of which a reward
        model's score is, has no label. What else is `asked` for is for language models, and not used."""
        return self.product(hidden)

    def product(self, hidden: Tensor) -> Tensor:
        """Returns hidden @ weight, [B, T], in fp32: differences of values are trained, for which bf16's 8 bits are too
        few."""
        return hidden.float() @ self.weight[0].float()
