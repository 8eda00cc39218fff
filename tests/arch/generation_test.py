"""Where generation settings are found, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.arch.generation import as_list, read_generation


def test_the_file_wins_over_the_config(tmp_path: Path) -> None:
    assert read_generation(str(tmp_path)) == {}
    config = {"eos_token_id": [2, 5], "pad_token_id": None, "temperature": 3.0, "text_config": {"bos_token_id": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_generation(str(tmp_path)) == {"eos_token_id": [2, 5], "bos_token_id": 1}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 3}')
    assert read_generation(str(tmp_path)) == {"eos_token_id": 7, "top_k": 3}


def test_entries_are_null_a_number_or_a_list() -> None:
    assert [as_list(ids) for ids in (None, 0, [3, 4])] == [[], [0], [3, 4]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", '{"eos_token_id": "</s>"}', 'eos_token_id="</s>": must be a token\'s number'),
        ("generation_config.json", "[]", "must be an object of settings, is []; copy"),
    ],
)
def test_broken_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        read_generation(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / name}: ") and message in str(error.value)
