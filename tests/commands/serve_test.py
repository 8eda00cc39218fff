"""`llmtrain serve` from its start to the signal that ends it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from openai import APIConnectionError, OpenAI

from llmtrain import cli
from llmtrain.commands.serve import announce
from llmtrain.config.serve import ServeOptions
from tests.byte_tokenizer import VOCAB_SIZE, save_byte_tokenizer
from tests.model.llama import SMALL, random_llama

pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "hf"
    save_byte_tokenizer(path)
    random_llama(SMALL.model_copy(update={"vocab_size": VOCAB_SIZE}), seed=1).save_pretrained(path)
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(
    how: signal.Signals, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer that is under way is finished first."""
    monkeypatch.setenv("LLMTRAIN_SERVE_TOKEN", "given")
    port, heard = free_port(), []
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="given", timeout=20, max_retries=0)

    def ask() -> None:
        while True:
            try:
                client.models.list()
                break
            except APIConnectionError:
                time.sleep(0.02)
        stream = client.completions.create(model="m", prompt="a", max_tokens=100, temperature=9, stream=True)
        heard.append(next(iter(stream)))
        os.kill(os.getpid(), how)
        heard.extend(stream)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    before = signal.getsignal(how)
    assert cli.main(["serve", str(directory), "--port", str(port), "--name", "m", "--max-seq-tokens", "128"]) == 0
    asking.join(10)
    assert heard[-1].choices[0].finish_reason in ("length", "stop") and signal.getsignal(how) == before
    with socket.create_server(("127.0.0.1", port)):  # it is free again
        pass
    said = capsys.readouterr()
    assert said.out == f"export OPENAI_BASE_URL=http://127.0.0.1:{port}/v1\n" and "given" not in said.out + said.err
    assert "128 tokens a sequence" in said.err and not asking.is_alive()
    assert "decoding" not in [thread.name for thread in threading.enumerate()]


def test_a_token_of_its_own_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        announce(ServeOptions("run"), sock, 10, "made-here")
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
    assert capsys.readouterr().out == f"export OPENAI_BASE_URL={url} OPENAI_API_KEY=made-here\n"


def test_what_cannot_be_served_is_one_line(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert cli.main(["serve", str(directory), "--port", str(port)]) == 2
    start = f"serve: --host 127.0.0.1 --port {port}: Address already in use"
    assert capsys.readouterr().err.startswith(start)
    assert cli.main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert capsys.readouterr().err.endswith("give a run or a Hugging Face directory\n")
    monkeypatch.setattr("llmtrain.commands.serve.find_spec", lambda name: None)
    assert cli.main(["serve", str(directory), "--port", "0"]) == 2
    expected = "serve: starlette and uvicorn not installed; pip install -e '.[serve]' -c constraints.txt\n"
    assert capsys.readouterr().err == expected
