"""Rows that ask what another row asked are read to the same tokens, with the answer in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.config.schema import DataConfig
from llmtrain.data.asked import asking, messages_of, spoken
from llmtrain.data.encode import encode_rows
from llmtrain.data.faults import Faults
from llmtrain.data.prompts import PromptSet
from llmtrain.data.tokenizer import load_tokenizer
from tests.rewards.model_test import CHATML, tokenizer

USER, SYSTEM = {"role": "user", "content": "u"}, {"role": "system", "content": "s"}
ROWS = [
    {"prompt": "2+2=", "answer": "4", "source": "x"},
    {"prompt": "2+2=", "prefill": "so ", "answer": "4"},
    {"messages": [USER], "wanted": 3},
    {"messages": [USER, {"role": "assistant", "content": "gold"}], "system": "s"},
    {"prompt": [USER], "completion": [{"role": "assistant", "content": "gold"}]},
    {"conversations": [{"from": "human", "value": "u"}]},
    {"instruction": "Add.", "input": "2, 2", "output": "4"},
    {"question": "How many?", "answer": "2 + 2\n#### 4"},
    {"prompt": "p", "chosen": "c", "rejected": "r", "label": 0.7},
    {"prompt": "<|im_start|>user\nu<|im_end|>\n", "rendered": True},
]


@pytest.mark.parametrize("chat", [True, False])
def test_the_same_prompt_again(tmp_path: Path, chat: bool) -> None:
    tokenizer(CHATML if chat else None).save_pretrained(tmp_path / "t")
    own = load_tokenizer(str(tmp_path / "t"))
    rows = [row for row in ROWS if chat or not any(isinstance(v, list) for v in row.values())]
    before, after = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    before.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = PromptSet(str(before), own, 999)
    made = [asking(example, chat) for example in prompts.parsed]
    after.write_text("".join(json.dumps({**row, "completion": "gut"}) + "\n" for row in made))
    assert PromptSet(str(after), own, 999).ids == prompts.ids
    trained = list(encode_rows(str(after), own, DataConfig(), Faults("b"), answered=True))
    for ids, row in zip(prompts.ids, trained, strict=True):
        assert row.ids[: len(ids)] == ids and own.decode(row.ids[len(ids) :]).replace(" ", "") == "gut"
        assert row.ids[-1] in (1, 3)
    after.write_text("".join(json.dumps({**row, "chosen": "gut", "rejected": "bad"}) + "\n" for row in made))
    assert PromptSet(str(after), own, 999).ids == prompts.ids
    assert not any({"label", "output", "messages"} & row.keys() for row in made)
    assert [row["answer"] for row in made if "answer" in row] == ["4", "4", "4"]


def test_words() -> None:
    assert spoken([USER]) == "u" and spoken([SYSTEM, USER]) == "System: s\n\nUser: u"
    rendered = asking(parsed({"prompt": "p"}, DataConfig(rendered=True)), False)
    assert rendered == {"prompt": "p", "rendered": True}
    assert messages_of(parsed({"prompt": "p"}, DataConfig())) == [{"role": "user", "content": "p"}]


def parsed(row: dict, settings: DataConfig) -> object:
    from llmtrain.data.rows import parse_row

    return parse_row(row, settings, answered=False)
