"""Decides which source a sample is taken from where shares change over a run: by caps on epochs, or by annealing.

Each run of samples with the same shares is a `Segment`; where they lie follows from the weights and caps alone. The
sources come as evenly as they can: after any number of samples each source has had what its shares so far add up to,
within one sample, also where shares change (the chairman assignment problem: Tijdeman, Discrete Mathematics 32, 1980,
whose weights may differ from one assignment to the next). All are pure functions of the sample number.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import numpy as np

from llmtrain.data.sampler import BLOCK, block_counts, rounded_counts, source_of, sources_of

PERIOD = 2**16  # samples after which an order of sources repeats; shares are rounded to whole parts of it
ORDER = 2  # of sources where shares change, a part of what a run is: raised when it changes
NEVER = 2**62
Span = TypeVar("Span", "Segment", "Chunk")


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
    asked: tuple[int, ...]  # what the shares of each source before `first` add up to, in 1/PERIOD of a sample
    passing: bool = False  # one sample, of which the share of a source is what is left of its epochs


@dataclass(frozen=True)
class Chunk:
    """Holds an order of sources, which repeats until the next chunk."""

    first: int  # sample
    sources: np.ndarray  # [samples] uint16
    ordinals: np.ndarray  # [samples] int32: how often the source came before in the order
    counts: tuple[int, ...]  # samples of each source in the order
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
        self.chunks = chunks_of(self.segments, self.end)
        if self.end is not None and self.end < settings.samples:
            raise ValueError(
                f"data.sources: max_epochs leaves {self.end:,} rows, and the run takes {settings.samples:,}; raise "
                "max_epochs, leave it out for one source, give more text, or lower train.steps"
            )

    def source_of(self, sample: int) -> tuple[int, int]:
        """Returns (source, number of the sample within that source); each number comes exactly once."""
        if self.end is not None and sample >= self.end:
            raise ValueError(f"sample {sample}: data.sources' max_epochs leaves only {self.end:,} rows; raise it")
        chunk = at(self.chunks, sample)
        repeat, slot = divmod(sample - chunk.first, len(chunk.sources))
        source = int(chunk.sources[slot])
        return source, chunk.taken[source] + repeat * chunk.counts[source] + int(chunk.ordinals[slot])

    def sources_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `source_of` of each of an array of samples."""
        pairs = np.array([self.source_of(sample) for sample in samples.tolist()], np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def counts(self, samples: int) -> list[int]:
        """Returns how many of the first `samples` samples come from each source."""
        chunk = at(self.chunks, samples)
        repeats, slots = divmod(samples - chunk.first, len(chunk.sources))
        part = np.bincount(chunk.sources[:slots], minlength=len(self.names)).tolist()
        return [had + repeats * n + more for had, n, more in zip(chunk.taken, chunk.counts, part, strict=True)]

    def shares(self, sample: int) -> dict[str, float]:
        """Returns the shares that hold at a sample."""
        segment = at(self.segments, sample)
        return {name: count / PERIOD for name, count in zip(self.names, segment.counts, strict=True)}

    def lines(self, rows: Mapping[str, int], samples: int) -> Iterator[str]:
        """Yields what a user is told: the shares from each sample on, and the epochs over a run of `samples`."""
        for segment in self.segments:
            if segment.first < max(1, samples) and not segment.passing:
                shares = (f"{name} {share:.2%}" for name, share in self.shares(segment.first).items() if share)
                yield f"mix from row {segment.first:,}: {', '.join(shares)}"
        epochs = (
            f"{name} {count / rows[name]:.2f}" for name, count in zip(self.names, self.counts(samples), strict=True)
        )
        yield f"epochs after {samples:,} rows: {', '.join(epochs)}"

    def _laid_out(self) -> tuple[tuple[Segment, ...], int | None]:
        """Returns all segments, and the number of samples behind which no source is left; None = there is no end."""
        segments, asked = list[Segment](), (0,) * len(self.names)
        for (start, weights), (stop, _) in zip(self.phases, [*self.phases[1:], (None, {})], strict=True):
            while stop is None or start < stop:
                room = [None if cap is None else cap * PERIOD - had for cap, had in zip(self.caps, asked, strict=True)]
                counts = self._counts(start, weights, room)
                whole = [left // n for left, n in zip(room, counts, strict=True) if left is not None and n]
                passing = min(whole, default=1) == 0
                counts = narrowed(counts, room) if passing else counts
                if sum(counts) < PERIOD:
                    return tuple(segments), start
                segments.append(Segment(start, counts, asked, passing))
                ends = [end for end in (stop, *(start + max(1, samples) for samples in whole)) if end is not None]
                if not ends:
                    return tuple(segments), None
                samples, start = min(ends) - start, min(ends)
                asked = tuple(had + samples * n for had, n in zip(asked, counts, strict=True))
        raise AssertionError("the last mix has no end but its caps")

    def _counts(self, start: int, weights: Mapping[str, float], room: Sequence[int | None]) -> tuple[int, ...]:
        """Returns the samples of each source in a period: those without room for more epochs have none."""
        left = [weights.get(name, 0.0) if each != 0 else 0.0 for name, each in zip(self.names, room, strict=True)]
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


def at(spans: Sequence[Span], sample: int) -> Span:
    """Returns the segment or chunk that a sample lies in; the first before it, the last behind it."""
    return spans[max(0, bisect_right(spans, sample, key=lambda each: each.first) - 1)]


def narrowed(counts: Sequence[int], room: Sequence[int | None]) -> tuple[int, ...]:
    """Returns the counts of one sample, in which no source gets more than it has room for; the others share the rest.
    They add up to less than PERIOD where no source has more."""
    full: dict[int, int] = {}
    while free := {source: n for source, n in enumerate(counts) if n and source not in full}:
        shares = rounded_counts(tuple(free.values()), PERIOD - sum(full.values()))
        given = dict(zip(free, shares, strict=True))
        over = {source: left for source in free if (left := room[source]) is not None and given[source] > left}
        if not over:
            return tuple((full | given).get(source, 0) for source in range(len(counts)))
        full |= over
    return tuple(full.get(source, 0) for source in range(len(counts)))


@lru_cache(maxsize=8)
def chunks_of(segments: tuple[Segment, ...], end: int | None) -> tuple[Chunk, ...]:
    """Returns the order of the sources.

    In a segment of more than two periods it repeats, up to the last but one, once each source has had its exact share
    of a period: all is then as it was before, and what is due lies within the segment.
    """
    chunks, taken, last = list[Chunk](), (0,) * len(segments[0].counts), segments[-1]
    if end is not None:  # behind which nothing is asked
        asked = (had + (end - last.first) * n for had, n in zip(last.asked, last.counts, strict=True))
        segments = (*segments, Segment(end, (0,) * len(last.counts), tuple(asked)))
    for number, segment in enumerate(segments if end is None else segments[:-1]):
        stop = segments[number + 1].first if number + 1 < len(segments) else None
        start = segment.first
        while stop is None or start < stop:
            samples = PERIOD if stop is None or stop - start > 2 * PERIOD else stop - start
            chunk = ordered(segments, number, start, samples, taken)
            chunks.append(chunk)
            steady = samples == PERIOD and chunk.counts == segment.counts
            if steady and stop is None:
                break
            repeats = (stop - start) // PERIOD - 1 if steady and stop - start > 2 * PERIOD else 1
            start += repeats * samples
            taken = tuple(had + repeats * n for had, n in zip(taken, chunk.counts, strict=True))
    return tuple(chunks)


def ordered(segments: Sequence[Segment], number: int, first: int, samples: int, taken: tuple[int, ...]) -> Chunk:
    """Returns the order of so many samples of a segment, before which the sources had `taken`.

    The j-th sample of a source may come when its shares pass j - 1, and must have come when they reach j. Of those that
    may come the one that must come first is taken. This misses none: between two samples s < t those of a source that
    may come from s on and must come by t are at most floor(x(t)) - ceil(x(s)), x being the sum of its shares, which
    over all sources is at most t - s; then earliest-deadline-first is a solution. And one may always come: the sum of
    ceil(x(t + 1)) is at least t + 1. A source whose share is now 0, but whose x is no whole number, may be owed a
    sample: others come a little early in its place, and only where none of them has one left, it does.
    """
    sources, ordinals, had = np.empty(samples, np.uint16), np.empty(samples, np.int32), list(taken)
    ready, waiting = list[tuple[int, int]](), list[tuple[int, int]]()

    def wait(source: int) -> None:
        begin = reached(segments, number, source, PERIOD * had[source] + 1) - 1
        if begin < NEVER - 1:
            heapq.heappush(waiting, (begin, source))

    for source in np.flatnonzero(segments[number].counts).tolist():
        wait(source)
    for slot in range(samples):
        while waiting and (waiting[0][0] <= first + slot or not ready):
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (reached(segments, number, source, PERIOD * (had[source] + 1)), source))
        source = heapq.heappop(ready)[1] if ready else owed(segments[number], had)
        sources[slot], ordinals[slot] = source, had[source] - taken[source]
        had[source] += 1
        if segments[number].counts[source]:
            wait(source)
    return Chunk(first, sources, ordinals, tuple(now - then for now, then in zip(had, taken, strict=True)), taken)


def reached(segments: Sequence[Segment], number: int, source: int, amount: int) -> int:
    """Returns the sample before which the shares of a source add up to an amount, in 1/PERIOD of a sample, at the
    earliest the first of the segment of this number; NEVER where they do not."""
    for each in range(number, len(segments)):
        segment = segments[each]
        count, missing = segment.counts[source], amount - segment.asked[source]
        if missing <= 0:
            return segment.first
        if count:
            sample = segment.first - (-missing // count)
            if each + 1 == len(segments) or sample <= segments[each + 1].first:
                return sample
    return NEVER


def owed(segment: Segment, had: Sequence[int]) -> int:
    """Returns the source without a share in the segment that lacks most."""
    return max(
        range(len(had)), key=lambda source: (not segment.counts[source], segment.asked[source] - PERIOD * had[source])
    )


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
        name: size / totals[groups[name]] * (totals[groups[name]] / largest) ** (1 / temperature) if size else 0.0
        for name, size in grown.items()
    }
