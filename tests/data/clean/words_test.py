"""Checks that words and sentences are exactly datatrove's, on real and on drawn text, and that each chunk is split
once."""

from __future__ import annotations

import random
from pydoc_data.topics import topics

import pytest

pytest.importorskip("datatrove")

from datatrove.data import Document
from datatrove.utils.word_tokenizers import SpaCyTokenizer, load_word_tokenizer

from llmtrain.config.clean.web import WordsConfig
from llmtrain.data.clean import words
from llmtrain.data.clean.words import ChunkSplitter, RegexSplitter, by_language, splitter

SEPARATORS = [" "] * 8 + ["", "", "  ", "\n", "\n\n", "\t", "\u00a0", " \n", "\u2009"]
FRAGMENTS = [
    *":)(.a\"'-8!?。…_/<3",
    "...",
    "www.x.org",
    "1.5",
    "km",
    "u\u0301",
    "x@y.zz",
    "n't",
    '"yes."',
    ").",
    "NOUN",
]
SENTENCES = {
    "en": "It's here :) and it 's there : ) too. \"Well,\" she said. (Is it?) Yes... no!  Then\n\nend.  ",
    "de": "Z. B. am 3. Mai d.h. heute. Das ist's, z.B. so. „Ja.“ Nein!",
    "fr": "Aujourd'hui, l'homme dit : « Oui. » Est-ce qu'il vient ? Non…",
    "ru": "Он д-р биол. наук и т.д. Это так. Да!",
    "el": "Η Αγ. Γρ. είναι εδώ. Ναι;",
}


def same(language: str, text: str) -> bool:
    library, own = load_word_tokenizer(language), by_language(language, WordsConfig())
    assert own.word_tokenize(text) == library.word_tokenize(text), (language, text)
    assert own.span_tokenize(text) == library.span_tokenize(text), (language, text)
    return type(own) is ChunkSplitter


def drawn(rng: random.Random, rules: list[str]) -> str:
    """Returns a text of special cases, parts of them, marks and letters between all kinds of white space."""

    def piece() -> str:
        rule, kind = rng.choice(rules), rng.random()
        if kind < 0.5:
            at = rng.randrange(len(rule) + 1) if kind < 0.2 else 0
            return rule[at:] if kind < 0.35 else rule[:at] + rule
        if kind < 0.8:
            return rng.choice(FRAGMENTS)
        return "".join(rng.choices("abcdeЖй中é.:-)('\"0139", k=rng.randrange(1, 9)))

    return "".join(piece() + rng.choice(SEPARATORS) for _ in range(rng.randrange(60)))


@pytest.mark.parametrize("language", sorted(SENTENCES))
def test_words_and_sentences_of_drawn_text_are_datatroves(language: str) -> None:
    rng, rules = random.Random(language), list(load_word_tokenizer(language).tokenizer.tokenizer.rules)
    assert same(language, SENTENCES[language])
    assert all(same(language, drawn(rng, rules)) for _ in range(150))


def test_words_and_sentences_of_real_text_are_datatroves() -> None:
    assert all(same("en", text) for text in list(topics.values())[:25])


@pytest.mark.parametrize("text", ["", " ", "\n", "  a", "a ", "a  ", "\x1c", ". .", "a. \n", "x" * 50_000])
def test_odd_texts_are_split_as_datatrove_does(text: str) -> None:
    assert same("en", text)


def test_what_breaks_spacy_harms_no_later_text() -> None:
    own, text = by_language("en", WordsConfig()), "We say IS_ALPHA here. And there."
    assert own.word_tokenize(text) == SpaCyTokenizer("en").word_tokenize(text)
    assert own.span_tokenize(text) == SpaCyTokenizer("en").span_tokenize(text) == [(0, 21), (22, 32)]
    assert own.word_tokenize("www.x.org says IS_ALP here.") == ["www.x.org", "says", "IS_ALP", "here", "."]


def test_a_special_case_is_found_over_a_space() -> None:
    """spaCy keeps ":)" together, and looks for it in ": )" too, which it finds and leaves."""
    own = by_language("en", WordsConfig())
    assert own.word_tokenize("so :) she'll") == ["so", ":)", "she", "'ll"]
    assert own.word_tokenize("so : ) x") == ["so", ":", ")", "x"]


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    own = words.remembering(load_word_tokenizer("en"))
    monkeypatch.setattr(words, "REMEMBERED_CHARS", 1000)
    for number in range(300):
        assert own.word_tokenize(f"{number} w{number}") == [str(number), f"w{number}"]
    assert len(own.pieces) < 300 and own.chars < 1100


def test_every_step_gets_the_same_splitter_by_language() -> None:
    settings = WordsConfig(language="de")
    document = Document("x", "0", metadata={"language": "fr"})
    assert splitter(document, settings) is splitter(document, WordsConfig(language="de"))
    assert splitter(document, settings).language == "fr"
    assert splitter(Document("x", "1"), settings).language == "de"
    assert splitter(Document("x", "2", metadata={"language": "en-GB"}), settings).language == "en"


def test_a_language_without_splitter_has_none_or_the_rule_if_asked() -> None:
    assert by_language("bh", WordsConfig()) is None
    assert type(by_language("bh", WordsConfig(unknown="regex"))) is RegexSplitter


def test_the_rule_splits_every_language_the_same() -> None:
    own = by_language("en", WordsConfig(splitter="regex"))
    assert own.word_tokenize("It's 3.5, naïve—yes.") == ["It's", "3", ".", "5", ",", "naïve", "—", "yes", "."]
    assert own.sent_tokenize('One. "Two?" Three') == ["One.", '"Two?"', "Three"]
