"""The arguments of `llmtrain chat`."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.chat import ChatOptions, chat_options
from llmtrain.config.document import ConfigError


def test_options_and_their_defaults(tmp_path: Path) -> None:
    here = str(tmp_path)
    assert chat_options([here]) == ChatOptions(here)
    given = ["--prompt=-1?", "--system", "Be brief.", "--temperature", "0", "--max-new-tokens", "9", "--seed=3"]
    assert chat_options([*given, here]) == ChatOptions(here, "-1?", "Be brief.", 0.0, 9, 3)
    assert chat_options([here, "--store", "s", "--passages=5"]) == ChatOptions(here, store="s", passages=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "chat: the following arguments are required: RUN|DIRECTORY; llmtrain chat "),
        (["{here}", "more"], "chat: unrecognized arguments: more"),
        (["{here}", "--temp", "1"], "chat: unrecognized arguments: --temp 1"),
        (
            ["{here}", "--temperature", "nan"],
            "chat: argument --temperature: nan: must be 0 (the likeliest token) or more",
        ),
        (["{here}", "--temperature", "hot"], "chat: argument --temperature: invalid temperature value: 'hot'"),
        (["{here}", "--max-new-tokens", "0"], "chat: argument --max-new-tokens: 0: must be at least 1"),
        (["{here}", "--passages", "0"], "chat: argument --passages: 0: must be at least 1"),
        (["{here}", "--passages", "3"], "chat: --passages 3: is read with --store alone; give one, or leave it out"),
        (["{here}", "--prompt", "\udcff"], "chat: argument --prompt: is not UTF-8"),
        (["{here}/no"], "{here}/no: no such directory; give that of a run or of a Hugging Face model"),
    ],
)
def test_wrong_ones_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        chat_options([a.replace("{here}", str(tmp_path)) for a in arguments])
    assert str(raised.value).startswith(message.replace("{here}", str(tmp_path))) and "\n" not in str(raised.value)
