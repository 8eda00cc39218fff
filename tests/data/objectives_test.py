"""Fill-in-the-middle and span corruption: by hand, and put together again for any document."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.schema import DataConfig
from llmtrain.config.specials import FIM, SPANS, sentinels
from llmtrain.data.objectives import (
    SHORTEST_TOKENS,
    Objectives,
    corrupted,
    documents,
    fim,
    objectives,
    random_lengths,
    span_count,
)
from llmtrain.data.tokenizer import Tokenizer

EOS = 1
FIM_IDS = (900, 901, 902)  # prefix, middle, suffix
SPAN_IDS = tuple(range(1000, 1100))


def made(seed: int = 0, **data: float) -> Objectives:
    return Objectives(DataConfig(**data), FIM_IDS, SPAN_IDS, EOS, seed)


def test_fim_by_hand() -> None:
    body = np.array([11, 12, 13, 14, 15])
    assert fim(body, (2, 3), False, FIM_IDS).tolist() == [900, 11, 12, 902, 14, 15, 901, 13]
    assert fim(body, (2, 3), True, FIM_IDS).tolist() == [900, 902, 14, 15, 901, 11, 12, 13]
    assert fim(body, (0, 5), False, FIM_IDS).tolist() == [900, 902, 901, 11, 12, 13, 14, 15]
    assert fim(body, (5, 5), True, FIM_IDS).tolist() == [900, 902, 901, 11, 12, 13, 14, 15]


def test_spans_by_hand() -> None:
    """The example of T5's figure 2: Thank you <X> me to your party <Y> week -> <X> for inviting <Y> last."""
    thank, you, for_, inviting, me, to, your, party, last = range(11, 20)
    body = np.array([thank, you, for_, inviting, me, to, your, party, last])
    context, targets = corrupted(body, [2, 4], [2, 1], SPAN_IDS)
    assert context.tolist() == [thank, you, 1000, me, to, your, party, 1001]
    assert targets.tolist() == [1000, for_, inviting, 1001, last]


def test_what_every_document_begins_with_stays_in_front() -> None:
    chosen = Objectives(DataConfig(fim_share=1.0), FIM_IDS, SPAN_IDS, EOS, 0, prefix_ids=(7,))
    body = np.arange(50, 80)
    tokens, _ = chosen.apply(np.hstack([7, body, EOS, 7, body, EOS, body, EOS]), 0)
    assert [tokens[i] for i in (0, 1, 32, 33, 64)] == [7, FIM_IDS[0], 7, FIM_IDS[0], FIM_IDS[0]]


def test_span_count_by_hand() -> None:
    # 110 tokens: 10 spans take 20 sentinels, the end 1, the text the other 89: .15 x 89 = 13 hidden in 10 / mean 1.33
    assert span_count(110, 0.15, 1.335) == 10
    assert span_count(16, 0.01, 3.0) == 1
    assert span_count(100_000, 0.15, 3.0) == len(SPANS) == 100
    assert span_count(16, 0.99, 0.01) == 3  # room for a kept and a hidden token each


def test_shares_and_short_documents() -> None:
    texts = [np.append(np.full(30, 50 + i), EOS) for i in range(400)]
    rows = np.concatenate(texts)
    tokens, trained = made(fim_share=0.3, fim_spm_share=0.25, span_share=0.2).apply(rows, 7)
    pieces = [tokens[start:end] for start, end in documents(tokens, EOS)]
    assert len(pieces) == 400 and all(len(piece) == 31 for piece in pieces)
    spm = sum(piece[0] == 900 and piece[1] == 902 for piece in pieces)  # and few PSM whose prefix is empty
    with_fim = sum(piece[0] == 900 for piece in pieces)
    with_spans = sum((piece >= 1000).any() for piece in pieces)
    assert with_fim == pytest.approx(120, abs=30) and with_spans == pytest.approx(80, abs=25)  # 3 standard deviations
    assert 0.12 < spm / with_fim < 0.5
    untouched = [p for p, text in zip(pieces, texts, strict=True) if np.array_equal(p, text)]
    assert len(untouched) == 400 - with_fim - with_spans
    assert not trained.all() and trained[tokens == EOS].all()
    short = np.append(np.full(SHORTEST_TOKENS - 2, 50), EOS)
    assert np.array_equal(made(fim_share=1.0).apply(short, 0)[0], short)


def test_every_choice_depends_on_seed_and_row_only() -> None:
    row = np.arange(50, 150)
    one = made(fim_share=1.0)
    assert np.array_equal(one.apply(row, 3)[0], one.apply(row, 3)[0])
    assert not np.array_equal(one.apply(row, 3)[0], one.apply(row, 4)[0])
    assert not np.array_equal(one.apply(row, 3)[0], made(1, fim_share=1.0).apply(row, 3)[0])


