"""Splits text into words and sentences for the steps that count them, by datatrove's splitter for a language.

spaCy splits a text at white space and then each chunk by itself, so the pieces of a chunk are the same wherever it
stands, and are remembered: what comes out is what datatrove's tokenizer gives, many times as fast. One thing reaches
over a space: special cases of several pieces, such as ":)", are looked for in the pieces of the whole text, so in ": )"
too. Chunks around a space over which one may reach are split together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from datatrove.data import Document
from datatrove.utils.word_tokenizers import (
    SpaCyTokenizer,
    WhitespaceTokenizer,
    WordTokenizer,
    load_tokenizer_assignments,
)

from llmtrain.config.clean.web import WordsConfig

if TYPE_CHECKING:
    from spacy.tokenizer import Tokenizer

REMEMBERED_CHARS = 2_000_000  # of chunks by language and process; forgotten when more: some 50 MB
BREAKS_SPACY = "IS_ALPHA"  # a name of spaCy's own, which may break its vocabulary; datatrove then leaves it out
RULES = ("prefix_search", "suffix_search", "infix_finditer", "token_match", "url_match")  # of a spaCy tokenizer
CHUNKS = re.compile(r"\S+")
WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
SENTENCES = re.compile(r"\S.*?(?:[.!?…。！？]+[\"'”’)\]]*(?=\s|$)|$)", re.DOTALL)


def splitter(document: Document, settings: WordsConfig) -> WordTokenizer | None:
    """Returns what splits a document by its language, None where none is installed and none is asked for instead.

    All steps of a process get the same object, so that a text which several of them see is split once.
    """
    code = document.metadata.get("language") or settings.language
    return by_language(code if code in load_tokenizer_assignments() else base(code), settings)


def base(code: str) -> str:
    """Returns the language of a code that also names a script or a country, such as en-GB."""
    return code.replace("_", "-").split("-")[0].lower()


@cache
def by_language(language: str, settings: WordsConfig) -> WordTokenizer | None:
    """Returns the splitter of a language, None where it needs a package that is not installed."""
    if settings.splitter == "regex":
        return RegexSplitter(language)
    if language in load_tokenizer_assignments():
        try:
            return remembering(load_tokenizer_assignments()[language]())
        except ImportError:
            pass  # raised by the library's own check of packages
    return RegexSplitter(language) if settings.unknown == "regex" else None


def remembering(library: WordTokenizer) -> WordTokenizer:
    """Returns a splitter that remembers chunks, or the library's where its words depend on what stands around them."""
    from spacy.tokenizer import Tokenizer

    inner = library._spacy_xx if type(library) is WhitespaceTokenizer else library
    if not isinstance(inner, SpaCyTokenizer) or type(inner.tokenizer.tokenizer) is not Tokenizer:
        return library  # Chinese, Japanese, Korean, Thai, Vietnamese, Stanza, Indic: not split at white space first
    return ChunkSplitter(library, inner)


