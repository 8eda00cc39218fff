"""Defines the keys of the section index."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from llmtrain.config.section import Section, Share, UserPath

StoreMode = Literal["bm25", "embedding", "hybrid"]
"""How a store is searched: by words, by embeddings, or by both, whose ranks are joined."""


class DocumentsConfig(Section):
    """Names documents to index; a text alone is the path."""

    path: UserPath  # file, directory or glob: text and Markdown, one document a file; JSONL, Parquet, CSV, one a row
    name: str | None = None  # for overrides: index.documents.NAME.field=body
    field: str = "text"  # rows: the field that holds the document
    id_field: str | None = None  # rows: the field that names the document, each another; None = file and line

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data


class IndexConfig(Section):
    """Configures `llmtrain index`, which cuts documents into passages and writes a store that `search`, `eval` and
    `chat` read; see docs/rollouts/search.md."""

    path: UserPath | None = None  # directory of the store; None = <run directory>/store
    documents: list[DocumentsConfig] = Field([])  # what is indexed
    unit: Literal["characters", "tokens"] = "characters"  # what passage_size and passage_overlap count
    passage_size: PositiveInt = 1000  # a passage has at most so many units; it ends at a paragraph where that fits
    passage_overlap: int = Field(150, ge=0)  # units of a passage that the next one repeats at most; under half its size
    tokenizer: UserPath | None = None  # unit tokens: a directory with tokenizer.json; None = that of index.model
    model: UserPath | None = None  # encoder for embeddings, a Hugging Face directory or hub name; None = words alone
    passage_prefix: str = ""  # what the encoder wants before a passage, such as "passage: "
    query_prefix: str = ""  # what it wants before a question, such as "query: "
    batch_passages: PositiveInt = 32  # passages that the encoder takes at once
    k1: PositiveFloat = 1.2  # BM25: how soon a word that repeats counts no more
    b: Share = 0.75  # BM25: how much the length of a passage counts; 0 = not
    rebuild: bool = False  # replace a store that was made with other settings or documents; false: refuse it