rows = st.lists(st.integers(0, 80), min_size=1, max_size=6).flatmap(
    lambda lengths: st.booleans().map(lambda closed: row_of(lengths, closed))
)


def row_of(lengths: list[int], closed: bool) -> np.ndarray:
    """Documents of these lengths with all tokens different; the last one is cut off by the end of the row or not."""
    numbers = iter(range(10_000, 20_000))
    parts = [[*(next(numbers) for _ in range(n)), EOS] for n in lengths]
    row = [token for part in parts for token in part]
    return np.array(row if closed or len(row) == 1 else row[:-1])


@given(rows, st.integers(0, 1000), st.sampled_from([0.0, 1.0]))
@settings(max_examples=150, deadline=None)
def test_fim_loses_only_the_tail(row: np.ndarray, number: int, spm: float) -> None:
    tokens, trained = made(fim_share=1.0, fim_spm_share=spm).apply(row, number)
    assert tokens.shape == row.shape and trained.all()
    for start, end in documents(row, EOS):
        before, after = row[start:end].tolist(), tokens[start:end].tolist()
        if end - start < SHORTEST_TOKENS:
            assert before == after
            continue
        assert after[0] == 900 and after[-1] == EOS
        p, s, m = (after.index(i) for i in (900, 902, 901))
        if spm:  # <prefix> <suffix> suffix <middle> prefix middle
            assert s == 1
            text = after[m + 1 : -1] + after[s + 1 : m]
        else:  # <prefix> prefix <suffix> suffix <middle> middle
            text = after[p + 1 : s] + after[m + 1 : -1] + after[s + 1 : m]
        assert text == before[: end - start - 4]


@given(rows, st.integers(0, 1000), st.floats(0.05, 0.9), st.floats(0.5, 9.0))
@settings(max_examples=150, deadline=None)
def test_spans_lose_only_the_tail_and_train_only_the_targets(
    row: np.ndarray, number: int, noise: float, mean_tokens: float
) -> None:
    tokens, trained = made(span_share=1.0, span_noise=noise, span_mean_tokens=mean_tokens).apply(row, number)
    assert tokens.shape == row.shape
    for start, end in documents(row, EOS):
        before, after, mask = row[start:end].tolist(), tokens[start:end].tolist(), trained[start:end]
        if end - start < SHORTEST_TOKENS:
            assert before == after and mask.all()
            continue
        used = span_count(end - start, noise, mean_tokens)
        targets = after.index(1000, after.index(1000) + 1)  # the second <extra_id_0>
        assert not mask[:targets].any() and mask[targets:].all()
        spans: dict[int, list[int]] = {}
        for token in after[targets:-1]:
            spans.setdefault(token, []) if token < 2000 else spans[max(spans)].append(token)
        assert list(spans) == list(SPAN_IDS[:used]) and all(spans.values())
        text = [x for token in after[:targets] for x in (spans[token] if token < 2000 else [token])]
        assert text == before[: end - start - 2 * used - 1] and after[-1] == EOS


@given(st.integers(1, 60), st.integers(0, 2**60), st.data())
def test_random_lengths_add_up(total: int, seed: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, total))
    lengths = random_lengths(total, parts, seed)
    assert len(lengths) == parts and sum(lengths) == total and min(lengths) >= 1


def test_hidden_share_is_that_of_the_configuration() -> None:
    row = np.append(np.arange(10_000, 11_999), EOS)
    _, trained = made(span_share=1.0, span_noise=0.15, span_mean_tokens=3.0).apply(row, 0)
    count = span_count(2000, 0.15, 3.0)
    hidden = trained.sum() - count - 1
    assert hidden / (2000 - 1 - 2 * count) == pytest.approx(0.15, abs=0.001)
    assert hidden / count == pytest.approx(3.0, abs=0.05)


def test_objectives_need_their_sentinels(tokenizer: Tokenizer) -> None:
    assert sentinels(DataConfig()) == () and objectives(DataConfig(), tokenizer, 0) is None
    assert sentinels(DataConfig(fim_share=0.1, span_share=0.1)) == FIM + SPANS
    with pytest.raises(
        ValueError, match=r"has no <\|fim_prefix\|>, <\|fim_middle\|>, <\|fim_suffix\|>, which data.fim"
    ):
        objectives(DataConfig(fim_share=0.1), tokenizer, 0)
    with pytest.raises(ValueError, match=r"<\|extra_id_2\|> and 97 more, which .*set the share to 0") as error:
        objectives(DataConfig(span_share=0.1), tokenizer, 0)
    assert "\n" not in str(error.value)
