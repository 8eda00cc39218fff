"""Defines the keys of the cleaning steps that judge web pages and prose. A threshold that is null is off; 0 is a
threshold like any other."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from llmtrain.config.section import DeadlineS, Section, Share, UserPath

CODES = (
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs "
    "cv cy da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr "
    "hsb ht hu hy ia id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc "
    "lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa "
    "pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg "
    "th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo yue zh "
)
LANGUAGES = frozenset(CODES.split())
"""The languages that fastText's lid.176 identifies, by its codes."""


def known_language(code: str) -> str:
    """Returns a language code, or raises ValueError if lid.176 has none such."""
    if code not in LANGUAGES:
        near = get_close_matches(code.lower(), sorted(LANGUAGES), n=1, cutoff=0.5)
        hint = f"write {near[0]!r}" if near else "write an ISO 639 code such as 'en', 'zh' or 'als'"
        raise ValueError(f"{code!r} is none of the {len(LANGUAGES)} languages that are identified; {hint}")
    return code


Language = Annotated[str, AfterValidator(known_language)]
Limit = Share | None


class WordsConfig(Section):
    """Says how text is split into words."""

    splitter: Literal["spacy", "regex"] = "spacy"  # spacy: datatrove's words; regex: one rule for all, other counts
    language: Language = "en"  # of documents whose language is not known
    unknown: Literal["drop", "regex"] = "drop"  # documents in languages whose splitter is not installed


class UrlConfig(Section):
    """Drops pages by their addresses. Pages without one stay."""

    blocked_domains: UserPath | None = None  # a file with a domain a line; what stands below it is blocked too
    blocked_words: UserPath | None = None  # a file with a word a line, which no page may have in its address
    bundled_lists: bool = False  # also datatrove's lists of adult sites, which take 5 to 26 s to load


class ExtractConfig(Section):
    """Extracts the main text of HTML pages with trafilatura, in a process of its own."""

    timeout_s: DeadlineS = 10.0  # for one page
    memory_gib: PositiveFloat = 2.0  # most address space of the process, in GiB
    favor: Literal["balanced", "precision", "recall"] = "balanced"  # less text but surer, or more
    tables: bool = True  # keep text of tables
    comments: bool = False  # keep readers' comments


class RepairConfig(Section):
    """Mends broken encodings with ftfy and removes control characters."""

    normalization: Literal["NFC", "NFKC", "none"] = "NFC"  # of Unicode


class LanguageConfig(Section):
    """Identifies the language of the whole text, one of 176, and keeps its score."""

    keep: list[Language] = Field([])  # languages that stay; [] = all
    threshold: Share = 0.65  # least score to stay where `keep` names languages
    thresholds: dict[Language, Share] = Field({})  # least scores by language, which go before `threshold`


class RepetitionConfig(Section):
    """Drops documents that repeat themselves (arXiv 2112.11446, table A1)."""

    duplicate_lines: Limit = 0.3  # largest share of lines that stood before
    duplicate_paragraphs: Limit = 0.3  # the same of paragraphs
    duplicate_line_chars: Limit = 0.2  # largest share of characters in lines that stood before
    duplicate_paragraph_chars: Limit = 0.2  # the same of paragraphs
    top_2_gram: Limit = 0.2  # largest share of characters in the most frequent pair of words
    top_3_gram: Limit = 0.18  # the same of three words
    top_4_gram: Limit = 0.16  # the same of four
    duplicate_5_grams: Limit = 0.15  # largest share of characters in runs of five words that stood before
    duplicate_6_grams: Limit = 0.14  # the same of six words
    duplicate_7_grams: Limit = 0.13  # of seven
    duplicate_8_grams: Limit = 0.12  # of eight
    duplicate_9_grams: Limit = 0.11  # of nine
    duplicate_10_grams: Limit = 0.1  # of ten


class QualityConfig(Section):
    """Drops documents by Gopher's rules of quality (arXiv 2112.11446, section A1.1)."""

    min_words: PositiveInt | None = 50  # fewest words, punctuation not counted
    max_words: PositiveInt | None = 100_000  # most words
    min_mean_word_chars: NonNegativeFloat | None = 3  # least mean length of words, in characters
    max_mean_word_chars: PositiveFloat | None = 10  # largest mean length
    symbols: NonNegativeFloat | None = 0.1  # most "#" a word, and most ellipses a word
    bullet_lines: Limit = 0.9  # largest share of lines that begin with a bullet
    ellipsis_lines: Limit = 0.3  # largest share of lines that end with an ellipsis
    alphabetic_words: Limit = 0.8  # least share of words with a letter
    min_stop_words: PositiveInt | None = 2  # fewest different stop words
    stop_words: dict[Language, list[str]] = Field({})  # by language, over Gopher's eight (en) and spaCy's (others)


class C4Config(Section):
    """Keeps lines and pages as C4 does (arXiv 1910.10683, section 2.2)."""

    min_sentences: PositiveInt | None = 5  # fewest sentences left in a page
    min_line_words: PositiveInt | None = 3  # fewest words of a line that stays
    max_word_chars: PositiveInt | None = 1000  # longest word of a line that stays
    terminal_punctuation: bool = True  # keep only lines that end with a mark
    citations: bool = True  # remove "[1]", "[edit]" and "[citation needed]"
    javascript: bool = True  # remove lines that name it
    policy: bool = True  # remove lines on cookies, privacy and terms of use
    lorem_ipsum: bool = True  # drop pages with it
    curly_bracket: bool = True  # drop pages with one


class FineWebConfig(Section):
    """Drops pages by the rules that FineWeb adds (arXiv 2406.17557, section 3.6)."""

    line_punctuation: Limit = 0.12  # least share of lines that end with punctuation
    short_lines: Limit = 0.67  # largest share of lines of at most `short_line_chars`
    short_line_chars: PositiveInt = 30  # what counts as short
    duplicate_chars: Limit = 0.01  # largest share of characters in lines that stood before
    newline_words: NonNegativeFloat | None = 0.3  # most line breaks a word
