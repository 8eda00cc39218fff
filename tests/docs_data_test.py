"""The examples of docs/data.md: its rows are read as it says, its documents are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmtrain.config.load import load
from llmtrain.config.schema import DataConfig
from llmtrain.data.packing import Demonstrations
from llmtrain.data.pairs import Pairs
from llmtrain.data.prompts import PromptSet
from llmtrain.data.rows import SHAPES
from llmtrain.data.traces import thinks_and_answers
from tests.data.families import family

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
SFT = (Path(__file__).parents[1] / "docs" / "posttraining" / "sft.md").read_text()
ANSWERS = [" 4", "4", "5", "4", "4", "4", "2 + 2 = 4\n#### 4", "Two and two are four.", "yo"]


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


PREFERENCES = PAGE.split("### Preferences")[1].split("### Other names")[0]
(PAIRS,) = blocks("jsonl", PREFERENCES)
ROWS = "".join(block for block in blocks("jsonl") if block != PAIRS)


def test_every_row_is_read_and_trains_its_answer(tmp_path: Path) -> None:
    tokenizer = family("qwen", tmp_path)
    (tmp_path / "x.jsonl").write_text(ROWS)
    data = Demonstrations(str(tmp_path / "x.jsonl"), tokenizer, 500, 0, pack=False)
    trained = [[label for label in example["labels"] if label >= 0] for example in data.examples]
    assert [tokenizer.decode(ids) for ids in trained[:7]] == ANSWERS[:7]
    assert "Two and two are four.".endswith(tokenizer.decode(trained[7])) and tokenizer.decode(trained[8]) == "yo"
    assert all(ids[-1] == tokenizer.eos_id for ids in trained) and trained[8].count(tokenizer.eos_id) == 1


def test_every_row_but_a_text_can_be_asked(tmp_path: Path) -> None:
    rows = [line for line in ROWS.splitlines() if '{"text"' not in line]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    prompts = PromptSet(str(tmp_path / "x.jsonl"), family("qwen", tmp_path), 500)
    assert len(prompts) == len(ANSWERS) - 1
    assert [example.get("answer") for example in prompts.examples][-2:] == ["4", None]


def test_every_preference_is_read_and_trains_both_answers(tmp_path: Path) -> None:
    tokenizer = family("qwen", tmp_path)
    (tmp_path / "x.jsonl").write_text(PAIRS)
    pairs = Pairs(str(tmp_path / "x.jsonl"), tokenizer, 500, 0)
    trained = [[[i for i, on in zip(s.ids, s.trained, strict=True) if on] for s in pair] for pair in pairs.pairs]
    assert [[tokenizer.decode(ids) for ids in pair] for pair in trained] == [
        [" 4", " 5"],
        ["4", "It depends."],
        ["4", "5"],
    ]
    assert pairs.columns == ("label", "margin")
    assert [sum(pair[0].columns["label"]) for pair in pairs.pairs] == [1.0, 0.8, 1.0]


def test_every_shape_stands_in_the_table() -> None:
    table = PAGE.split("| fields |")[1].split("\n\n")[0]
    assert [names for names, _ in SHAPES if not all(f"`{name}`" in table for name in names)] == []


def test_the_traces_of_the_page_of_sft_think_and_then_answer(tmp_path: Path) -> None:
    tokenizer = family("qwen3", tmp_path)
    (rows,) = blocks("jsonl", SFT)
    (tmp_path / "x.jsonl").write_text(rows)
    data = Demonstrations(str(tmp_path / "x.jsonl"), tokenizer, 500, 0, pack=False)
    trained = [tokenizer.decode([label for label in example["labels"] if label >= 0]) for example in data.examples]
    assert [text.partition("</think>")[2].strip() for text in trained] == ["\\boxed{42}", "\\boxed{7}"]
    assert all(map(thinks_and_answers, trained))


@pytest.mark.parametrize("document", [*blocks("yaml"), *blocks("yaml", SFT)])
def test_every_document_is_valid(document: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(document)
    assert isinstance(load(str(tmp_path / "x.yaml"), []).data, DataConfig)
