"""What a worker answers, with a generator of one tensor that notes what it is asked, in a thread of this process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.rollout.channel import Cut, Message, receive, send
from llmtrain.rollout.shared_weights import share, shared_tensors
from llmtrain.rollout.wire import unpack
from llmtrain.rollout.worker import request_of
from llmtrain.rollout.worker_process import Obedient, build_generator, serve
from llmtrain.types import Group, Prompt, Sample, Sampling
from tests.model.llama import SMALL
from tests.rollout.native_test import random_decoder
from tests.rollout.vllm_client_test import MODEL as VLLM_MODEL
from tests.rollout.vllm_stand_in import interpreter


@dataclass
class Slow:
    """Writes six tokens a sample, each of the value of the weights of that moment; `at` is called before each."""

    at: Callable[[int], None]
    weight: int = -1
    version: int = -1
    prompts: list[Sequence[Prompt]] = field(default_factory=list)

    def load_weights(self, weights: Any, version: int) -> None:
        self.weight, self.version = int(dict(weights)["w"]), version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, between: Callable[[], object] | None = None
    ) -> list:
        self.prompts.append(prompts)
        written: list[tuple[int, int]] = []
        for token in range(6):
            self.at(token)
            written.append((self.weight, self.version))
            if between is not None:
                between()
        ids, versions = map(list, zip(*written, strict=True))
        return [[Sample(p.ids, ids, [True] * 6, [0.0] * 6, versions, True)] * sampling.num_samples for p in prompts]


@dataclass
class Trainer:
    """The other side. Newer weights come before the fourth token of the first answer."""

    sock: socket.socket
    fed: bool = False

    def give(self, version: int) -> None:
        shared = share([("w", torch.tensor(float(10 * version)))], version, torch.float32)
        send(self.sock, shared.head(), file=shared.file)

    def at(self, token: int) -> None:
        if token == 3 and not self.fed:
            self.fed = True
            self.give(2)

    def next(self) -> Message:
        message = receive(self.sock, time.monotonic() + 10)
        assert message is not None
        return message

    def sampled(self, inflight: str) -> tuple[list[str], Group, int]:
        """Returns the kinds of what came, a group, and how many samples were rejected."""
        prompts = [Prompt([5], 1), Prompt([6, 7], 2)]
        send(self.sock, {"kind": "generate", "numbers": [8, 9], "inflight": inflight, **request_of(prompts, TWO)})
        kinds = []
        while (message := self.next()).head["kind"] != "groups":
            kinds.append(message.head["kind"])
        groups = unpack(torch.frombuffer(message.payload, dtype=torch.uint8), {8: [5], 9: [6, 7]})
        assert list(groups) == [8, 9] and groups[9][0].prompt_ids == [6, 7] and len(groups[8]) == 2
        return [*kinds, "groups"], groups[8], message.head["rejected"]


TWO = Sampling(max_new_tokens=6, num_samples=2)


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    ours, theirs = socket.socketpair()
    trainer = Trainer(ours)

    def run() -> None:
        with contextlib.suppress(Cut):  # a test may leave before it has read all
            Obedient(theirs, Slow(trainer.at)).run()

    thread = threading.Thread(target=run)
    thread.start()
    assert trainer.next().head == {"kind": "ready"}
    trainer.give(1)
    head = trainer.next().head
    assert (head["kind"], head["version"]) == ("loaded", 1) and head["bytes"] > 4
    yield trainer
    ours.close()
    thread.join(10)
    assert not thread.is_alive()


def test_what_was_begun_is_finished_under_the_old_weights(trainer: Trainer) -> None:
    kinds, group, rejected = trainer.sampled("finish")
    assert (kinds, rejected, group[0].ids, group[0].versions) == (["groups"], 0, [10] * 6, [1] * 6)
    assert trainer.next().head["version"] == 2  # loaded when the answer was out


def test_what_was_begun_goes_on_under_the_new_weights(trainer: Trainer) -> None:
    kinds, group, rejected = trainer.sampled("continue")
    assert (kinds, rejected) == (["loaded", "groups"], 0)
    assert (group[0].ids, group[0].versions) == ([10] * 4 + [20] * 2, [1] * 4 + [2] * 2)


def test_what_was_begun_begins_again_under_the_new_weights(trainer: Trainer) -> None:
    kinds, group, rejected = trainer.sampled("restart")
    assert (kinds, rejected) == (["loaded", "groups"], 4)  # two prompts, two samples each
    assert (group[0].ids, group[0].versions) == ([20] * 6, [2] * 6)


def test_a_sign_of_life(trainer: Trainer) -> None:
    send(trainer.sock, {"kind": "ping"})
    assert trainer.next().head == {"kind": "pong"}


@pytest.mark.parametrize(
    ("error", "kind"),
    [(FloatingPointError("the logits are not finite"), "diverged"), (ValueError("the sides share no"), "refused")],
)
def test_what_no_worker_could_answer_is_told(error: Exception, kind: str) -> None:
    def fail(token: int) -> None:
        raise error

    ours, theirs = socket.socketpair()
    with ours, theirs:
        Obedient(theirs, Slow(fail)).answer({"numbers": [0], "inflight": "finish", **request_of([Prompt([1])], TWO)})
        assert receive(ours).head == {"kind": kind, "error": str(error)}


def test_a_group_that_shares_another_prompt_sends_it() -> None:
    """As those of a game do, whose sides share the beginning of what was asked, with two rows a sample."""

    def play(prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return [[Sample(p.ids[:1], [9], [True], [-0.5], [3], True, parts={"won": 1.0})] * 4 for p in prompts]

    ours, theirs = socket.socketpair()
    prompts = [Prompt([5, 6]), Prompt([7])]
    with ours, theirs:
        head = {"numbers": [2, 3], "inflight": "finish", **request_of(prompts, TWO)}
        Obedient(theirs, Slow(lambda token: None), play).answer(head)
        found = unpack(torch.frombuffer(receive(ours).payload, dtype=torch.uint8), {2: [5, 6], 3: [7]})
    assert [(n, len(group), group[3].prompt_ids, group[0].parts) for n, group in found.items()] == [
        (2, 4, [5], {"won": 1.0}),
        (3, 4, [7], {"won": 1.0}),
    ]


def test_a_trainer_that_leaves_while_it_is_sampled_ends_the_worker() -> None:
    ours, theirs = socket.socketpair()
    send(ours, {"kind": "settings"})
    send(ours, {"kind": "generate", "numbers": [0], "inflight": "continue", **request_of([Prompt([1])], TWO)})
    generator = Slow(lambda token: ours.close() if token == 2 else None)
    with pytest.raises(SystemExit, match="the trainer has closed the connection"):
        serve(theirs, lambda settings: generator)
    assert len(generator.prompts) == 1


def test_the_generator_is_as_the_trainer_describes_it(small_data: Any) -> None:
    settings = {"model": SMALL.model_dump(mode="json"), "dtype": "bfloat16", "device": "cpu", "max_seq_tokens": 64}
    settings |= {"tokenizer": str(small_data / "tokenizer"), "rollout": {"max_batch_seqs": 3}}
    generator = build_generator(settings)
    assert generator.model.embed.weight.dtype == torch.bfloat16
    assert generator.model.head.weight is generator.model.embed.weight
    assert (generator.max_batch_seqs, generator.max_seq_tokens) == (3, 64)
    assert isinstance(generator.decode([5]), str)


def test_a_worker_may_have_a_server(small_data: Any, tmp_path: Path) -> None:
    """Which takes weights between answers."""
    server = {"python": interpreter(tmp_path / "server"), "start_s": 20, "answer_s": 20}
    settings = {"model": VLLM_MODEL.model_dump(mode="json"), "dtype": "float32", "device": "cpu", "max_seq_tokens": 32}
    settings |= {"tokenizer": str(small_data / "tokenizer"), "rollout": {"generator": "vllm", "vllm": server}}
    generator = build_generator(settings)
    try:
        shared = share(random_decoder(VLLM_MODEL).state_dict().items(), 4, torch.float32)
        generator.load_weights(shared_tensors(shared.head(), shared.file), 4)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            head = {"numbers": [1], "inflight": "finish", **request_of([Prompt([5, 7], 3)], TWO)}
            Obedient(theirs, generator).answer(head)
            found = unpack(torch.frombuffer(receive(ours).payload, dtype=torch.uint8), {1: [5, 7]})
        assert [s.versions for s in found[1]] == [[4] * 6] * 2
    finally:
        generator.close()
