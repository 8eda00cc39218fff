"""Chunked log-probs against the plain head that holds all logits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from llmtrain.model.heads import LMHead
from llmtrain.parallel.logprob import ScoringHead
from llmtrain.types import IGNORE


def heads(chunk_tokens: int, factor: float = 1.0) -> tuple[LMHead, ScoringHead]:
    plain, chunked = LMHead(16, 40, factor=factor).double(), LMHead(16, 40, factor=factor).double()
    torch.nn.init.normal_(plain.weight)
    chunked.load_state_dict(plain.state_dict())
    chunked.__class__ = ScoringHead
    chunked.group, chunked.first_id, chunked.chunk_tokens = None, 0, chunk_tokens
    return plain, chunked


@pytest.mark.parametrize(
    "compiled, chunk_tokens", [(False, 1), (False, 5), (False, 1000), pytest.param(True, 5, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_equals_the_plain_head(compiled: bool, chunk_tokens: int, temperature: float | None, factor: float) -> None:
    torch.manual_seed(0)
    plain, chunked = heads(chunk_tokens, factor)
    chunked.compiled = compiled
    labels = torch.randint(0, 40, (3, 7))
    labels[0, :4] = labels[2] = IGNORE
    scale = None if temperature is None else torch.tensor([temperature, 1.0, 2.0])
    weights, results = torch.randn(3, 7).double(), []
    for head in (plain, chunked):
        hidden = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        logp, entropy = head(hidden, labels, scale)
        (logp * weights).sum().backward()
        results.append((logp, entropy, hidden.grad, head.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=2e-6)  # both score in fp32


@pytest.mark.parametrize(
    "compiled, chunk_tokens", [(False, 5), (False, 1000), pytest.param(True, 5, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("softcap", "temperature"), [(None, None), (2.0, None), (None, 0.7), (3.0, 2.0)])
def test_candidates_equal_those_of_the_plain_head(
    compiled: bool, chunk_tokens: int, softcap: float | None, temperature: float | None
) -> None:
    """The label may be one of them; every candidate has a gradient of its own."""
    torch.manual_seed(0)
    plain, chunked = heads(chunk_tokens)
    plain.softcap = chunked.softcap = softcap
    chunked.compiled = compiled
    labels = torch.randint(0, 40, (3, 7))
    candidates = torch.rand(3, 7, 40).argsort(-1)[..., :6]
    candidates[1, :, 2] = labels[1]
    labels[0, :4] = labels[2] = IGNORE
    scale = None if temperature is None else torch.tensor([temperature, 1.0, 2.0])
    weights, results = torch.randn(3, 7, 7).double(), []
    for head in (plain, chunked):
        hidden = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        head.weight.grad = None
        logp, entropy, among = head(hidden, labels, scale, candidates)
        ((among * weights[..., 1:]).sum() + (logp * weights[..., 0]).sum()).backward()
        results.append((logp, entropy, among, hidden.grad, head.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=4e-6)  # both score in fp32
    assert results[1][2][2].abs().sum() == 0 and results[1][2][0, 4:].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, None), (2.0, None), (None, 0.5)])
def test_the_likeliest_tokens(dtype: torch.dtype, softcap: float | None, temperature: float | None) -> None:
    torch.manual_seed(0)
    plain, chunked = (head.to(dtype) for head in heads(4))
    plain.softcap = chunked.softcap = softcap
    hidden, labels = torch.randn(2, 5, 16).to(dtype).requires_grad_(), torch.arange(10).view(2, 5)
    labels[1, 3] = IGNORE
    scale = None if temperature is None else torch.full((2,), temperature)
    for top_k in (3, 40):
        (_, _, logp, ids), (_, _, expected, same) = (
            head(hidden, labels, scale, None, top_k) for head in (chunked, plain)
        )
        assert ids.equal(same) and ids.dtype == torch.int64 and not logp.requires_grad
        torch.testing.assert_close(logp, expected.detach().float(), rtol=1e-5, atol=1e-5)
        assert (ids[1, 3] == 0).all() and (logp[1, 3] == 0).all()
    assert logp[0].exp().sum(-1).tolist() == pytest.approx([1.0] * 5, rel=1e-5)  # of all 40


def test_nothing_to_train_gives_zero_gradients() -> None:
    _, head = heads(4)
    hidden = torch.randn(1, 5, 16).double().requires_grad_()
    logp, _ = head(hidden, torch.full((1, 5), IGNORE))
    logp.sum().backward()
    assert logp.abs().sum() == 0 and hidden.grad.abs().sum() == 0 and head.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, None), (2.0, None), (None, 0.5)])
def test_the_last_chunk_is_kept_for_one_backward(
    dtype: torch.dtype, softcap: float | None, temperature: float | None
) -> None:
    """Of a retained graph the second computes it again, to the same."""
    torch.manual_seed(0)
    plain, chunked = (head.to(dtype) for head in heads(4))
    plain.softcap = chunked.softcap = softcap
    hidden, labels = torch.randn(1, 6, 16).to(dtype).requires_grad_(), torch.arange(6)[None]
    scale = None if temperature is None else torch.tensor([temperature])
    (expected,) = torch.autograd.grad(plain(hidden, labels, scale)[0].sum(), hidden)
    logp, _ = chunked(hidden, labels, scale)
    for _ in range(2):
        (found,) = torch.autograd.grad(logp.sum(), hidden, retain_graph=True)
        close = 3e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, expected, rtol=close, atol=close)


def test_never_holds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that appears has chunk_tokens rows."""
    from llmtrain.parallel import logprob

    rows = []
    inner = logprob._scaled
    monkeypatch.setattr(logprob, "_scaled", lambda logits, *s: rows.append(len(logits)) or inner(logits, *s))
    _, head = heads(4)
    hidden = torch.randn(2, 9, 16).double().requires_grad_()
    head(hidden, torch.zeros(2, 9, dtype=torch.int64))[0].sum().backward()
    assert max(rows) == 4 and sum(rows) == 2 * 18  # forward, and again in the backward


class Chunks(TorchDispatchMode):
    """How many chunks of logits, [at most 4, 40], are alive when the next one is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.alive = WeakIdKeyDictionary(), []

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        logits = op is torch.ops.aten.mm.default and args[0].size(0) <= 4 and args[1].size(1) == 40
        if logits:
            self.alive.append(len(self.storages))
        out = op(*args, **(kwargs or {}))
        if logits:
            self.storages[out.untyped_storage()] = True
        return out


def test_holds_one_chunk_at_a_time() -> None:
    """And the last one of the forward until the backward, which begins with it."""
    _, head = heads(4)
    hidden = torch.randn(2, 9, 16).double().requires_grad_()
    with Chunks() as chunks:
        head(hidden, torch.zeros(2, 9, dtype=torch.int64))[0].sum().backward()
    assert chunks.alive == [0] * 9  # 5 of the forward, and again all but the last
