"""Decides which source a sample is taken from where shares change over a run: by caps on epochs, or by annealing.

Each run of samples with the same shares is a `Segment`. Within it the sources come as evenly as they can: after any
number of samples each source has had what its shares so far add up to, within one sample (a solution of the chairman
assignment problem: Tijdeman, Discrete Mathematics 32, 1980). All are pure functions of the sample number.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from llmtrain.data.sampler import BLOCK, block_counts, rounded_counts, source_of, sources_of

PERIOD = 2**16  # samples after which an order of sources repeats; shares are rounded to whole parts of it


@dataclass(frozen=True)
class MixSettings:
    """Says how sources are mixed. Sources that `weights` does not name do not exist."""

    weights: Mapping[str, float] | None = None  # by source; None = by size
    max_epochs: Mapping[str, float] = field(default_factory=dict)  # times that a source is seen at most
    languages: Mapping[str, str] = field(default_factory=dict)  # of sources: those of one language are a group
    temperature: float | None = None  # None = the shares are the weights
    anneal: Sequence[tuple[int, Mapping[str, float]]] = ()  # (first sample, weights) of later mixes, rising
    samples: int = 0  # that the run takes; more need not be there


@dataclass(frozen=True)
class Segment:
    """Holds consecutive samples with the same shares."""

    first: int  # sample
    counts: tuple[int, ...]  # samples of each source in PERIOD samples; 0 = none
    debts: tuple[int, ...]  # what each source lacks at `first`, in 1/PERIOD of a sample, as if all had been exact
    taken: tuple[int, ...]  # samples of each source before `first`


class Mix:
    """Maps a sample number to (source, number of the sample within that source). Raises ValueError when a share is too
    small, or the caps leave fewer samples than the run takes.

    Example: Mix({"a": 10, "b": 90}, MixSettings({"a": 3, "b": 1}, {"a": 2.0})) gives 3 samples of `a` for each of `b`
    until `a` has had 20, and then only `b`.
    """

    def __init__(self, rows: Mapping[str, int], settings: MixSettings, tokens: Mapping[str, int] | None = None) -> None:
        self.names, self.settings = tuple(rows), settings
        self.phases = [(0, first_weights(rows, settings, tokens or rows)), *settings.anneal]
        for start, weights in self.phases:
            if unknown := sorted(weights.keys() - rows.keys()):
                raise ValueError(
                    f"the mix from sample {start} names {unknown[0]!r}, but the shards hold {sorted(rows)}; correct it"
                )
        caps = settings.max_epochs
        self.caps = [int(caps[name] * rows[name]) if name in caps else None for name in self.names]
        if none := [name for name, cap in zip(self.names, self.caps, strict=True) if cap == 0]:
            raise ValueError(
                f"data.sources.{none[0]}.max_epochs={caps[none[0]]:g}: must leave at least one of its "
                f"{rows[none[0]]} rows; raise it, or remove the source"
            )
        self.segments, self.end = self._laid_out()
        if self.end is not None and self.end < settings.samples:
            raise ValueError(
                f"data.sources: max_epochs leaves {self.end:,} rows, and the run takes {settings.samples:,}; raise "
                "max_epochs, leave it out for one source, give more text, or lower train.steps"
            )

    def source_of(self, sample: int) -> tuple[int, int]:
        """Returns (source, number of the sample within that source); each number comes exactly once."""
        if self.end is not None and sample >= self.end:
            raise ValueError(f"sample {sample}: data.sources' max_epochs leaves only {self.end:,} rows; raise it")
        segment = self.segments[bisect_right(self.segments, sample, key=lambda each: each.first) - 1]
        period, slot = divmod(sample - segment.first, PERIOD)
        order = order_of(segment.counts, segment.debts)
        source = int(order.sources[slot])
        return source, segment.taken[source] + period * segment.counts[source] + int(order.ordinals[slot])

    def sources_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `source_of` of each of an array of samples."""
        pairs = np.array([self.source_of(sample) for sample in samples.tolist()], np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def counts(self, samples: int) -> list[int]:
        """Returns how many of the first `samples` samples come from each source."""
        return list(taken_until(self.segments, samples))

    def shares(self, sample: int) -> dict[str, float]:
        """Returns the shares that hold at a sample."""
        segment = self.segments[bisect_right(self.segments, sample, key=lambda each: each.first) - 1]
        return {name: count / PERIOD for name, count in zip(self.names, segment.counts, strict=True)}

    def lines(self, rows: Mapping[str, int], samples: int) -> Iterator[str]:
        """Yields what a user is told: the shares from each sample on, and the epochs over a run of `samples`."""
        for segment in self.segments:
            if segment.first < max(1, samples):
                shares = (f"{name} {share:.2%}" for name, share in self.shares(segment.first).items() if share)
                yield f"mix from row {segment.first:,}: {', '.join(shares)}"
        epochs = (
            f"{name} {count / rows[name]:.2f}" for name, count in zip(self.names, self.counts(samples), strict=True)
        )
        yield f"epochs after {samples:,} rows: {', '.join(epochs)}"

    def _laid_out(self) -> tuple[list[Segment], int | None]:
        """Returns all segments, and the number of samples behind which no source is left; None = there is no end."""
        zero = (0,) * len(self.names)
        segments, debts, taken = list[Segment](), zero, zero
        for (start, weights), (stop, _) in zip(self.phases, [*self.phases[1:], (None, {})], strict=True):
            while stop is None or start < stop:
                counts = self._counts(start, weights, taken)
                if not any(counts):
                    return segments, start
                segments.append(Segment(start, counts, settled(debts, counts), taken))
                end = min((at for at in (stop, self._exhausted(segments[-1])) if at is not None), default=None)
                if end is None:
                    return segments, None
                taken = taken_until(segments, end)
                debts = debts_until(segments[-1], end, taken)
                start = end
        raise AssertionError("the last mix has no end but its caps")

    def _counts(self, start: int, weights: Mapping[str, float], taken: Sequence[int]) -> tuple[int, ...]:
        """Returns the samples of each source in a period: those that have had all of their epochs have none."""
        over = [cap is not None and had >= cap for cap, had in zip(self.caps, taken, strict=True)]
        left = [0.0 if full else weights.get(name, 0.0) for name, full in zip(self.names, over, strict=True)]
        if not any(left):
            return (0,) * len(left)
        counts = rounded_counts(tuple(left), PERIOD)
        small = [name for name, share, count in zip(self.names, left, counts, strict=True) if share and not count]
        if small:
            raise ValueError(
                f"the mix from sample {start}: the weight of {small[0]!r} is {left[self.names.index(small[0])]:g} of "
                f"{sum(left):g} in all: must be at least 1/{PERIOD} of the sum; raise it, or set the weight to 0"
            )
        return counts

    def _exhausted(self, segment: Segment) -> int | None:
        """Returns the sample from which on a source of the segment has no row left, None if there is no such."""
        ends = []
        for source, (cap, count) in enumerate(zip(self.caps, segment.counts, strict=True)):
            if cap is not None and count:
                period, ordinal = divmod(cap - segment.taken[source] - 1, count)
                slots = np.flatnonzero(order_of(segment.counts, segment.debts).sources == source)
                ends.append(segment.first + period * PERIOD + int(slots[ordinal]) + 1)
        return min(ends, default=None)


class Blocks:
    """Maps a sample number to (source, number of the sample within that source) as `sampler.source_of` does, which
    mixes sources at random within blocks of 1,000 samples: what a run without caps, temperature and annealing has."""

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self.names, self.weights, self.seed = tuple(weights), tuple(weights.values()), seed
        self.end = None  # samples never end

    def source_of(self, sample: int) -> tuple[int, int]:
        """Returns (source, number of the sample within that source); each number comes exactly once."""
        return source_of(sample, self.weights, self.seed)

    def sources_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `source_of` of each of an array of samples."""
        return sources_of(samples, self.weights, self.seed)

    def counts(self, samples: int) -> list[int]:
        """Returns how many of the first `samples` samples come from each source."""
        blocks, slots = divmod(samples, BLOCK)
        part = np.bincount(block_sources(blocks, self.weights, self.seed)[:slots], minlength=len(self.names))
        return [blocks * count + int(more) for count, more in zip(block_counts(self.weights), part, strict=True)]


@lru_cache(maxsize=2)
def block_sources(block: int, weights: tuple[float, ...], seed: int) -> np.ndarray:
    """Returns the source of each sample of a block, [BLOCK]."""
    return sources_of(block * BLOCK + np.arange(BLOCK), weights, seed)[0]


@dataclass(frozen=True)
class Order:
    """Holds the order of sources in a period."""

    sources: np.ndarray  # [PERIOD] uint16
    ordinals: np.ndarray  # [PERIOD] int32: how often the source came before in the period


@lru_cache(maxsize=8)
def order_of(counts: tuple[int, ...], debts: tuple[int, ...]) -> Order:
    """Returns an order in which each source is never a whole sample behind or ahead of its share.

    The j-th sample of a source may come when its share, with what it lacked at the start, has passed j - 1, and must
    have come when it reaches j. Of those that may come the one that must come first is taken, which misses none: in any
    span of slots no more samples must come than it has slots, and then earliest-deadline-first is a solution.
    """
    sources, ordinals = np.empty(PERIOD, np.uint16), np.empty(PERIOD, np.int32)
    waiting = [(release(1, counts[source], debts[source]), source, 1) for source in np.flatnonzero(counts).tolist()]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    for slot in range(PERIOD):
        while waiting and waiting[0][0] <= slot:
            _, source, number = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline(number, counts[source], debts[source]), source, number))
        _, source, number = heapq.heappop(ready)
        sources[slot], ordinals[slot] = source, number - 1
        if number < counts[source]:
            heapq.heappush(waiting, (release(number + 1, counts[source], debts[source]), source, number + 1))
    return Order(sources, ordinals)


def release(number: int, count: int, debt: int) -> int:
    """Returns the first slot that may have the source's sample of this number, counted from 1."""
    return max(0, (PERIOD * (number - 1) - debt) // count)


def deadline(number: int, count: int, debt: int) -> int:
    """Returns the number of slots within which the source's sample of this number must have come."""
    return min(PERIOD, -((debt - PERIOD * number) // count))


def taken_until(segments: Sequence[Segment], sample: int) -> tuple[int, ...]:
    """Returns how many of the samples before `sample` come from each source."""
    segment = segments[max(0, bisect_right(segments, sample, key=lambda each: each.first) - 1)]
    periods, slots = divmod(sample - segment.first, PERIOD)
    part = np.bincount(order_of(segment.counts, segment.debts).sources[:slots], minlength=len(segment.counts))
    return tuple(
        had + periods * count + int(more) for had, count, more in zip(segment.taken, segment.counts, part, strict=True)
    )


def debts_until(segment: Segment, sample: int, taken: Sequence[int]) -> tuple[int, ...]:
    """Returns what each source lacks at a sample, the end of the segment."""
    samples = sample - segment.first
    return tuple(
        debt + count * samples - PERIOD * (now - had)
        for debt, count, had, now in zip(segment.debts, segment.counts, segment.taken, taken, strict=True)
    )


def settled(debts: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    """Returns the debts of the sources that go on, which add up to nothing: what the others had too much of, or lack,
    is made up by those that lack most, or have had most."""
    left = [debt if count else 0 for debt, count in zip(debts, counts, strict=True)]
    surplus = sum(left)
    sign = 1 if surplus > 0 else -1
    for source in sorted(range(len(left)), key=lambda each: -sign * left[each]):
        change = min(sign * surplus, max(0, sign * left[source]))
        left[source], surplus = left[source] - sign * change, surplus - sign * change
    return tuple(left)


def first_weights(rows: Mapping[str, int], settings: MixSettings, tokens: Mapping[str, int]) -> Mapping[str, float]:
    """Returns the weights of the sources at the start of a run."""
    if settings.temperature is None:
        return rows if settings.weights is None else settings.weights
    weights = settings.weights or dict.fromkeys(rows, 1.0)
    return tempered(weights, tokens, settings.languages, settings.temperature)


def tempered(
    weights: Mapping[str, float], sizes: Mapping[str, int], languages: Mapping[str, str], temperature: float
) -> dict[str, float]:
    """Returns shares of sources: each language, or source without one, has its size ^ (1 / temperature) (arXiv
    1911.02116, section 3.1), its sources share it by theirs. A source's size is its weight times its tokens."""
    grown = {name: weight * sizes[name] for name, weight in weights.items()}
    groups = {name: languages.get(name, f"source {name}") for name in grown}
    totals = dict.fromkeys(groups.values(), 0.0)
    for name, size in grown.items():
        totals[groups[name]] += size
    largest = max(totals.values())  # so that no power overflows
    return {
        name: size / totals[groups[name]] * (totals[groups[name]] / largest) ** (1 / temperature)
        for name, size in grown.items()
    }
