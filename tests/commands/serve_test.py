"""`llmtrain serve` from its start to the signal that ends it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from openai import APIConnectionError, OpenAI

from llmtrain import cli
from llmtrain.commands.serve import announce
from llmtrain.config.serve import ServeOptions
from tests.byte_tokenizer import VOCAB_SIZE, save_byte_tokenizer
from tests.model.llama import SMALL, random_llama
from tests.vllm_python import vllm_python

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


def client_of(port: int, timeout_s: float) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="given", timeout=timeout_s, max_retries=0)


def await_server(client: OpenAI) -> None:
    while True:
        try:
            client.models.list()
            return
        except APIConnectionError:
            time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(
    how: signal.Signals, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer that is under way is finished first."""
    monkeypatch.setenv("LLMTRAIN_SERVE_TOKEN", "given")
    port, heard = free_port(), []
    client = client_of(port, 20)

    def ask() -> None:
        await_server(client)
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


def test_a_model_that_vllm_does_not_serve_is_one_line(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["serve", str(directory), "--port", "0", "--generator", "vllm", "--vllm-python"]
    assert cli.main([*asked, str(tmp_path / "none")]) == 2
    end = "is no interpreter that has vLLM; run bash launch/vllm.sh, or name the interpreter of another place\n"
    assert capsys.readouterr().err.endswith(f"serve: --vllm-python {tmp_path / 'none'}: {end}")
    monkeypatch.setattr("llmtrain.rules.vllm.has_gpu", lambda: False)
    (tmp_path / "python").write_text("#!/bin/sh\necho 0.32.0\n")
    (tmp_path / "python").chmod(0o755)
    assert cli.main([*asked, str(tmp_path / "python")]) == 2
    told = "serve: --generator vllm: model.head_dim=8: vLLM's attention on a CPU has heads of"
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_vllm_serves_from_the_start_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Log-probs are those of the model at temperature 1, whatever the sampling; no server is left over."""
    python, port, heard = vllm_python(), free_port(), []
    wide = {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "head_dim": 32, "num_heads": 4, "num_kv_heads": 2}
    llama = random_llama(SMALL.model_copy(update=wide), seed=1)
    save_byte_tokenizer(tmp_path / "hf")
    llama.save_pretrained(tmp_path / "hf")
    monkeypatch.setenv("LLMTRAIN_SERVE_TOKEN", "given")
    monkeypatch.setattr("llmtrain.commands.chat.fast_precision", lambda: "fp32")
    client = client_of(port, 60)

    def ask() -> None:
        await_server(client)
        own = {"temperature": 0.7, "top_p": 0.9, "logprobs": 1, "seed": 3, "extra_body": {"return_token_ids": True}}
        heard.append(client.completions.create(model="hf", prompt="what", max_tokens=9, **own).choices[0])
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    vllm = ["--generator", "vllm", "--vllm-python", python, "--vllm-cache-gib", "0.25"]
    assert cli.main(["serve", str(tmp_path / "hf"), "--port", str(port), *vllm]) == 0
    asking.join(10)
    (answer,) = heard
    ids = torch.tensor([answer.prompt_token_ids + answer.token_ids])
    with torch.no_grad():
        logp = llama.eval()(ids).logits[0, len(answer.prompt_token_ids) - 1 : -1].log_softmax(-1)
    expected = logp.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    assert (torch.tensor(answer.logprobs.token_logprobs) - expected).abs().max() < 4e-5  # fp32, other kernels
    assert not [p for p in psutil.Process().children() if "keeper.py" in " ".join(p.cmdline())]
