"""Provides a server of a tiny random model in a thread of the test process, and the `openai` client for it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.rollout.continuous import Continuous, Request, Token
from llmtrain.rollout.native import NativeGenerator
from llmtrain.trainer.completions import stop_text
from tests.byte_tokenizer import save_byte_tokenizer

uvicorn = pytest.importorskip("uvicorn")
TOKEN, NAME = "a-token-of-the-test", "tiny"
CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, ffn_size=48, num_heads=4, num_kv_heads=2, vocab_size=260, max_positions=4096
)


def random_model() -> Decoder:
    model = Decoder(CONFIG)
    initialize(model, CONFIG, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    return model


class Scripted(Continuous):
    """Answers with `script` once where there is one."""

    script: list[int] | None = None
    most_active = 0  # sequences that were decoded together

    def submit(self, request: Request) -> int:
        script, self.script = self.script, None
        if script is None:
            return super().submit(request)
        for i, id_ in enumerate(script):
            end = "stop" if i + 1 == len(script) else None
            request.deliver(Token(0, id_, -1.0, -1.0, [], 0, end))
        return 0

    def _round(self) -> None:
        super()._round()
        self.most_active = max(self.most_active, len(self.decoding.active) if self.decoding else 0)


@dataclass
class Server:
    """Holds what the tests talk to, and a second generator of the same weights to compare with."""

    url: str
    model: Any
    tokenizer: Tokenizer
    reference: NativeGenerator
    client: OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=30)

    @property
    def continuous(self) -> Scripted:
        return self.model.continuous


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Yields the URL of a server of the application, in a thread."""
    sock = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
    thread.start()
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from llmtrain.rollout.api.app import build_app, only
    from llmtrain.rollout.api.callers import Anyone
    from llmtrain.rollout.api.model import ServedModel

    directory = tmp_path_factory.mktemp("serve")
    save_byte_tokenizer(Path(directory, "tokenizer"))
    tokenizer = load_tokenizer(str(directory / "tokenizer"))
    decode, decoder = stop_text(tokenizer), random_model()
    continuous = Scripted(NativeGenerator(decoder, 8, "cpu", decode=decode))
    model = ServedModel(NAME, tokenizer, (tokenizer.eos_id, *tokenizer.turn_end_ids), continuous)
    with serving(build_app(model, only(TOKEN, Anyone(model)))) as url:
        yield Server(url, model, tokenizer, NativeGenerator(decoder, 64, "cpu", decode=decode))
    continuous.close()
