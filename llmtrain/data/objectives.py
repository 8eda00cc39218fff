"""Implements pretraining objectives besides next-token prediction: fill-in-the-middle and span corruption.

Both rearrange one document within its row, in place. The sentinels and the closing end-of-text token replace the
document's last tokens, so the row keeps its width and the other documents keep their places. A document that the row's
ends cut counts as a document. Documents are split between tokens, not between characters as in arXiv 2207.14255.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmtrain.config.schema import DataConfig
from llmtrain.config.specials import FIM, SPANS, sentinels
from llmtrain.data.sampler import derive, scramble
from llmtrain.data.tokenizer import Tokenizer

SHORTEST_TOKENS = 16  # shorter documents stay unchanged: sentinels would replace a quarter of them or more

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's step


@dataclass(frozen=True)
class Objectives:
    """Decides which documents are rearranged and how, as a pure function of (seed, row): the same on any number of
    ranks."""

    data: DataConfig
    fim_ids: tuple[int, ...]  # prefix, middle, suffix
    span_ids: tuple[int, ...]
    eos_id: int
    seed: int
    prefix_ids: tuple[int, ...] = ()  # what every document begins with (BOS), which stays where it is

    def apply(self, tokens: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens [T], trained [T] bool) for a row of documents that each end with `eos_id`.

        `row` must be a number that no other row of the run has.
        """
        tokens, trained = tokens.copy(), np.ones(len(tokens), bool)
        for number, (start, end) in enumerate(documents(tokens, self.eos_id)):
            seed = derive(self.seed, f"{row}/{number}")
            if self.prefix_ids and tuple(tokens[start : start + len(self.prefix_ids)]) == self.prefix_ids:
                start += len(self.prefix_ids)
            chosen = uniform(seed, "objective") - self.data.span_share
            if end - start < SHORTEST_TOKENS or chosen >= self.data.fim_share:
                continue
            if chosen >= 0:
                tokens[start:end] = self.fill_in_the_middle(tokens[start:end], seed)
            else:
                context, targets = self.corrupt(tokens[start:end], seed)
                tokens[start:end] = np.hstack([context, targets])
                trained[start : start + len(context)] = False
        return tokens, trained

    def fill_in_the_middle(self, document: np.ndarray, seed: int) -> np.ndarray:
        """Returns the document, split at two uniformly random places and rearranged, with its length unchanged.

        Each of the three pieces may be empty.
        """
        body = document[: len(document) - len(FIM) - 1]
        cuts = sorted(int(uniform(seed, name) * (len(body) + 1)) for name in ("first cut", "second cut"))
        spm = uniform(seed, "spm") < self.data.fim_spm_share
        return np.hstack([fim(body, cuts, spm, self.fim_ids), self.eos_id])

    def corrupt(self, document: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (context, targets), together as long as `document`.

        Spans are drawn as in T5: hidden and kept tokens are each split into the same number of pieces at random places,
        and the pieces alternate.
        """
        count = span_count(len(document), self.data.span_noise, self.data.span_mean_tokens)
        body = document[: len(document) - 2 * count - 1]
        num_hidden = min(max(round(self.data.span_noise * len(body)), count), len(body) - count)
        hidden = random_lengths(num_hidden, count, derive(seed, "hidden"))
        kept = random_lengths(len(body) - num_hidden, count, derive(seed, "kept"))
        context, targets = corrupted(body, kept, hidden, self.span_ids)
        return context, np.hstack([targets, self.eos_id])


def objectives(data: DataConfig, tokenizer: Tokenizer, seed: int) -> Objectives | None:
    """Returns the objectives of a configuration, None when all text is trained unchanged.

    Raises ValueError when the tokenizer lacks a sentinel.
    """
    needed = sentinels(data)
    if not needed:
        return None
    ids = dict(zip(needed, tokenizer.special_ids(needed), strict=True))
    fim_ids, span_ids = (tuple(ids[name] for name in names if name in ids) for names in (FIM, SPANS))
    return Objectives(
        data, fim_ids, span_ids, tokenizer.eos_id, derive(seed, "objectives"), tuple(tokenizer.prefix_ids)
    )


def documents(tokens: np.ndarray, eos_id: int) -> Iterator[tuple[int, int]]:
    """Returns [start, end) of each document of a row, its end-of-text token included if that is in the row."""
    ends = (np.flatnonzero(tokens == eos_id) + 1).tolist()
    starts = [0, *ends]
    return ((start, end) for start, end in zip(starts, [*ends, len(tokens)], strict=True) if start < end)


def fim(body: np.ndarray, cuts: Sequence[int], spm: bool, ids: Sequence[int]) -> np.ndarray:
    """Returns `body`, split into prefix, middle and suffix, as fill-in-the-middle arranges it (arXiv 2207.14255).

    PSM: <prefix> prefix <suffix> suffix <middle> middle. SPM, in the form that is trained jointly with PSM (its
    appendix D, variant 2): <prefix> <suffix> suffix <middle> prefix middle. All tokens are trained.
    """
    prefix, middle, suffix = np.split(body, cuts)
    prefix_id, middle_id, suffix_id = ids
    if spm:
        return np.hstack([prefix_id, suffix_id, suffix, middle_id, prefix, middle])
    return np.hstack([prefix_id, prefix, suffix_id, suffix, middle_id, middle])


def corrupted(
    body: np.ndarray, kept: Sequence[int], hidden: Sequence[int], ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (context, targets) of span corruption (arXiv 1910.10683) for a decoder, which reads them in this order.

    `body` is kept[0] tokens, hidden[0] tokens, kept[1] tokens, ... The context is the kept pieces, with a sentinel for
    each hidden one; it is not trained. The targets are the hidden pieces, each after its sentinel. T5's closing
    sentinel is left out, the end-of-text token follows instead.
    """
    pieces = np.split(body, np.cumsum(np.stack([kept, hidden], axis=1).ravel())[:-1])
    context = [part for piece, i in zip(pieces[0::2], ids, strict=False) for part in (piece, i)]
    targets = [part for piece, i in zip(pieces[1::2], ids, strict=False) for part in (i, piece)]
    return np.hstack(context), np.hstack(targets)


def span_count(length: int, noise: float, mean_tokens: float) -> int:
    """Returns how many spans to hide, such that all tokens, two sentinels a span and the end token take `length`
    tokens.

    It solves count = noise / mean x (length - 1 - 2 count), within the limits that sentinels and text set.
    """
    count = round((length - 1) * noise / (mean_tokens + 2 * noise))
    return min(max(count, 1), len(SPANS), (length - 1) // 4)


def random_lengths(total: int, parts: int, seed: int) -> list[int]:
    """Returns `total` as a sum of `parts` positive numbers, all such sums equally likely."""
    order = np.argsort(scramble(np.arange(1, total, dtype=np.uint64) * GOLDEN + np.uint64(seed)), kind="stable")
    return np.diff([0, *np.sort(order[: parts - 1] + 1), total]).tolist()


def uniform(seed: int, name: str) -> float:
    """Returns a number in [0, 1), a hash of seed and purpose."""
    return (derive(seed, name) >> 11) / 2**53
