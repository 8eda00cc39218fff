"""Defines the keys of the cleaning steps that look at what a document is about and what it holds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from llmtrain.config.section import Count, Section, Share, UserPath

PiiKind = Literal["email", "ip", "phone", "card", "iban", "ssn", "key"]
"""A kind of personal data, or a secret."""
PII_KINDS: list[PiiKind] = ["email", "ip", "phone", "card", "iban", "ssn", "key"]
NgramWords = Annotated[int, Field(ge=2, le=1000)]
"""Words of an n-gram that is looked up."""


class CodeConfig(Section):
    """Drops code that nobody wrote: generated, minified and data-like files. Sources: SC2 = StarCoder 2 (arXiv
    2402.19173, section 4.1), Codex (arXiv 2107.03374, section 3.1), own = measured here, see docs/cleaning.md."""

    head_lines: NonNegativeInt = 5  # first lines in which a generator names itself (SC2); 0 = not looked at
    generated_files: list[str] = Field(
        [
            *("*_pb2.py", "*_pb2_grpc.py", "*_pb2.pyi", "*.pb.go", "*.pb.cc", "*.pb.h", "*.g.dart", "*.designer.cs"),
            *("*.yy.c", "*.tab.c", "*.tab.h", "parsetab.py", "lextab.py", "moc_*.cpp", "*.min.js", "*.min.css"),
        ]
    )  # names of files that tools write (own, after GitHub's linguist); matched without case
    max_lines: PositiveInt = 100_000  # most lines (SC2)
    max_line_chars: PositiveInt = 1000  # longest line in characters (SC2, Codex)
    mean_line_chars: PositiveFloat = 100.0  # largest mean line in characters (SC2, Codex)
    markup_line_chars: PositiveInt = 100_000  # longest line of `markup_files`, whose mean is not looked at (SC2)
    markup_files: list[str] = Field(
        ["*.html", "*.htm", "*.md", "*.tex", "*.txt", "*.rst", "*.xml", "*.roff", "*.[1-8]", "*.smt2"]
    )  # files that hold a paragraph a line (SC2)
    min_space: Share = 0.05  # least share of white space, in files of at least `min_space_chars` (own)
    min_space_chars: PositiveInt = 1000  # shorter files may be dense (own)
    min_alphabetic: Share = 0.25  # least share of letters (SC2)
    max_digits: Share = 0.4  # largest share of decimal digits (own)
    max_encoded_chars: PositiveInt = 1024  # longest base64, hexadecimal or \u.... passage in characters (SC2)
    max_encoded: Share = 0.5  # largest share of all such passages (SC2)
    max_numbers_chars: PositiveInt = 4096  # longest list of bare numbers in characters (own)
    data_files: list[str] = Field(
        [
            *("*.json", "*.jsonl", "*.ndjson", "*.geojson", "*.csv", "*.tsv", "*.lock", "*.svg", "*.map", "*.po"),
            *("*.sum", "*-lock.yaml", "*.ics", "*.plist", "*.dat", "*.log"),
        ]
    )  # names of files that are data (own); matched without case
    long_data_files: list[str] = Field(
        ["*.yaml", "*.yml", "*.xml", "*.owl", "*.dot", "*.gv", "*.txt"]
    )  # files that are data where they are long (SC2)
    max_data_lines: PositiveInt = 512  # most lines of those (SC2)
    notebooks: Literal["sources", "drop"] = "sources"  # .ipynb: keep the cells' sources without outputs, or drop all


class MathConfig(Section):
    """Marks mathematical documents by a score of 0 to 1, in the column `math`: p / (p + half x words + 1) for p points
    of formulas, symbols and words."""

    only: bool = False  # drop documents that are not mathematical
    threshold: Share = 0.5  # least score of a mathematical document
    half: PositiveFloat = 0.05  # points a word at which a long document scores 0.5


class ClassifierConfig(Section):
    """Keeps documents that a linear classifier over hashed words and pairs of words, trained here from seed documents
    (as fastText, arXiv 1607.01759), finds like the good ones. The score is the column `quality`."""

    good: UserPath  # rows of good documents
    bad: UserPath  # rows of bad ones: a sample of the collected documents, or known rubbish
    field: str = "text"  # field of the rows that holds the document
    path: UserPath | None = None  # directory of the trained classifier; None = <data.clean.path>/classifier
    threshold: Share = 0.5  # least score to stay; both seeds weigh the same, however many there are
    keep_share: Share | None = None  # in place of `threshold`: the score that this share of held-out bad seeds reaches
    held_out: float = Field(0.2, gt=0.0, lt=1.0)  # share of the seeds that AUC and `keep_share` are measured on
    buckets: int = Field(2**18, ge=2, le=2**26)  # features that words and pairs of words are hashed to
    l2: PositiveFloat = 1e-4  # half this times the squared weights is added to the mean loss
    max_words: PositiveInt = 10_000  # words of a document that are read, from its start
    seed: int = 0  # which seed documents are held out


class ToxicityConfig(Section):
    """Drops documents by word lists, and by a model of profanity in English. A document is dropped where it has more
    listed words than `max_count` and a larger share of them than `max_share`: as they are, for one word."""

    word_lists: UserPath | None = None  # a directory of files, named by language code, with a word or phrase a line
    max_count: NonNegativeInt = 0  # listed words and phrases that a document may have
    max_counts: dict[str, NonNegativeInt] = Field({})  # by language, over `max_count`
    max_share: Share = 0.0  # share of the words (ja, lo, km, my, th, zh: characters) that may be listed
    max_shares: dict[str, Share] = Field({})  # by language, over `max_share`
    missing: Literal["keep", "drop"] = "keep"  # documents whose language has no list; they are counted
    model: bool = False  # also judge English by alt-profanity-check (extra `toxicity`), which unpickles its own files
    model_threshold: Share = 0.5  # probability of profanity from which a line counts
    model_share: Share = 0.1  # largest share of such lines

    @model_validator(mode="after")
    def _judges(self) -> ToxicityConfig:
        if self.word_lists is None and not self.model:
            raise ValueError("names neither word_lists nor model, so nothing is judged; set one or remove the section")
        return self


class ContaminationConfig(Section):
    """Drops or cuts documents that hold n-grams of evaluation problems, or of held-out text (GPT-3: arXiv 2005.14165,
    appendix C)."""

    n: NgramWords = 13  # words of an n-gram (GPT-3), lower case, without punctuation
    n_by_set: dict[str, NgramWords] = Field({})  # by the name of a set, over `n`
    sets: dict[str, UserPath] = Field({})  # rows of problems by a name, beside all that this document evaluates on
    min_words: NgramWords = 8  # a text of fewer than n words is found as a whole, if it has at least so many
    templates: PositiveInt = 10  # an n-gram in more rows of a set than this is a template, and no hit
    action: Literal["drop", "cut"] = "drop"  # drop the document, or cut the passage and what stands around it
    cut_chars: NonNegativeInt = 200  # cut: characters on either side that go, and shortest piece that stays (GPT-3)
    max_pieces: Count = 10  # cut: a document that falls into more pieces is dropped (GPT-3)
    max_ngrams: PositiveInt = 50_000_000  # of all sets; 16 bytes of memory each in every worker
    text_ngrams: NonNegativeInt = 5_000_000  # of what data.sources hold out, beside `sets`; of more a share; 0 = none


class PiiConfig(Section):
    """Replaces personal data and secrets by typed placeholders, as <EMAIL>, and counts them in the column `pii`."""

    kinds: list[PiiKind] = Field(PII_KINDS)  # what is replaced
    placeholders: dict[PiiKind, str] = Field({})  # by kind; others are <EMAIL>, <IP>, <PHONE>, <CARD>, ...
    private_ips: bool = False  # also addresses that no one on the internet has, as 192.168.0.1
    min_entropy: NonNegativeFloat = 3.5  # bits a character of what stands behind `api_key =` from which it is a secret
