"""Keys of near copies: recall and precision on planted copies against brute force, beside the curve."""

from __future__ import annotations

import random
import string
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

pytest.importorskip("datatrove")

from datatrove.utils.text import simplify_text

from benchmarks.dedup import found_pairs, planted, quality, similarities
from llmtrain.config.clean.dedup import MinhashConfig
from llmtrain.data.clean.dedup import hashing, tables
from llmtrain.data.clean.dedup.curve import Measured, draw_curve, probability
from llmtrain.data.clean.dedup.forest import joined, links
from llmtrain.data.clean.dedup.hashing import Bands, digest, shingles, words


def check_recall(passages: int, passage_words: int, seed: int) -> None:
    """Compares recall, by similarity, with the curve over pairs that have no document in common, within 4 standard
    deviations; and says that what is found is near."""
    texts, settings = planted(passages, passage_words, 1, seed), MinhashConfig()
    true, found = similarities(texts), found_pairs(texts, settings)
    for low, high in ((0.3, 0.55), (0.55, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.01)):
        inside = {pair: probability(s, 14, 8) for pair, s in true.items() if low <= s < high}
        expected, hits = sum(inside.values()), len(inside.keys() & found)
        spread = sum(p * (1 - p) for p in inside.values()) ** 0.5
        assert len(inside) > passages / 20 and abs(hits - expected) <= 4 * spread + 1, (low, hits, expected, spread)
    assert len(found) > passages / 3
    assert sum(true.get(pair, 0) >= 0.5 for pair in found) / len(found) > 0.97
    assert all(true.get(pair, 0) > 0.2 for pair in found)


