"""Unigram (arXiv 1804.10959) with the library's trainer, and two of its ways put right.

It begins with strings that go on in at least two ways, among words that are each counted once. A word that never is the
beginning of a longer one, as ` =`, is then no candidate however often it occurs. So each word is given a second time
with a mark behind it, and what was learned with the mark in it is dropped.

And it orders equal pieces, and scores bytes that it has not seen, by a hash table that differs from run to run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, repeat

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llmtrain.config.specials import NUM_BYTES

MARK = "Ā"  # byte 0, which text hardly has
SPARE = 1.2  # pieces to learn for each that is wanted: those with the mark go, and the least likely
CHARACTER_STEP = 0.0001  # between the scores of bytes that the library has not seen


def train_unigram(
    texts: Iterable[str], words: pre_tokenizers.PreTokenizer, vocab_size: int, specials: list[str]
) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens: fewer where the text does not yield them. In memory are the different
    words of `texts`, as `words` cuts and spells them in bytes, with their counts."""
    counts = Counter(word for text in texts for word, _ in words.pre_tokenize_str(text))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    common = {"special_tokens": specials, "initial_alphabet": alphabet, "show_progress": False}
    trained = Tokenizer(models.Unigram())
    trained.train_from_iterator(marked(counts), trainers.UnigramTrainer(vocab_size=round(SPARE * vocab_size), **common))
    state = json.loads(trained.to_str())
    vocabulary = state["model"]["vocab"]
    kept = chosen(dict(map(tuple, vocabulary[len(specials) :])), vocab_size - len(specials))
    state["model"]["vocab"] = [*vocabulary[: len(specials)], *([piece, score] for piece, score in kept)]
    return Tokenizer.from_str(json.dumps(state))


def marked(counts: Counter[str]) -> Iterator[str]:
    """Each word as often as it occurs, and those that are not unique once more with the mark."""
    yield from chain.from_iterable(repeat(word, count) for word, count in counts.items())
    yield from (word + MARK for word, count in counts.items() if count > 1 and len(word) > 1)


def chosen(scores: dict[str, float], size: int) -> list[tuple[str, float]]:
    """All bytes and the most likely pieces without the mark, `size` in all, in an order that is always the same. Bytes
    without a score of their own get the lowest; scores are rounded."""
    lowest = min(scores.values())
    unseen = lowest + NUM_BYTES * CHARACTER_STEP
    singles = {piece: lowest if score < unseen else score for piece, score in scores.items() if len(piece) == 1}
    longer = {piece: score for piece, score in scores.items() if len(piece) > 1 and MARK not in piece}
    return ordered(singles | dict(ordered(longer)[: size - len(singles)]))


def ordered(scores: dict[str, float]) -> list[tuple[str, float]]:
    """The most likely first."""
    return sorted(((piece, round(score, 4)) for piece, score in scores.items()), key=lambda p: (-p[1], p[0]))
