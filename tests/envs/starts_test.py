"""Rows of a problem file as what episodes and agents begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.data import DataConfig
from llmtrain.data.prompts import PromptSet, Starts
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.envs.starts import examples, starts_of
from tests.data.families import family
from tests.envs.talk import Counting


class Free(Counting):
    """Begins in the same way whatever the row says."""

    def start(self, example: dict) -> list:
        return [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return family("qwen", tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("starts", [starts_of(Free, keep_thinking=True), examples], ids=["environment", "agent"])
def test_a_row_without_a_field_is_refused(starts: Starts, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It would be answered without its environment, in silence, as a probe of the generator is."""
    (rows := tmp_path / "rows.jsonl").write_text('{"n": 0}\n{}\n{"n": null}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the row is empty; an environment or agent is given it"):
        PromptSet(str(rows), tokenizer, 99, DataConfig(), starts=starts)
    rows.write_text('{"n": 0}\n{"n": null}\n')
    prompts = PromptSet(str(rows), tokenizer, 99, DataConfig(), starts=starts)
    assert [prompts.prompt(i, 7).example for i in range(2)] == [{"n": 0}, {"n": None}]
