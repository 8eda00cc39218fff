"""What is said of mixes and packing that cannot be, and that those that can are let through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmtrain.config.load import load
from llmtrain.rules.check import violations

DOCUMENT = """
data: {sources: [{name: a, type: topics}, {name: b, type: stdlib}]}
train: {seq_len: 64, global_batch_seqs: 8}
"""


def told(folder: Path, *overrides: str, command: str = "pretrain") -> list[str]:
    (folder / "x.yaml").write_text(DOCUMENT)
    return violations(load(str(folder / "x.yaml"), list(overrides)), 1, command)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.anneal=[{weights: {a: 1}}]"], "data.anneal.0: needs one of from_tokens and from_step; set one"),
        (["data.anneal=[{from_step: 2, from_tokens: 5, weights: {a: 1}}]"], "data.anneal.0: needs one of"),
        (
            ["data.anneal=[{from_step: 2, weights: {c: 1}}]"],
            "data.anneal.0.weights.c: is no source, those are a, b; correct the name",
        ),
        (["data.anneal=[{from_step: 2, weights: {a: -1}}]"], "data.anneal.0.weights.a=-1: must not be negative"),
        (["data.anneal=[{from_step: 2, weights: {a: 0}}]"], "data.anneal.0.weights: must give at least one source"),
        (
            ["data.anneal=[{from_step: 2, weights: {a: 1}}, {from_tokens: 1000, weights: {b: 1}}]"],
            r"data.anneal: begins at the tokens \[1024, 1000\]: must rise",
        ),
        (
            ["data.mix=blocks", "data.temperature=2.0"],
            "data.mix=blocks: not with data.temperature, .*; use even",
        ),
        (["data.mix=blocks", "data.sources.a.max_epochs=2"], "data.mix=blocks: not with max_epochs of a source"),
        (["data.sources.a.weight=0"], "data.sources.a.weight=0: must be above 0, no entry of data.anneal gives"),
        (
            [
                "data.sources.a.weight=0",
                "data.sources.b.weight=0",
                "data.anneal=[{from_step: 2, weights: {a: 1, b: 1}}]",
            ],
            "data.sources: must give at least one source a weight above 0; raise one",
        ),
        (["data.sources.a.language=en"], "data.sources.a.language=en: only data.temperature asks for it"),
        (
            ["data.packing=best_fit", "data.mask_documents=false"],
            "data.mask_documents=false: not with data.packing=best",
        ),
    ],
)
def test_what_cannot_be_is_told(tmp_path: Path, overrides: list[str], expected: str) -> None:
    lines = told(tmp_path, *overrides)
    assert len(lines) == 1 and re.match(expected, lines[0]), lines


def test_what_can_be_is_let_through(tmp_path: Path) -> None:
    assert told(tmp_path) == []
    anneal = "data.anneal=[{from_step: 2, weights: {a: 1}}, {from_tokens: 1025, weights: {a: 0, b: 1}}]"
    more = [
        "data.temperature=2.0",
        "data.sources.a.language=en",
        "data.sources.a.max_epochs=4",
        "data.packing=best_fit",
    ]
    assert told(tmp_path, anneal, *more, "data.mix=even") == []
    assert told(tmp_path, anneal, "data.sources.b.weight=0") == []


def test_only_pretraining_anneals(tmp_path: Path) -> None:
    lines = told(tmp_path, "data.anneal=[{from_step: 2, weights: {a: 1}}]", command="sft")
    assert any(
        re.match("data.anneal: must be empty, only pretrain anneals; remove it from sft", each) for each in lines
    )