def test_recall_on_planted_copies_follows_the_curve() -> None:
    check_recall(500, 100, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_recall_on_many_planted_copies_follows_the_curve(seed: int) -> None:
    check_recall(2500, 60, seed)


def test_quality_counts_pairs_by_similarity() -> None:
    record = quality(60, 80, 0, MinhashConfig())
    assert record["documents"] == 180
    last = record["recall"][-1]
    assert last["similarity"] > 0.95 and last["recall"] == 1.0 and last["pairs"] >= 20


def test_the_curve() -> None:
    assert probability(0.8, 14, 8) == pytest.approx(0.92355, abs=1e-5)  # 1 - (1 - 0.16777216)^14
    assert probability(0.5, 14, 8) == pytest.approx(0.05332, abs=1e-5)
    assert (probability(0, 14, 8), probability(1, 14, 8)) == (0, 1)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    draw_curve(str(path), 14, 8, [Measured(0.7, 50, 27), Measured(0.9, 10, 10)])
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_words_are_those_of_datatroves_simplified_text() -> None:
    for text in list(topics.values())[::5]:
        assert words(text) == simplify_text(text).split()
    assert words("Ça  coûte 1.234,5 € – “déjà”!") == simplify_text("Ça  coûte 1.234,5 € – “déjà”!").split()
    assert words("Page 1\nof 23") == ["page", "0", "of", "0"]
    for text in ("naïve — «Ελληνικά», ½ x² …", "привет, мир! ёж №5", "한국어 문장입니다.", "e\u0301te\x07\x85 x"):
        assert words(text) == simplify_text(text).split()
    assert words("我们 ok") == ["我", "们", "ok"]  # no spaces between words: each character is one
    assert words("\x00\ud800 x") == ["\ud800", "x"]


def test_shingles_are_equal_where_their_words_are_and_their_order() -> None:
    a, b, c = (shingles(list(letters), 5) for letters in ("abcdef", "xbcdef", "bacde"))
    assert len(a) == 2 and a[1] == b[1] and a[0] != b[0] and c[0] != a[0]
    assert len(shingles(list("abcd"), 5)) == 0 and list(Bands(MinhashConfig()).keys("a b c d")) == []
    assert len(list(Bands(MinhashConfig()).keys("a b c d e"))) == 14


def test_half_a_surrogate_pair_is_hashed_like_a_question_mark() -> None:
    assert (shingles(["a", "\udc00"], 2) == shingles(["a", "?"], 2)).all()


def test_keys_are_equal_only_in_both_halves() -> None:
    keys = np.array([(1, 1, 5), (1, 2, 6), (1, 2, 7), (1, 2, 9), (2, 2, 1)], tables.PLACED)
    assert [column.tolist() for column in tables.copies(keys)] == [[7, 9], [6, 6], [1, 1]]
    assert [len(column) for column in tables.copies(keys[:0])] == [0, 0, 0]


def test_a_signature_is_the_least_value_over_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = np.random.default_rng(0).integers(0, 2**63, 1000, np.uint64)
    bands = Bands(MinhashConfig(buckets=3, hashes=4))
    whole = bands.signature(hashed)
    a, b = (int(parameter[5, 0]) for parameter in (bands.factors, bands.summands))
    assert whole[5] == min((a * (int(x) >> 32) + b) % 2**32 for x in hashed)
    monkeypatch.setattr(hashing, "CHUNK", 7)
    assert (bands.signature(hashed) == whole).all()


def test_keys_are_the_same_on_every_machine() -> None:
    """Keys of one machine are compared with those of another, so a change of them must be seen."""
    assert digest("café") == bytes.fromhex("fc88ba8ad8a06b6234b319bdcedd52af")
    firsts = [next(Bands(MinhashConfig(seed=seed)).keys("one two three four five six")).hex() for seed in (1, 2)]
    assert firsts == ["9e2f154170990ec032c5437eb1965c3f", "6ec8abc9c42e342040851d87b9784377"]


@pytest.mark.parametrize("seed", range(20))
def test_forests_are_those_of_a_plain_union_find(seed: int) -> None:
    draw = random.Random(seed)
    pairs = [sorted(draw.sample(range(200), 2)) for _ in range(draw.choice([1, 50, 100, 400]))]
    parent = list(range(200))

    def root(node: int) -> int:
        return node if parent[node] == node else root(parent[node])

    for low, high in pairs:
        roots = sorted((root(low), root(high)))
        parent[roots[1]] = roots[0]
    big = np.uint64(2**53 + 1)  # places that a double cannot hold
    edges = links(
        np.array([p[1] for p in pairs], np.uint64) + big, np.array([p[0] for p in pairs], np.uint64) + big, False
    )
    edges["exact"] = [high % 3 == 0 for _, high in pairs]
    expected = [(n, root(n), n % 3 == 0) for n in range(200) if root(n) != n]
    cut = draw.randrange(len(edges))
    for forest in (
        joined(edges),
        joined(edges[::-1]),
        joined(np.concatenate([joined(edges[:cut]), joined(edges[cut:])])),
    ):
        found = [(int(f["place"] - big), int(f["root"] - big), bool(f["exact"])) for f in forest]
        assert [f[:2] for f in found] == [e[:2] for e in expected]
        is_high = {high for _, high in pairs}
        assert all(exact == (place % 3 == 0 and place in is_high) for place, _, exact in found)


def test_many_equal_keys_and_long_chains_are_joined_in_one_call() -> None:
    nodes = np.arange(1, 20_000, dtype=np.uint64)
    assert set(joined(links(nodes, nodes - np.uint64(1), False))["root"].tolist()) == {0}
    order = np.array(random.Random(0).sample(range(20_000), 20_000), np.uint64)
    low, high = np.minimum(order[1:], order[:-1]), np.maximum(order[1:], order[:-1])
    forest = joined(links(high, low, False))
    assert len(forest) == 19_999 and not forest["root"].any()
    assert len(joined(np.empty(0, forest.dtype))) == 0


def test_texts_of_other_scripts_are_found() -> None:
    draw = random.Random(0)
    text = "".join(chr(0x4E00 + draw.randrange(2000)) for _ in range(400))
    changed = text[:200] + "新" + text[201:]
    assert set(Bands(MinhashConfig()).keys(text)) & set(Bands(MinhashConfig()).keys(changed))
    letters = "".join(draw.choice(string.ascii_letters) for _ in range(10))
    assert not set(Bands(MinhashConfig()).keys(text)) & set(Bands(MinhashConfig()).keys(letters * 40))
