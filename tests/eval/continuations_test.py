from __future__ import annotations

import random

import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import MlaConfig, ModelConfig
from llmtrain.eval import continuations as module
from llmtrain.eval import sharing
from llmtrain.eval.continuations import Continuation, continuation_logprobs, continuations
from llmtrain.model.decoder import Decoder, initialize

CPU = torch.device("cpu")
MLA = {"attention": "mla", "mla": MlaConfig(kv_rank=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=8)}
WINDOW = {"sliding_window": 5, "layer_types": ["sliding", "full"]}


def tiny(**fields: object) -> Decoder:
    config = ModelConfig(
        num_layers=2, hidden_size=16, ffn_size=24, num_heads=2, num_kv_heads=1, vocab_size=32, **fields
    )
    model = Decoder(resolve_model(config))
    initialize(model, model.config, seed=0)
    for p in model.requires_grad_(False).parameters():
        p.mul_(8 if p.dim() > 1 else 1)
    return model


def plain(model: Decoder, rows: list[Continuation]) -> tuple[list[float], list[bool]]:
    """Each row by itself, with all its logits."""
    sums, greedy = [], []
    for given, following in rows:
        ids = torch.tensor([[*given, *following]])
        logp = model(ids, torch.arange(ids.size(1))[None]).log_softmax(-1)[0, len(given) - 1 : -1]
        sums.append(sum(float(logp[i, token]) for i, token in enumerate(following)))
        greedy.append(logp.argmax(-1).tolist() == list(following))
    return sums, greedy


def questions(seed: int, model: Decoder) -> list[Continuation]:
    """Questions behind examples that are the same, with options; rows apart from them; and greedy ones."""
    draw = random.Random(seed)
    shots = [draw.randrange(32) for _ in range(40)]
    rows = [([1], [draw.randrange(32) for _ in range(30)]), ([2, 3], [4])]
    for _ in range(8):
        given = shots + [draw.randrange(3) for _ in range(draw.randrange(1, 9))]
        rows += [(given, [draw.randrange(6) for _ in range(draw.randrange(1, 6))]) for _ in range(4)]
        ids = torch.tensor([given])
        rows.append((given, [int(model(ids, torch.arange(ids.size(1))[None])[0, -1].argmax())]))
    rows.append(rows[5])
    draw.shuffle(rows)
    return rows


@pytest.mark.parametrize("fields", [{}, WINDOW, MLA], ids=["full", "sliding", "mla"])
@pytest.mark.parametrize("limits", [(1, 4, 0.0, 1, 1), (8, 64, 0.5, 32, 3), (32, 512, 0.125, 512, 512)])
def test_shared_tokens_change_no_score(fields: dict, limits: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("STEM_TOKENS", "ROW_TOKENS", "GAIN", "ENOUGH_TOKENS"), limits, strict=False):
        monkeypatch.setattr(sharing, name, value)
    monkeypatch.setattr(module, "HEAD_TOKENS", limits[-1])
    model = tiny(**fields)
    rows = questions(3, model)
    sums, greedy = plain(model, rows)
    assert sum(greedy) >= 8
    for batch_tokens in (1, 60, 8192):
        found = continuations(model, rows, CPU, batch_tokens)
        # fp32 rounds a token's log-prob of about 10 by 1e-6, and the layers' sums in another order by a few times that
        assert [each.logprob for each in found] == pytest.approx(sums, abs=1e-4)
        assert [each.greedy for each in found] == greedy


def test_equal_rows_have_equal_results_to_the_bit() -> None:
    model = tiny()
    rows = [([3, 4], [5, 6]), ([7], [8, 9, 10]), ([3, 4], [5, 6]), ([3, 4], [5])]
    first, _, again, _ = continuation_logprobs(model, rows, CPU)
    assert first == again


def test_each_shared_token_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 tokens of examples, 3 questions of 10 with 4 options of one token: 600 + 3 x 10 tokens, not 12 x 610."""
    model = tiny(max_positions=1024)
    shots = [i % 29 for i in range(600)]
    rows = [([*shots, q, *range(9)], [option]) for q in (1, 2, 3) for option in (4, 5, 6, 7)]
    seen, forward = [], model.layers["0"].forward
    monkeypatch.setattr(model.layers["0"], "forward", lambda x, *more: seen.append(x.shape[:2]) or forward(x, *more))
    asked, head = [], model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda x, *more: asked.append(len(x)) or head(x, *more))
    continuations(model, rows, CPU)
    assert seen == [(1, 600), (3, 10)]
    assert asked == [3]  # one place for the four options of a question


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    model = tiny()
    model.head.weight.zero_()
    assert [each.greedy for each in continuations(model, [([1], [0]), ([1], [1]), ([1], [0, 0])], CPU)] == [
        True,
        False,
        True,
    ]


def test_no_rows_and_empty_parts() -> None:
    assert continuations(tiny(), [], CPU) == []
    for row in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="at least one token before it and one of its own"):
            continuations(tiny(), [row], CPU)
