"""Defines the keys of `data.collect` and `data.clean`: what raw documents are read and how they are cleaned. The steps
stand in the order in which they run; a step that is null is off."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from llmtrain.config.clean.collect import CollectConfig
from llmtrain.config.clean.content import (
    ClassifierConfig,
    CodeConfig,
    ContaminationConfig,
    MathConfig,
    PiiConfig,
    ToxicityConfig,
)
from llmtrain.config.clean.dedup import DedupConfig
from llmtrain.config.clean.scale import ExecutionConfig
from llmtrain.config.clean.web import (
    C4Config,
    ExtractConfig,
    FineWebConfig,
    LanguageConfig,
    QualityConfig,
    RepairConfig,
    RepetitionConfig,
    UrlConfig,
    WordsConfig,
)
from llmtrain.config.section import Section, UserPath

__all__ = ["CleanConfig", "CollectConfig", "ExecutionConfig"]


class CleanConfig(Section):
    """Says how collected documents are cleaned. Each step is a section, which is off where it is null; which kinds of
    documents a step sees stands in docs/cleaning.md."""

    path: UserPath | None = None  # directory of cleaned documents and the report; None = <data.path>/clean
    words: WordsConfig = WordsConfig()  # how text is split into words, for all steps that count words
    url: UrlConfig | None = None  # web: drop by address
    extract: ExtractConfig | None = ExtractConfig()  # web: text from HTML
    repair: RepairConfig | None = RepairConfig()  # all: mend broken encodings
    language: LanguageConfig | None = LanguageConfig()  # all but code: identify the language, keep some
    repetition: RepetitionConfig | None = RepetitionConfig()  # web, prose: drop what repeats itself
    quality: QualityConfig | None = QualityConfig()  # web, prose: Gopher's rules
    c4: C4Config | None = C4Config()  # web: lines and pages as C4 does
    fineweb: FineWebConfig | None = FineWebConfig()  # web: FineWeb's own rules
    code: CodeConfig | None = CodeConfig()  # code: drop generated, minified and data-like files
    math: MathConfig | None = None  # web, prose: mark mathematical text, and keep only it if wanted
    classifier: ClassifierConfig | None = None  # web, prose: a quality classifier trained from seed documents
    toxicity: ToxicityConfig | None = None  # all but code: word lists and a profanity model
    contamination: ContaminationConfig | None = ContaminationConfig()  # all: drop what holds evaluation problems
    pii: PiiConfig | None = PiiConfig()  # all: replace personal data by typed placeholders
    dedup: DedupConfig | None = DedupConfig()  # all: drop duplicates over all inputs
    examples: int = Field(20, ge=0)  # dropped documents that the report shows for each step and task
    dry_run_documents: PositiveInt = 1000  # documents of a sample that `llmtrain data --dry-run` looks at
