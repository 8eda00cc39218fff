"""Plans which tokens of the samples of a prompt are computed once: what several of them begin with.

Positions are those of a sample's inputs: its prompt, then its `ids` without the last one. Position i sees those up to i
and predicts the token behind. Samples with the same inputs up to i have the same hidden state there and share it,
unless two of them train its label: each has a loss of its own, so each has a copy. What a tool wrote behind them is
shared all the same, by those whose inputs are still alike; it follows the first copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from llmtrain.types import Sample


class Stretch(NamedTuple):
    """Names neighbours in a row: positions start to stop of a sample."""

    sample: int
    branch: int  # as in `types.Batch`
    start: int
    stop: int


@dataclass(eq=False)
class Run:
    """Holds positions start to stop of a sample, which follow those before `start` of the run's parent."""

    sample: int
    start: int
    stop: int
    owners: list[int]  # of each: 1 + the number of the sample that trains its label, 0 = none does
    parent: Run | None = None
    children: list[Run] = field(default_factory=list)

    def holding(self, position: int) -> Run:
        """Returns the run in which a position of this one's samples lies."""
        run = self
        while position < run.start and run.parent is not None:
            run = run.parent
        return run

    def owner(self, position: int) -> int:
        """Returns who trains the label of a position of this run's samples."""
        run = self.holding(position)
        return run.owners[position - run.start]

    def set_owner(self, position: int, owner: int) -> None:
        run = self.holding(position)
        run.owners[position - run.start] = owner


class Fit(NamedTuple):
    """Says where a sample goes: positions before `cut` are those of `path`, but for `copies` of what others train."""

    cut: int
    path: Run | None
    taken: list[int]  # shared positions whose label nobody trained yet
    copies: list[tuple[int, int]]
    tokens: int  # that are added


class Tree:
    """Holds the samples of a group, and which of their positions are computed.

    Example: two samples of the prompt `p q`, a tool's `t u` behind the same call `c`, then `x` and `y`. Of the inputs
    p q c t u each, p, c and t are shared, q is not, as both train `c`, nor u:
        runs  sample 0: p q c t u  (q trained by 0, u too)   sample 1: u, at position 4, and a copy of q, at 1
        row   p q c t u u q
    """

    def __init__(self, samples: Sequence[Sample] = (), turns: bool = True) -> None:
        """`turns`: samples share more than their prompt."""
        self.turns = turns
        self.samples: list[Sample] = []
        self.flags: list[bytes] = []  # of each sample, `trained`
        self.main: list[Run] = []  # of each sample: the run that its last positions are in
        self.tokens = 0
        for sample in samples:
            self.add(sample)

    @property
    def trunk(self) -> int:
        """Returns how many positions nobody trains and all have: the prompt without its last token."""
        return len(self.samples[0].prompt_ids) - 1

    @property
    def seen_pairs(self) -> int:
        """Returns how many pairs of a token and one that it sees there are: the work of attention."""
        runs = self._below(self.main[0])
        return sum(run.stop * (run.stop + 1) // 2 - run.start * (run.start + 1) // 2 for run in runs)

    def fit(self, sample: Sample) -> Fit:
        """Returns where a sample would go: behind what it shares with the one that it shares most with."""
        assert sample.prompt_ids and sample.ids, "a sample has a prompt and at least one token after it"
        length = len(sample.prompt_ids) - 1 + len(sample.ids)
        if not self.samples:
            return Fit(0, None, [], [], length)
        assert sample.prompt_ids == self.samples[0].prompt_ids, "the samples of a group share their prompt"
        flags = bytes(sample.trained)
        others = zip(self.samples, self.flags, strict=True)
        cuts = [self.trunk + (_alike(*other, sample, flags) if self.turns else 0) for other in others]
        cut = max(cuts)
        path = self.main[cuts.index(cut)]
        trained = [i for i in range(self.trunk, cut) if flags[i - self.trunk]]
        taken = [i for i in trained if not path.owner(i)]
        copies = _stretches([i for i in trained if path.owner(i)])
        return Fit(cut, path, taken, copies, length - cut + sum(stop - start for start, stop in copies))

    def add(self, sample: Sample, fit: Fit | None = None) -> None:
        """Adds a sample, at the place that `fit` found for it as the tree is now."""
        cut, path, taken, copies, tokens = self.fit(sample) if fit is None else fit
        number, trunk = len(self.samples), len(sample.prompt_ids) - 1
        labels = [0] * trunk + [number + 1 if trained else 0 for trained in sample.trained]
        for position in taken:
            path.set_owner(position, number + 1)
        for start, stop in copies:
            _hang(Run(number, start, stop, labels[start:stop]), path)
        self.main.append(_hang(Run(number, cut, len(labels), labels[cut:]), path))
        self.samples.append(sample)
        self.flags.append(bytes(sample.trained))
        self.tokens += tokens

    def laid_out(self) -> tuple[list[Stretch], list[int]]:
        """Returns the row of the tree, depth first, and `ends` of each place in it, as in `types.Batch`."""
        stretches: list[Stretch] = []
        ends: list[int] = []
        self._lay(self.main[0], stretches, ends)
        return stretches, ends

    def _lay(self, run: Run, stretches: list[Stretch], ends: list[int]) -> None:
        """Adds a run and what hangs on it, the deepest first: what hangs higher does not see the run's last tokens."""
        offset, stop = len(ends) - run.start, run.stop
        stretches += self._labelled(run)
        ends += [0] * (run.stop - run.start)
        for child in sorted(run.children, key=lambda child: -child.start):
            ends[offset + child.start : offset + stop] = [len(ends)] * (stop - child.start)
            stop = child.start
            self._lay(child, stretches, ends)
        ends[offset + run.start : offset + stop] = [len(ends)] * (stop - run.start)

    def _labelled(self, run: Run) -> Iterator[Stretch]:
        """Yields a run in parts of one branch. What several share and none trains is nobody's, as is the trunk."""
        shared = max([self.trunk, *(child.start for child in run.children)])
        branches = [owner or (run.sample + 1) * (at >= shared) for at, owner in enumerate(run.owners, run.start)]
        start = run.start
        for branch, same in groupby(branches):
            stop = start + sum(1 for _ in same)
            yield Stretch(branch - 1 if branch else run.sample, branch, start, stop)
            start = stop

    def _below(self, run: Run) -> Iterator[Run]:
        yield run
        for child in run.children:
            yield from self._below(child)


def _alike(one: Sample, one_trained: bytes, other: Sample, other_trained: bytes) -> int:
    """Returns how many positions behind the trunk one sample may share with another: those with the same inputs,
    without the last of them where both train, which would all be copies."""
    shared = shared_tokens(one.ids, other.ids) if one.ids[0] == other.ids[0] else 0
    alike = min(shared + 1, len(one.ids), len(other.ids))
    return 1 + max(one_trained.rfind(0, 0, alike), other_trained.rfind(0, 0, alike))


def _hang(run: Run, path: Run | None) -> Run:
    """Hangs a run on the one of its path that holds what it follows, and returns it."""
    if path is not None:
        run.parent = path.holding(run.start - 1)
        run.parent.children.append(run)
    return run


def _stretches(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Returns where neighbours begin and stop. Example: [3, 4, 7] -> [(3, 5), (7, 8)]"""
    firsts = [i for n, i in enumerate(positions) if not n or positions[n - 1] != i - 1]
    lasts = [i for n, i in enumerate(positions, 1) if n == len(positions) or positions[n] != i + 1]
    return [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]


def shared_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens two rows begin with alike. Slices are compared, which is faster than a loop."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
