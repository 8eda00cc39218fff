"""Which source a sample is taken from where shares change: exact at every sample, epochs capped, phases."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from llmtrain.data import mix as mixing
from llmtrain.data.mix import PERIOD, Blocks, Mix, MixSettings, chunks_of, narrowed, tempered
from llmtrain.data.sampler import source_of


def furthest(mix: Mix, samples: int) -> tuple[float, int]:
    """The largest distance of a source's samples from what its shares add up to, and the number of samples there."""
    picks = np.array([mix.source_of(n)[0] for n in range(samples)])
    asked = np.cumsum([list(mix.shares(n).values()) for n in range(samples)], axis=0)
    had = np.cumsum(picks[:, None] == np.arange(len(mix.names)), axis=0)
    distance = np.abs(had - asked).max(axis=1)
    return float(distance.max()), int(distance.argmax()) + 1


@pytest.mark.parametrize(
    "weights",
    [
        {"a": 3.0, "b": 1.0},
        {"a": 0.62, "b": 0.31, "c": 0.07},
        {"a": 1e-3, "b": 1.0, "c": 1.0},
        dict.fromkeys("abcdef", 1),
    ],
)
def test_shares_are_right_at_every_sample(weights: dict[str, float]) -> None:
    """Within one sample, which from 1,000 samples on is a tenth of a percent."""
    mix = Mix(dict.fromkeys(weights, 10_000), MixSettings(weights))
    picks = [mix.source_of(n)[0] for n in range(5000)]
    total, had = sum(weights.values()), Counter()
    for samples, source in enumerate(picks, 1):
        had[source] += 1
        wrong = max(abs(had[i] - samples * w / total) for i, w in enumerate(weights.values()))
        assert wrong < 1 + samples / PERIOD, samples
        assert samples < 1000 or wrong / samples <= 0.001


def test_a_source_may_come_in_the_last_mix_alone() -> None:
    rows, weights = {"a": 9, "b": 9, "c": 9}, {"a": 1, "b": 1, "c": 0}
    for temperature in (None, 2.0):
        mix = Mix(rows, MixSettings(weights, temperature=temperature, anneal=[(6, {"c": 1, "a": 1})]))
        assert Counter(mix.source_of(n)[0] for n in range(6)) == {0: 3, 1: 3}
        assert Counter(mix.source_of(n)[0] for n in range(6, 12)) == {0: 3, 2: 3}


def test_an_order_by_hand() -> None:
    mix = Mix({"a": 9, "b": 9, "c": 9}, MixSettings({"a": 2, "b": 1, "c": 1}))
    assert [mix.source_of(n) for n in range(8)] == [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1), (0, 3), (2, 1)]


def drawn(rng: random.Random, dropped: bool) -> tuple[dict[str, int], MixSettings] | None:
    """Rows and settings of a mix of up to nine sources, some of them with one epoch, and up to three later mixes."""
    names = "abcdefghi"[: rng.randint(2, 9)]
    weights = [{name: rng.choice([0] * dropped + [1, 1, 2, 3, 5, 8]) for name in names} for _ in range(4)]
    if not all(any(each.values()) for each in weights):
        return None
    caps = dict.fromkeys(names[: rng.randint(0, len(names))], 1.0)
    starts = sorted(rng.sample(range(3, 300), rng.randint(0, 3)))
    later = tuple(zip(starts, weights[1:], strict=False))
    return {name: rng.randint(3, 120) for name in names}, MixSettings(weights[0], caps, anneal=later)


