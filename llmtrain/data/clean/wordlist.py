"""Finds the words and phrases of a list in a text, by Aho and Corasick's automaton (CACM 18, 1975)."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import regex

UNSPACED = frozenset(("ja", "km", "lo", "my", "th", "zh"))
"""Languages that write no spaces between words: a listed word counts wherever it stands."""
LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z0-9-]+)?")
IGNORED = regex.compile(r"\p{Cf}+")  # invisible: joiners, soft hyphens, marks of direction
BREAKS = regex.compile(r"[\p{P}\p{Z}\p{Cc}]+")
MARKS = regex.compile(r"(\p{M}{30})\p{M}+")  # more marks on a letter (UAX 15, stream-safe) make NFKC quadratic
SYMBOL = regex.compile(r"(\p{So})")


def normalised(text: str) -> str:
    """Returns the words of a text, one space before, between and behind them: NFKC, without case and punctuation. A
    symbol such as an emoji is a word."""
    plain = IGNORED.sub("", unicodedata.normalize("NFKC", MARKS.sub(r"\1", text)).casefold())
    words = SYMBOL.sub(r" \1 ", BREAKS.sub(" ", plain)).split()
    return f" {' '.join(words)} "


class WordList:
    """Holds the listed words of one language."""

    def __init__(self, listed: list[str], spaced: bool) -> None:
        import ahocorasick

        self.spaced, self.automaton = spaced, ahocorasick.Automaton()
        for each in {normalised(word) for word in listed} - {"  ", " "}:
            word = each if spaced else each.strip()
            self.automaton.add_word(word, word)
        self.automaton.make_automaton()

    def found(self, text: str) -> tuple[int, float]:
        """Returns how many listed words and phrases a text has, and their share of its words (without spaces: of its
        characters). Of those that overlap the one that begins first counts, of these the longest."""
        own = normalised(text)
        size = own.count(" ") - 1 if self.spaced else len(own.replace(" ", ""))
        if size <= 0 or not len(self.automaton):
            return 0, 0.0
        spans = sorted((end + 1 - len(word), -end, word) for end, word in self.automaton.iter(own))
        count, covered, behind = 0, 0, 0
        for start, end, word in spans:
            if start >= behind:
                count, behind = count + 1, -end + (0 if self.spaced else 1)  # neighbours share the space between them
                covered += word.count(" ") - 1 if self.spaced else len(word.replace(" ", ""))
        return count, covered / size


def read_lists(directory: str) -> dict[str, WordList]:
    """Returns the lists in a directory, by the language code that names their file; a word or phrase a line, UTF-8.
    Other files, with another kind of name, are left alone. Raises ValueError when there is no list or one is broken."""
    place = Path(directory)
    if not place.is_dir():
        raise ValueError(
            f"data.clean.toxicity.word_lists={directory}: not a directory; give one with a file a language"
        )
    files = [path for path in sorted(place.iterdir()) if path.is_file() and LANGUAGE.fullmatch(path.name)]
    lists = {}
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}); mend or remove it") from None
        listed = [line for line in map(str.strip, lines) if line]
        if not listed:
            raise ValueError(f"{path}: holds no word; write one a line, or remove the file")
        lists[path.name] = WordList(listed, path.name.split("-")[0] not in UNSPACED)
    if not lists:
        raise ValueError(
            f"data.clean.toxicity.word_lists={directory}: no file is named by a language code, as en; add one"
        )
    return lists
