"""Runs a process that samples for a trainer: `python -m llmtrain.rollout.worker_process SOCKET PARENT`.

It holds a whole model, takes weights as they come, and answers requests one after the other until the trainer closes
the connection or ends. `envs/worker_process.py` runs one that answers with episodes.
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

from llmtrain.config.sampling import RolloutConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.model.decoder import Decoder
from llmtrain.rollout.channel import Message, receive, send
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.shared_weights import shared_tensors
from llmtrain.rollout.vllm import VllmGenerator
from llmtrain.rollout.wire import pack
from llmtrain.rollout.worker import asked_by
from llmtrain.sandbox.kernel import die_with_parent
from llmtrain.types import Group, Prompt, Sampling

Build = Callable[[dict[str, Any]], Any]
"""Takes the settings that a trainer sends, and returns a generator."""


class Gone(Exception):
    """Says that the trainer has closed the connection."""


class Renewed(Exception):
    """Says that newer weights have come, under which what was begun is begun again."""


class Obedient:
    """Answers the requests of a trainer with a generator, such as NativeGenerator, or with what lies over it."""

    def __init__(self, sock: socket.socket, generator: Any, generate: Callable[..., list[Group]] | None = None) -> None:
        """`generate` calls that of the generator and does more; None = it alone."""
        self.sock, self.generator, self.generate = sock, generator, generate or generator.generate

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
        """Sends the groups of the prompts, or why there are none, whoever is asked."""
        prompts, sampling = asked_by(head)
        try:
            groups, rejected = self.sampled(prompts, sampling, head["inflight"])
        except (FloatingPointError, ValueError) as error:
            kind = "diverged" if isinstance(error, FloatingPointError) else "refused"
            send(self.sock, {"kind": kind, "error": str(error)})
            return
        ids = {number: prompt.ids for number, prompt in zip(head["numbers"], prompts, strict=True)}
        data = pack(dict(zip(head["numbers"], groups, strict=True)), ids).numpy()
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
                if (renew := between[inflight]) is None:  # an engine that cannot change within a call takes none
                    return self.generate(prompts, sampling), rejected
                return self.generate(prompts, sampling, renew), rejected
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


def build_generator(settings: dict[str, Any]) -> NativeGenerator | VllmGenerator:
    """Returns the generator that the trainer describes; its weights come later. A server of vLLM belongs to this
    process, and ends with it in whatever way."""
    config, device = ModelConfig.model_validate(settings["model"]), torch.device(settings["device"])
    dtype, most = getattr(torch, settings["dtype"]), settings["max_seq_tokens"]
    decode = partial(load_tokenizer(settings["tokenizer"]).decode, skip_special=False)
    rollout = RolloutConfig.model_validate(settings["rollout"])
    if rollout.generator == "vllm":
        return VllmGenerator(config, rollout, dtype, device, most, decode)
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return NativeGenerator(model, rollout.max_batch_seqs, device, most, decode)


def opened(arguments: Sequence[str]) -> socket.socket:
    """Returns the socket that the trainer gave this process, which now ends when the trainer does."""
    die_with_parent()
    if os.getppid() != int(arguments[1]):  # it ended before that
        sys.exit("the trainer is gone")
    return socket.socket(fileno=int(arguments[0]))


def serve(sock: socket.socket, build: Build, over: Callable[[dict[str, Any], Any], Any] | None = None) -> None:
    """Answers requests with the generator that `build` makes of the settings, the first message, until the trainer is
    gone; or with what `over` makes of the settings and that generator."""
    settings = receive(sock)
    if settings is not None:
        try:
            generator = build(settings.head)
            answering = generator if over is None else over(settings.head, generator)
            Obedient(sock, generator, answering.generate).run()
        except (Gone, ConnectionError):
            sys.exit("the trainer has closed the connection")


if __name__ == "__main__":
    serve(opened(sys.argv[1:]), build_generator)
