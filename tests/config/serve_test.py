"""The arguments of `llmtrain serve`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmtrain.config.document import ConfigError
from llmtrain.config.serve import ServeOptions, serve_options
from llmtrain.config.vllm import VllmConfig

LONG = "a-token-of-my-own-16"


def test_options_and_their_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(tmp_path)
    monkeypatch.delenv("LLMTRAIN_SERVE_TOKEN", raising=False)
    assert serve_options([f"{here}/"]) == ServeOptions(f"{here}/", "127.0.0.1", 8000, None, tmp_path.name, 16, 4096)
    given = ["--host", "0.0.0.0", "--port", "0", "--token", LONG, "--name", "m"]
    more = ["--max-batch-seqs", "3", "--max-seq-tokens=99"]
    assert serve_options([*given, here, *more]) == ServeOptions(here, "0.0.0.0", 0, LONG, "m", 3, 99)
    assert LONG not in repr(serve_options([*given, here]))
    vllm = ["--generator", "vllm", "--vllm-python", "~/p", "--vllm-cache-gib", "0.5"]
    options = serve_options([here, *vllm])
    assert options.generator == "vllm"
    assert options.vllm == VllmConfig(python=os.path.expanduser("~/p"), cache_gib=0.5)
    assert serve_options([here, *vllm[:2]]).vllm == VllmConfig()
    monkeypatch.setenv("LLMTRAIN_SERVE_TOKEN", LONG)
    assert serve_options([here, "--host", "::"]).token == LONG
    assert serve_options([here, "--host", "localhost", "--token", "short"]).token == "short"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "serve: the following arguments are required: RUN|DIRECTORY; llmtrain serve "),
        (["{here}", "--port", "70000"], "serve: argument --port: 70000: must be 0 (any that is free) to 65535"),
        (["{here}", "--token", ""], "serve: argument --token: must be printable ASCII without spaces"),
        (["{here}", "--token", "é" * 20], "serve: argument --token: must be printable ASCII without spaces"),
        (["{here}", "--max-batch-seqs", "0"], "serve: argument --max-batch-seqs: 0: must be at least 1"),
        (["{here}", "--host", "0.0.0.0"], "serve: --host 0.0.0.0: other machines reach it, so it needs a token"),
        (["{here}", "--host", "gpu7", "--token", "short"], "serve: --host gpu7: other machines reach it, so"),
        (["{here}", "--vllm-python", "p"], "serve: --vllm-python p: is read with --generator vllm alone; set that"),
        (["{here}", "--vllm-cache-gib", "2"], "serve: --vllm-cache-gib 2.0: is read with --generator vllm alone"),
        (["{here}", "--vllm-cache-gib", "0"], "serve: argument --vllm-cache-gib: 0: must be above 0"),
        (
            ["{here}", "--generator", "vllm", "--vllm-cache-gib", "2e6"],
            "serve: argument --vllm-cache-gib: 2e6: must be",
        ),
        (["{here}", "--generator", "sglang"], "serve: argument --generator: invalid choice: 'sglang'"),
        (["{here}/no"], "{here}/no: no such directory; give that of a run or of a Hugging Face model"),
    ],
)
def test_wrong_ones_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMTRAIN_SERVE_TOKEN", raising=False)
    with pytest.raises(ConfigError) as raised:
        serve_options([a.replace("{here}", str(tmp_path)) for a in arguments])
    assert str(raised.value).startswith(message.replace("{here}", str(tmp_path))) and "\n" not in str(raised.value)
