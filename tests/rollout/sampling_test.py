"""The distribution of the tokens that are drawn."""

from __future__ import annotations

import pytest
import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.rollout import sampling as module
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.sampling import sample
from llmtrain.types import Prompt, Sampling

LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.2, -3.0, 0.9, 1.9])
DRAWS = 4000
CHI2_7_999 = 24.32  # 99.9 % quantile of chi-square with 7 degrees of freedom


def uniforms(count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


def chi2(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distribution(temperature: float) -> None:
    tokens, logprobs = sample(LOGITS.expand(DRAWS, -1), uniforms(DRAWS), Sampling(1, temperature=temperature))
    expected = (LOGITS / temperature).softmax(-1)
    assert chi2(tokens.bincount(minlength=8), expected) < CHI2_7_999
    torch.testing.assert_close(logprobs, expected.log()[tokens])
    # the test can fail: it tells a neighbouring temperature apart
    assert chi2(tokens.bincount(minlength=8), (LOGITS / temperature / 1.3).softmax(-1)) > CHI2_7_999


def test_distribution_of_the_generator() -> None:
    """Second tokens: through prompt, cache and the streams of (seed, sample)."""
    config = ModelConfig(num_layers=1, hidden_size=16, ffn_size=16, num_heads=2, num_kv_heads=1, vocab_size=8)
    model = Decoder(config)
    initialize(model, config, seed=0)
    with torch.no_grad():
        model.embed.weight.mul_(40)
        first = model(torch.tensor([[1, 2]]), torch.arange(2)[None])[0, -1].softmax(-1)
        pairs = torch.stack([torch.tensor([1, 2, token]) for token in range(8)])
        second = first @ model(pairs, torch.arange(3).expand(8, 3))[:, -1].softmax(-1)
    (group,) = NativeGenerator(model, 500, "cpu").generate([Prompt([1, 2], seed=3)], Sampling(2, num_samples=DRAWS))
    for position, expected in enumerate((first, second)):
        counts = torch.tensor([s.ids[position] for s in group]).bincount(minlength=8)
        assert chi2(counts, expected) < CHI2_7_999
        assert chi2(counts, expected.roll(1)) > CHI2_7_999


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, 0), (0.01, 0), (1.0, 3), (0.8, 4), (0.999, 0), (1.0, 100)])
@pytest.mark.parametrize("candidates", [2, 1024])
def test_truncation(top_p: float, top_k: int, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never outside top-k and nucleus; inside, in the proportions of the whole distribution."""
    monkeypatch.setattr(module, "_CANDIDATES", candidates)
    probabilities, order = LOGITS.softmax(-1).sort(descending=True)
    probabilities = probabilities[: top_k or 8] / probabilities[: top_k or 8].sum()
    kept = next(n for n in range(1, 9) if probabilities[:n].sum() >= top_p - 1e-6)
    tokens, logprobs = sample(LOGITS.expand(DRAWS, -1), uniforms(DRAWS), Sampling(1, top_p=top_p, top_k=top_k))
    assert set(tokens.tolist()) == set(order[:kept].tolist())
    counts = tokens.bincount(minlength=8)[order[:kept]]
    assert chi2(counts, probabilities[:kept] / probabilities[:kept].sum()) < CHI2_7_999
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[tokens])


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_ends_of_the_unit_interval(top_p: float) -> None:
    """u = 0 and the largest u below 1 draw tokens that have probability."""
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf]).expand(2, -1)
    tokens, _ = sample(logits, torch.tensor([0.0, 1 - 2**-24]), Sampling(1, top_p=top_p))
    assert sorted(tokens.tolist()) == [1, 2]


def test_top_k_1_is_greedy_even_among_equals() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [7.0, 7.0, 7.0, 7.0]])
    greedy, logprobs = sample(logits, torch.tensor([0.9, 0.9]), Sampling(1, temperature=0))
    top_1, _ = sample(logits, torch.tensor([0.9, 0.9]), Sampling(1, temperature=3.0, top_k=1))
    assert greedy.tolist() == top_1.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, greedy[:, None])[:, 0])
