"""Trains Unigram (arXiv 1804.10959) with the library's trainer, and corrects two of its flaws.

The trainer starts from strings that continue in at least two ways, in a list of words that holds each once. A word that
never begins a longer one, as ` =`, is then no candidate however often it occurs. So each word is given a second time
with a mark appended, and pieces with the mark are dropped afterwards.

It also orders pieces of equal score, and scores unseen bytes, by a hash table that differs from run to run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, repeat

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llmtrain.config.specials import NUM_BYTES

MARK = "Ā"  # byte 0, which hardly occurs in text
SPARE = 1.2  # pieces learned for each that is wanted: those with the mark and the least likely are dropped
CHARACTER_STEP = 0.0001  # difference between the scores of unseen bytes in the library


def train_unigram(
    texts: Iterable[str], words: pre_tokenizers.PreTokenizer, vocab_size: int, specials: list[str]
) -> Tokenizer:
    """Returns a tokenizer of at most `vocab_size` tokens: fewer where the text does not yield them.

    `words` splits `texts` and spells the words in bytes; memory holds the distinct words with their counts.
    """
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
    """Yields each word as often as it occurs, and each that occurs more than once also with the mark."""
    yield from chain.from_iterable(repeat(word, count) for word, count in counts.items())
    yield from (word + MARK for word, count in counts.items() if count > 1 and len(word) > 1)


def chosen(scores: dict[str, float], size: int) -> list[tuple[str, float]]:
    """Returns all bytes and the most likely pieces without the mark, `size` in all, in a deterministic order.

    Bytes that were not seen get the lowest score; scores are rounded.
    """
    lowest = min(scores.values())
    unseen = lowest + NUM_BYTES * CHARACTER_STEP
    singles = {piece: lowest if score < unseen else score for piece, score in scores.items() if len(piece) == 1}
    longer = {piece: score for piece, score in scores.items() if len(piece) > 1 and MARK not in piece}
    return ordered(singles | dict(ordered(longer)[: size - len(singles)]))


def ordered(scores: dict[str, float]) -> list[tuple[str, float]]:
    """Returns the pieces with rounded scores, the most likely first."""
    return sorted(((piece, round(score, 4)) for piece, score in scores.items()), key=lambda p: (-p[1], p[0]))