class ChunkSplitter(WordTokenizer):
    """Gives the words and sentences of a spaCy tokenizer, remembering the pieces of chunks between white space."""

    def __init__(self, library: WordTokenizer, inner: SpaCyTokenizer) -> None:
        from spacy import attrs
        from spacy.tokenizer import Tokenizer
        from spacy.vocab import Vocab

        super().__init__(inner.language)
        self.library, nlp = library, inner.tokenizer
        self.own_sentences = library is inner  # else the library has a regular expression for them
        self.marks = frozenset(nlp.get_pipe("sentencizer").punct_chars)
        self.is_punct = nlp.vocab.lex_attr_getters[attrs.IS_PUNCT]
        rules = {name: getattr(nlp.tokenizer, name) for name in RULES}
        # Its own vocabulary computes no attributes of words, which take most of the time and change no piece.
        self.tokenizer = Tokenizer(Vocab(), nlp.tokenizer.rules, **rules)
        self.specials = SpecialCases(nlp.tokenizer)
        self.forget()

    def forget(self) -> None:
        """Empties the memory."""
        self.pieces: dict[str, tuple[str, ...]] = {}
        self.shapes: dict[str, str | None] = {}
        self.before: dict[str, tuple[str, ...]] = {}  # ends of a chunk, after which a special case may reach into this
        self.chars = 0

    def learn(self, chunks: Iterable[str]) -> None:
        """Remembers the pieces of chunks that are new. They are split in one text, a line each: no special case reaches
        over a line break."""
        if self.chars > REMEMBERED_CHARS:
            self.forget()
        new = set(chunks).difference(self.pieces)
        if not new:
            return
        self.chars += sum(map(len, new))
        with self.tokenizer.vocab.memory_zone():  # what spaCy stores of these words is freed at the end
            tokens = iter([token.text for token in self.tokenizer("\n".join(new))] + ["\n"])
        for chunk in new:
            self.pieces[chunk] = pieces = tuple(iter(tokens.__next__, "\n"))
            if before := self.specials.before(chunk, pieces):
                self.before[chunk] = before

    def runs(self, text: str) -> list[str]:
        """Returns the chunks of a text, those joined over whose space a special case may reach; all are remembered."""
        chunks = text.split()
        self.learn(chunks)
        if not any(chunks[i - 1].endswith(self.before[c]) for i, c in enumerate(chunks) if c in self.before and i):
            return chunks
        runs = [text[start:end] for start, end in self.run_spans(text)]
        self.learn(runs)
        return runs

    def run_spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yields where the runs of a text, whose chunks are remembered, begin and end."""
        start, last, end = 0, "", -1
        for match in CHUNKS.finditer(text):
            chunk, at = match.group(), match.start()
            before = self.before.get(chunk, ())
            if end >= 0 and not (before and last.endswith(before) and text[end:at] == " "):
                yield start, end
                start = at
            elif end < 0:
                start = at
            last, end = chunk, match.end()
        if end >= 0:
            yield start, end

    def word_tokenize(self, text: str) -> list[str]:
        """Returns the words and marks of a text."""
        if BREAKS_SPACY in text:
            return SpaCyTokenizer(self.language).word_tokenize(text)  # a new one, which no other text sees
        runs = self.runs(text)  # first: it may begin a new memory
        return list(chain.from_iterable(map(self.pieces.__getitem__, runs)))

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Returns where sentences begin and end."""
        if not self.own_sentences:
            return self.library.span_tokenize(text)
        if BREAKS_SPACY in text:
            return SpaCyTokenizer(self.language).span_tokenize(text)
        return self.sentence_spans(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Returns the sentences of a text without white space around them."""
        sentences = [text[start:end].strip() for start, end in self.span_tokenize(text)]
        return [sentence for sentence in sentences if sentence]

    def sentence_spans(self, text: str) -> list[tuple[int, int]]:
        """Returns the sentences as spaCy's sentencizer ends them: before the first word after marks that end one."""
        spans, start, last, marked = [], 0, 0, False
        for shape, at, end in self.parts(text):
            if marked and shape.startswith("w"):
                spans.append((start, last))
                start = at
            marked = shape.endswith("p") or (marked and not shape)
            last = end
        return [*spans, (start, last)] if last else []

    def parts(self, text: str) -> Iterator[tuple[str, int, int]]:
        """Yields the shape, begin and end of what a text consists of: white space that is a token of spaCy, which all
        is but single spaces after words, and runs of chunks, by pieces where a sentence ends within."""
        self.runs(text)
        last = 0
        for at, end in self.run_spans(text):
            if at > last and (last == 0 or text[last:at] != " "):
                yield "w", last + (last > 0 and text[last] == " "), at
            shape = self.shape(text[at:end])
            yield from self.piece_parts(text, at, end) if shape is None else ((shape, at, end),)
            last = end
        if text[last:] not in ("", " ") or (text and not last):
            yield "w", last + (last > 0 and text[last] == " "), len(text)

    def piece_parts(self, text: str, at: int, end: int) -> Iterator[tuple[str, int, int]]:
        """Yields the shape, begin and end of every piece of a run."""
        for piece in self.pieces[text[at:end]]:
            at = text.index(piece, at)
            yield self.piece_shape(piece), at, at + len(piece)
            at += len(piece)

    def shape(self, run: str) -> str | None:
        """Returns what of a run matters to sentences, "w" for words and then "p" for marks that end one; None where one
        may end within it, and its pieces matter."""
        if run not in self.shapes:
            shapes = [self.piece_shape(piece) for piece in self.pieces[run]]
            shape = re.sub(r"(.)\1+", r"\1", "".join(shapes))
            inside = "pw" in shape or ("w" in shape and not shapes[0])
            self.shapes[run] = None if inside else shape
        return self.shapes[run]

    def piece_shape(self, piece: str) -> str:
        """Returns "p" for a mark that ends a sentence, "" for other punctuation, else "w"."""
        return "p" if piece in self.marks else "" if self.is_punct(piece) else "w"


class SpecialCases:
    """Knows over which spaces a special case of a spaCy tokenizer may reach.

    spaCy looks for the pieces into which its rules would split a special case, one after the other, in the pieces of a
    text. One that reaches over a space has two neighbours in it, the first of which ends a chunk, and the second begins
    the next.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        import ahocorasick
        from spacy.tokenizer import Tokenizer

        bare = Tokenizer(tokenizer.vocab, **{name: getattr(tokenizer, name) for name in RULES})
        self.cases, self.firsts = set(tokenizer.rules), {}
        self.inside = ahocorasick.Automaton()
        for case in tokenizer.rules:
            pieces = [token.text for token in bare(case)]
            for first, second in pairwise(pieces):
                self.firsts.setdefault(second, set()).add(first)
            if len(pieces) > 1:
                self.inside.add_word(case, case)
        self.inside.make_automaton()
        self.seconds = {}  # by their first character
        for second in self.firsts:
            self.seconds.setdefault(second[0], []).append(second)

    def before(self, chunk: str, pieces: tuple[str, ...]) -> tuple[str, ...]:
        """Returns with what a chunk would have to end, so that a special case may reach from it into this one.

        Where a special case within it may have changed its pieces, all beginnings count, not only the first piece.
        """
        changed = chunk in self.cases or (len(pieces) > 1 and next(self.inside.iter(chunk), None))
        seconds = [s for s in self.seconds.get(chunk[0], ()) if chunk.startswith(s)] if changed else pieces[:1]
        return tuple(first for second in seconds for first in self.firsts.get(second, ()))


class RegexSplitter(WordTokenizer):
    """Splits at what is no letter, digit or underscore, and ends sentences after marks: the same for every language."""

    def word_tokenize(self, text: str) -> list[str]:
        """Returns words, with apostrophes inside, and every other character by itself."""
        return WORDS.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Returns sentences without white space around them."""
        return SENTENCES.findall(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Returns where sentences begin and end."""
        return [match.span() for match in SENTENCES.finditer(text)]
