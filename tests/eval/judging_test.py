"""Pairs, best samples and agreement by hand; continuations against whole logits; intervals against known ones."""

from __future__ import annotations

import math

import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.eval.continuations import continuation_logprobs
from llmtrain.eval.judging import (
    agreement,
    agrees_with_first,
    best_against_worst,
    best_of,
    ranking,
    soft_label,
    votes,
)
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.observe.interval import wilson

TEXTS = ["a", "b", "c", "d"]
DONE = [True] * 4


def test_best_against_worst() -> None:
    scores = [2.0, 5.0, 1.0, 4.0]
    assert best_against_worst(scores, TEXTS, DONE, 1, 0.0) == [(1, 2)]
    assert best_against_worst(scores, TEXTS, DONE, 2, 0.0) == [(1, 2), (3, 0)]
    assert best_against_worst(scores, TEXTS, DONE, 9, 0.0) == [(1, 2), (3, 0), (1, 0), (1, 3), (3, 2), (0, 2)]
    assert best_against_worst(scores, TEXTS, DONE, 9, 2.0) == [(1, 2), (1, 0), (3, 2)]  # 4 - 2 is a tie
    one, many = [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]
    assert best_against_worst(one, TEXTS, DONE, 9, 0.0) == [(0, 3), (0, 2), (0, 1)]  # against each wrong one
    assert best_against_worst(many, TEXTS, DONE, 9, 0.0) == [(1, 0), (2, 0), (3, 0)]
    assert best_against_worst(scores, TEXTS, [True, False, True, True], 1, 0.0) == [(3, 2)]  # 1 was cut off
    assert best_against_worst(scores, TEXTS, [True, True, False, True], 1, 0.0) == [(1, 2)]  # may be rejected
    assert best_against_worst([None, 5.0, None, 4.0], TEXTS, DONE, 9, 0.0) == [(1, 3)]
    assert best_against_worst([1.0] * 4, TEXTS, DONE, 9, 0.0) == []
    assert best_against_worst([1.0, 0.0, 0.0, 1.0], TEXTS, DONE, 9, 0.0) == [(0, 2), (3, 1), (0, 1), (3, 2)]
    assert best_against_worst([3.0, 1.0, 2.0, 0.0], ["a", "a", "a", "b"], DONE, 9, 0.0) == [(0, 3)]
    assert best_against_worst([3.0, 1.0], ["a", "a"], DONE[:2], 9, 0.0) == []


def test_the_best_of_a_group() -> None:
    assert ranking([1.0, 2.0, None, 2.0], TEXTS, DONE) == [1, 3, 0]
    assert ranking([1.0, 3.0, 2.0, 0.0], ["a", "b", "b", "a"], DONE) == [1, 0]
    assert best_of([1.0, 2.0, None, 2.0], TEXTS, DONE, 2, None) == [1, 3]
    assert best_of([1.0, 2.0, None, 2.0], TEXTS, [True, False, True, True], 2, None) == [3, 0]
    assert best_of([1.0, 2.0, None, 2.0], TEXTS, DONE, 9, 1.5) == [1, 3]
    assert best_of([0.0] * 4, TEXTS, DONE, 9, 0.5) == []


def test_a_text_that_was_cut_off_does_not_hide_the_same_one_finished() -> None:
    """The same words, once with what ends them; whichever the judge likes better."""
    assert best_of([1.0, 1.0], ["a", "a"], [False, True], 1, None) == [1]
    assert best_of([3.0, 1.0], ["a", "a"], [False, True], 1, 2.0) == []  # its own score counts
    assert best_of([1.0, 1.0, 2.0], ["a"] * 3, [False, True, True], 3, None) == [2]
    assert ranking([1.0, 1.0], ["a", "a"], [False, False]) == [0]
    twins = ([2.0, 2.0, 1.0], ["a", "a", "b"], [False, True, True])
    assert best_against_worst(*twins, 9, 0.0) == [(1, 2)]
    assert best_against_worst([0.0, 1.0, 0.0], ["a", "b", "a"], [False, True, True], 9, 0.0) == [(1, 2)]


def test_agreement_counts_pairs_that_the_truth_orders() -> None:
    # pairs (0,1), (0,2), (1,2) of truth 1, 0, 0: two are ordered
    assert agreement([0.9, 0.1, 0.5], [1.0, 0.0, 0.0]) == (2.0, 2)
    assert agreement([0.1, 0.9, 0.1], [1.0, 0.0, 0.0]) == (0.5, 2)
    assert agreement([0.9, None, 0.1], [1.0, 0.0, 0.0]) == (1.0, 1)
    assert agreement([1.0, 0.0], [None, None]) == (0.0, 0)


def test_labels_votes_and_scores() -> None:
    assert soft_label(3.0, 1.0, 2.0) == pytest.approx(1 / (1 + math.exp(-1.0)))
    assert soft_label(1e9, 0.0, 1e-3) == 1.0
    assert votes([0, 1, 0, None]) == [0.5, 0.25, 0.5, 0.0]
    assert agrees_with_first([5, 5, 6, None]) == [1.0, 0.0, 0.0]
    assert agrees_with_first([None, 5, None]) == [None, None]


def test_wilson() -> None:
    assert wilson(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_continuations_are_sums_of_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of unlike lengths, of two answers to one question, in one forward or in several."""
    model = Decoder(resolve_model(ModelConfig(num_layers=2, hidden_size=16, ffn_size=24, vocab_size=32)))
    initialize(model, model.config, seed=0)
    for p in model.requires_grad_(False).parameters():
        p.mul_(8)
    rows = [([5, 6], [7]), ([5, 6], [8]), ([9], [1, 2, 3]), ([4, 4, 4, 4], [2, 2]), ([5, 6], [7, 9]), ([5], [6, 7])]
    expected = []
    for given, following in rows:
        ids = torch.tensor([[*given, *following]])
        logp = model(ids, torch.arange(ids.size(1))[None]).log_softmax(-1)[0]
        expected.append(sum(float(logp[len(given) - 1 + i, token]) for i, token in enumerate(following)))
    seen = []
    forward = model.layers["0"].forward
    monkeypatch.setattr(
        model.layers["0"], "forward", lambda x, *more: seen.append(tuple(x.shape[:2])) or forward(x, *more)
    )
    assert continuation_logprobs(model, rows, torch.device("cpu")) == pytest.approx(expected, abs=1e-4)
    assert seen == [(3, 5)]  # those that begin with 5 are one row
    for tokens in (1, 7):
        assert continuation_logprobs(model, rows, torch.device("cpu"), tokens) == pytest.approx(expected, abs=1e-4)
    assert max(n * width for n, width in seen[1:]) <= 7
    assert len({round(value, 3) for value in expected}) == 6
    with pytest.raises(ValueError, match="at least one token"):
        continuation_logprobs(model, [([], [1])], torch.device("cpu"))