@pytest.mark.parametrize(("dropped", "bound"), [(False, 1), (True, 2)])
def test_each_source_is_within_one_sample_where_epochs_run_out_and_mixes_change(
    dropped: bool, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a period of 60, so that orders repeat too. Where a later mix drops sources that are owed a part of a sample
    others get it, which is up to two samples here, and no theorem. Every row comes once, in its order."""
    monkeypatch.setattr(mixing, "PERIOD", 60)
    rng, repeated = random.Random(0), 0
    for settings in filter(None, (drawn(rng, dropped) for _ in range(150))):
        mix = Mix(*settings)
        samples = min(400, mix.end or 400)
        assert furthest(mix, samples)[0] < bound, settings
        picks = [mix.source_of(n) for n in range(samples)]
        for source, count in enumerate(mix.counts(samples)):
            assert [ordinal for each, ordinal in picks if each == source] == list(range(count))
            assert mix.caps[source] is None or count <= mix.caps[source]
        repeated += any(b.first - a.first > len(a.sources) for a, b in pairwise(mix.chunks))
    assert repeated > 10
    chunks_of.cache_clear()


def test_a_run_that_had_no_order() -> None:
    """One source runs out, the shares of eight change three times: none may be late, none must be missing."""
    rows = dict(zip("abcdefgh", (7, 19, 21, 17, 5, 18, 11, 16), strict=True))
    weights = ([3, 1, 8, 8, 1, 5, 1, 1], [1, 2, 3, 1, 1, 5, 2, 1], [3, 8, 3, 3, 8, 8, 8, 8], [1, 3, 1, 2, 3, 8, 3, 3])
    first, *later = (dict(zip(rows, each, strict=True)) for each in weights)
    mix = Mix(rows, MixSettings(first, {"a": 1.0}, anneal=tuple(zip((18, 52, 93), later, strict=True))))
    assert furthest(mix, 200)[0] < 1 and mix.counts(200)[0] == 7


def test_the_sample_in_which_epochs_end_is_shared() -> None:
    """`a` has room for 2 units, `b` for 1: `c` has what is left of their shares; and where all are full, less
    than a sample is left."""
    third = PERIOD // 3
    assert narrowed((third, third, third + 1), (2, 1, None)) == (2, 1, PERIOD - 3)
    assert narrowed((PERIOD // 2, PERIOD // 2, 0), (2, None, None)) == (2, PERIOD - 2, 0)
    assert narrowed((PERIOD // 2, PERIOD // 2), (2, 3)) == (2, 3)


def test_a_source_is_not_seen_more_often_than_its_epochs() -> None:
    """10 rows, twice, at 3 of 4 samples: they last for 26 or 27 samples, then the others share them by 1 : 3."""
    rows = {"a": 10, "b": 90, "c": 500}
    mix = Mix(rows, MixSettings({"a": 12.0, "b": 1.0, "c": 3.0}, {"a": 2.0, "b": 0.5}, samples=300))
    picks = [mix.source_of(n) for n in range(300)]
    assert [n for s, n in picks if s == 0] == list(range(20)) and [n for s, n in picks if s == 1] == list(range(45))
    # at row 26 19.5 are asked, the others share half a row; then 43.25 rows of `b` are left, for 173 rows
    assert [mix.shares(n) for n in (25, 26, 27, 199, 200)] == [
        {"a": 0.75, "b": 0.0625, "c": 0.1875},
        {"a": 0.5, "b": 0.125, "c": 0.375},
        {"a": 0.0, "b": 0.25, "c": 0.75},
        {"a": 0.0, "b": 0.25, "c": 0.75},
        {"a": 0.0, "b": 0.0, "c": 1.0},
    ]
    assert [n for s, n in picks if s == 2] == list(range(300 - 65)) and mix.counts(300) == [20, 45, 235]
    assert furthest(mix, 300)[0] < 1


def test_sources_that_do_not_last_are_refused_before_the_start() -> None:
    capped = MixSettings(None, {"a": 1.5, "b": 1.0}, samples=25)
    assert [Mix({"a": 10, "b": 10}, capped).counts(25)] == [[15, 10]]
    with pytest.raises(
        ValueError, match=r"max_epochs leaves 25 rows, and the run takes 26; raise max_epochs, leave it"
    ):
        Mix({"a": 10, "b": 10}, MixSettings(None, {"a": 1.5, "b": 1.0}, samples=26))
    with pytest.raises(ValueError, match=r"sample 25: .* leaves only 25 rows"):
        Mix({"a": 10, "b": 10}, capped).source_of(25)
    with pytest.raises(ValueError, match=r"data.sources.a.max_epochs=0.05: must leave at least one of its 10 rows"):
        Mix({"a": 10, "b": 10}, MixSettings(None, {"a": 0.05}))


def test_later_mixes_begin_at_their_sample() -> None:
    later = ((1000, {"b": 1.0, "c": 1.0}), (3001, {"a": 1.0}))
    mix = Mix(dict.fromkeys("abc", 50), MixSettings({"a": 0.9, "b": 0.1, "c": 1e-4}, anneal=later))
    picks = [mix.source_of(n) for n in range(4000)]
    names = ["".join("abc"[s] for s, _ in picks[a:b]) for a, b in ((0, 1000), (1000, 3001), (3001, 4000))]
    # at row 1,000 899.9 and 0.1 are asked of `a` and `c`, of which only `c` has a share next
    assert Counter(names[0]) == {"a": 899, "b": 100, "c": 1} and set(names[1]) == set("bc") and set(names[2]) == {"a"}
    assert abs(names[1].count("b") - names[1].count("c")) <= 1
    for source in range(3):  # and none is left out or comes twice
        assert sorted(n for s, n in picks if s == source) == list(range(mix.counts(4000)[source]))


def test_many_mixes_do_not_add_up_their_errors() -> None:
    """A phase of 7 samples after the other, with shares of thirds: each source stays within one sample of its shares,
    though none of the phases can give it exactly."""
    weights = [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.001}]
    later = tuple((7 * i, weights[i % 2]) for i in range(1, 60))
    mix = Mix(dict.fromkeys("abc", 50), MixSettings(weights[0], anneal=later))
    assert len(mix.segments) == 60 and furthest(mix, 420)[0] < 1


def test_counts_are_those_of_the_samples() -> None:
    rows = {"a": 30, "b": 700, "c": 900}
    mix = Mix(rows, MixSettings({"a": 1, "b": 2, "c": 3}, {"a": 2.0}, anneal=((777, {"b": 1.0, "c": 9.0}),)))
    blocks = Blocks({"a": 1.0, "b": 2.5}, seed=4)
    for each, last in ((mix, 2100), (blocks, 2100)):
        had = Counter()
        for sample in range(last + 1):
            if sample % 350 == 0:
                assert each.counts(sample) == [had[i] for i in range(len(each.names))]
            had[each.source_of(sample)[0]] += 1
    assert mix.counts(10 * PERIOD + 5) == [60, *mix.counts(10 * PERIOD + 5)[1:]]
    assert sum(mix.counts(10 * PERIOD + 5)) == 10 * PERIOD + 5


def test_blocks_are_what_runs_had_before() -> None:
    blocks = Blocks({"a": 3.0, "b": 1.0}, seed=5)
    assert [blocks.source_of(n) for n in range(50)] == [source_of(n, (3.0, 1.0), 5) for n in range(50)]


@pytest.mark.parametrize(
    ("weights", "sizes", "languages", "temperature", "shares"),
    [
        ({"a": 1, "b": 1}, {"a": 900, "b": 100}, {}, 2.0, [3 / 4, 1 / 4]),  # 30 : 10
        ({"a": 1, "b": 1}, {"a": 900, "b": 100}, {}, 1.0, [9 / 10, 1 / 10]),
        ({"a": 1, "b": 1}, {"a": 900, "b": 100}, {}, 1e9, [1 / 2, 1 / 2]),
        ({"a": 4, "b": 1}, {"a": 100, "b": 100}, {}, 2.0, [2 / 3, 1 / 3]),  # a weight is so many tokens more
        # en 600 + 300, de 100: 30 : 10, of which the first share theirs by 2 : 1
        ({"a": 1, "b": 1, "c": 1}, {"a": 600, "b": 300, "c": 100}, {"a": "en", "b": "en"}, 2.0, [1 / 2, 1 / 4, 1 / 4]),
        ({"a": 1, "b": 1}, {"a": 10**15, "b": 10**5}, {}, 0.02, [1.0, 0.0]),
    ],
)
def test_temperature(
    weights: Mapping, sizes: Mapping, languages: Mapping, temperature: float, shares: list[float]
) -> None:
    found = tempered(weights, sizes, languages, temperature)
    assert [value / sum(found.values()) for value in found.values()] == pytest.approx(shares)


def test_temperature_mixes_by_tokens_and_not_by_rows() -> None:
    mix = Mix({"a": 9, "b": 9}, MixSettings(temperature=2.0), {"a": 900, "b": 100})
    assert mix.shares(0) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"a": 1.0, "b": 1e-6}}, r"from sample 0: the weight of 'b' is 1e-06 of 1.* at least 1/65536"),
        ({"anneal": ((5, {"x": 1.0}),)}, r"the mix from sample 5 names 'x', but the shards hold \['a', 'b'\]"),
        ({"anneal": ((5, {"a": 1.0, "b": 1e-6}),)}, r"from sample 5: the weight of 'b'"),
    ],
)
def test_mixes_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mix({"a": 10, "b": 10}, MixSettings(**changes))


def test_what_a_user_is_told() -> None:
    mix = Mix({"a": 10, "b": 100}, MixSettings({"a": 1.0, "b": 3.0}, {"a": 2.0}))
    assert list(mix.lines({"a": 10, "b": 100}, 200)) == [
        "mix from row 0: a 25.00%, b 75.00%",
        f"mix from row {mix.segments[1].first}: b 100.00%",
        "epochs after 200 rows: a 2.00, b 1.80",
    ]
    assert Fraction(mix.segments[1].first, 80) > Fraction(19, 20)
