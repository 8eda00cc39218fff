"""Defines the keys of the section data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmtrain.config.clean import CleanConfig, CollectConfig, ExecutionConfig
from llmtrain.config.curriculum import CurriculumConfig
from llmtrain.config.section import Section, UserPath


class SourceConfig(Section):
    """Describes one source of documents for pretraining."""

    name: str  # names its shards, and the source in overrides
    type: Literal[
        "stdlib", "topics", "arithmetic", "text", "jsonl", "rows", "cleaned"
    ]  # stdlib, topics: Python's code and prose; cleaned: what cleaning left, a directory of .jsonl.zst
    path: UserPath | None = None  # text, jsonl: file, directory or glob; rows: whatever data.train may be; see cleaned
    field: str = "text"  # jsonl, rows: the field that holds the document
    weight: float = Field(1.0, ge=0.0)  # share of the samples, relative to the others; 0 = none before data.anneal
    max_epochs: PositiveFloat | None = None  # times that it is seen at most; then the others share its part; None = any
    language: str | None = None  # with data.temperature sources of one language count as one; None = by itself
    max_bytes: PositiveInt | None = None  # of UTF-8 text at most; None = all
    held_out: float = Field(0.05, ge=0.0, lt=1.0)  # share of the documents kept for validation
    count: PositiveInt = 2000  # arithmetic: number of documents
    worked_share: float = Field(0.8, ge=0.0, le=1.0)  # arithmetic: share of sums worked by columns


class TaskConfig(Section):
    """Describes a generated problem set: JSONL of prompts and answers, every eighth expression held out."""

    name: str  # files: <data directory>/<name>-train.jsonl and -held_out.jsonl
    type: Literal["chain_sum", "largest"]  # chain_sum: a + b or a - b of two digits; largest: of three numbers
    train: PositiveInt = 4000  # problems to train on
    held_out: PositiveInt = 256  # problems to evaluate on
    error_rate: float = Field(0.0, ge=0.0, lt=1.0)  # chance that one column sum of a demonstration is wrong


class AnnealConfig(Section):
    """Sets other shares of the sources from a step, or from a number of tokens, on."""

    from_tokens: PositiveInt | None = None  # of the whole run; takes effect at the next row
    from_step: PositiveInt | None = None  # counted from 0; one of the two is set
    weights: dict[str, float]  # shares by source, relative to each other; a source that is not named has none


class DataConfig(Section):
    """Says where text, demonstrations and prompts come from."""

    path: UserPath | None = None  # directory of token shards; None = <run directory>/data
    collect: list[CollectConfig] = Field([])  # raw documents to clean; see docs/cleaning.md
    clean: CleanConfig = CleanConfig()  # how they are cleaned
    executor: Literal["local", "slurm", "ray"] = "local"  # what runs the tasks of cleaning
    execution: ExecutionConfig = ExecutionConfig()  # how many tasks there are, and settings of the executor
    sources: list[SourceConfig] = Field([])  # text for pretraining
    tasks: list[TaskConfig] = Field([])  # problem sets to generate
    workers: PositiveInt = 1  # processes that tokenize; the shards are the same whatever their number
    verify: bool = False  # read all shards before a start and compare them with the checksums in shards.json
    megatron: bool = False  # also write the shards as <source>-<split>_text_document.bin and .idx, which Megatron reads
    mix: Literal["even", "blocks"] = "even"  # even: shares exact at any row, within one; blocks: in each 1000 rows
    temperature: PositiveFloat | None = None  # shares are tokens^(1 / this) of each language; None = by weight
    anneal: list[AnnealConfig] = Field([])  # pretraining: other shares later
    packing: Literal["cut", "best_fit"] = "cut"  # rows of text: contiguous, or whole documents (arXiv 2404.10830)
    loader_workers: int = Field(0, ge=0, le=64)  # threads that read rows of text ahead; any number gives the same rows
    train: UserPath | None = None  # rows with prompt|messages, answer, ...; see docs/data.md; pretraining has none
    held_out: UserPath | None = None  # rows to evaluate on
    curriculum: CurriculumConfig | None = None  # which prompts are sampled, by their difficulty; None = all alike
    fields: dict[str, str] = Field({})  # names of your fields by ours, as {prompt: question, answer: gold}
    rendered: bool = False  # texts of rows are rendered already: special tokens that they spell are special
    trained_turns: Literal["last", "all"] = "last"  # of a conversation: turns of the assistant that are trained
    overlong: Literal["error", "drop", "truncate"] = "error"  # rows that do not fit; truncate: prompts at their start
    pack: bool = True  # several demonstrations share a row, each with its own attention and positions
    mask_documents: bool = True  # attention and positions restart at document boundaries
    fim_share: float = Field(0.0, ge=0.0, le=1.0)  # share of documents trained as fill-in-the-middle (arXiv 2207.14255)
    fim_spm_share: float = Field(0.5, ge=0.0, le=1.0)  # share of these: suffix-prefix-middle, else prefix-suffix-middle
    span_share: float = Field(0.0, ge=0.0, le=1.0)  # share of documents trained as span corruption (arXiv 1910.10683)
    span_noise: float = Field(0.15, gt=0.0, lt=1.0)  # span corruption: share of the tokens that are hidden
    span_mean_tokens: PositiveFloat = 3.0  # span corruption: mean length of a hidden span
    replay_seqs: int = Field(0, ge=0)  # rows of pretraining text added to each update of a later recipe
    replay_weight: float = Field(1.0, ge=0.0)  # weight of the mean loss of those rows
