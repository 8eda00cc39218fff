"""Runs a process that samples for a trainer: `python -m llmtrain.rollout.worker_process SOCKET PARENT`.

It holds a whole model, takes weights as they come, and answers requests one after the other until the trainer closes
the connection or ends.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.model.decoder import Decoder
from llmtrain.rollout.channel import Message, receive, send
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.shared_weights import shared_tensors
from llmtrain.rollout.wire import pack
from llmtrain.rollout.worker import asked_by
from llmtrain.sandbox.kernel import die_with_parent
from llmtrain.types import Group, Prompt, Sampling


class Gone(Exception):
    """Says that the trainer has closed the connection."""


class Renewed(Exception):
    """Says that newer weights have come, under which what was begun is begun again."""


class Obedient:
    """Answers the requests of a trainer with a generator, such as NativeGenerator."""

    def __init__(self, sock: socket.socket, generator: Any) -> None:
        self.sock, self.generator = sock, generator

    def run(self) -> None:
        """Answers until the trainer closes the connection."""
        send(self.sock, {"kind": "ready"})
        while (message := receive(self.sock)) is not None:
            match message.head["kind"]:
                case "ping":
                    send(self.sock, {"kind": "pong"})
                case "weights":
                    self.load(message)
                case "generate":
                    self.answer(message.head)

    def load(self, message: Message) -> None:
        """Loads weights that have come, and says so."""
        began, head = time.perf_counter(), message.head
        try:
            self.generator.load_weights(shared_tensors(head, message.file), head["version"])
        finally:
            os.close(message.file)
        told = {"version": head["version"], "load_s": time.perf_counter() - began, "bytes": head["bytes"]}
        if head["verify"]:
            told["checksums"] = self.generator.checksums()[0]
        send(self.sock, {"kind": "loaded", **told})

    def answer(self, head: dict[str, Any]) -> None:
        """Sends the groups of the prompts, or why the model cannot be sampled from."""
        prompts, sampling = asked_by(head)
        try:
            groups, rejected = self.sampled(prompts, sampling, head["inflight"])
        except FloatingPointError as error:
            send(self.sock, {"kind": "diverged", "error": str(error)})
            return
        data = pack(dict(zip(head["numbers"], groups, strict=True))).numpy()
        send(self.sock, {"kind": "groups", "rejected": rejected}, memoryview(data))

    def sampled(self, prompts: Sequence[Prompt], sampling: Sampling, inflight: str) -> tuple[list[Group], int]:
        """Returns the groups, and how many samples were begun and thrown away."""
        between: dict[str, Callable[[], object] | None] = {
            "finish": None,
            "continue": self.renewed,
            "restart": self.renewed_again,
        }
        rejected = 0
        while True:
            try:
                return self.generator.generate(prompts, sampling, between[inflight]), rejected
            except Renewed:
                rejected += len(prompts) * sampling.num_samples

    def renewed(self) -> bool:
        """Loads weights if some have come. Raises Gone."""
        if not select.select([self.sock], [], [], 0)[0]:
            return False
        message = receive(self.sock)
        if message is None:
            raise Gone
        assert message.head["kind"] == "weights", message.head["kind"]  # nothing else comes before the answer
        self.load(message)
        return True

    def renewed_again(self) -> None:
        """Loads weights if some have come, and raises Renewed."""
        if self.renewed():
            raise Renewed


def build_generator(settings: dict[str, Any]) -> NativeGenerator:
    """Returns the generator that the trainer describes; its weights come later."""
    config, device = ModelConfig.model_validate(settings["model"]), torch.device(settings["device"])
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(getattr(torch, settings["dtype"])).to_empty(device=device)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    decode = partial(load_tokenizer(settings["tokenizer"]).decode, skip_special=False)
    return NativeGenerator(model, settings["max_batch_seqs"], device, settings["max_seq_tokens"], decode)


def opened(arguments: Sequence[str]) -> socket.socket:
    """Returns the socket that the trainer gave this process, which now ends when the trainer does."""
    die_with_parent()
    if os.getppid() != int(arguments[1]):  # it ended before that
        sys.exit("the trainer is gone")
    return socket.socket(fileno=int(arguments[0]))


def serve(sock: socket.socket, build: Callable[[dict[str, Any]], Any]) -> None:
    """Answers requests with what `build` makes of the settings, the first message, until the trainer is gone."""
    settings = receive(sock)
    if settings is not None:
        try:
            Obedient(sock, build(settings.head)).run()
        except (Gone, ConnectionError):
            sys.exit("the trainer has closed the connection")


if __name__ == "__main__":
    serve(opened(sys.argv[1:]), build_generator)
