"""Episodes in a worker that samples ahead: whose weights wrote which token, and that they can be begun again."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config.environment import EnvironmentConfig
from llmtrain.config.sampling import RolloutConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.envs.base import Reply
from llmtrain.envs.dialogue import Renderer
from llmtrain.envs.episodes import Episodes
from llmtrain.envs.nim import Nim
from llmtrain.envs.worker_process import playing_over
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.rollout.channel import Cut, Message, receive, send
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.shared_weights import share
from llmtrain.rollout.wire import unpack
from llmtrain.rollout.worker import request_of
from llmtrain.rollout.worker_process import Obedient
from llmtrain.types import Group, Prompt, Sampling
from tests.data.families import family
from tests.envs.talk import Counting
from tests.envs.whole_row import whole_row_logprobs

SETTINGS = EnvironmentConfig(game="nim", max_turns=3, threads=1)
NUMBERS = [8, 9]


class Watched(Counting):
    """Tells of every answer before it is given, and counts those who play."""

    at: Callable[[int], None] = staticmethod(lambda answer: None)
    answers = started = closed = 0

    def start(self, example: Any) -> list:
        Watched.started += 1
        return super().start(example)

    def step(self, text: str) -> Reply:
        Watched.answers += 1
        Watched.at(Watched.answers)
        return super().step(text)

    def close(self) -> None:
        Watched.closed += 1


class Side:
    """The trainer's side of a worker of this process: two sets of weights, and a generator of its own to compare."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.config = ModelConfig(
            num_layers=2, hidden_size=32, ffn_size=48, num_heads=4, num_kv_heads=2, vocab_size=tokenizer.vocab_size + 1
        )
        self.models = {version: self.model(version) for version in (1, 2)}
        stops = tuple(range(0, tokenizer.vocab_size, 2))
        self.sampling = Sampling(max_new_tokens=6, num_samples=2, temperature=1.5, stop_ids=stops)
        texts = ("one", "two of them")
        ids = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
        self.prompts = [Prompt(i, n, {"prompt": text}) for n, (i, text) in enumerate(zip(ids, texts, strict=True))]
        self.tokenizer = tokenizer
        self.sock, self.theirs = socket.socketpair()

    def model(self, seed: int) -> Decoder:
        model = Decoder(self.config)
        initialize(model, self.config, seed)
        return model

    def over(self, generator: NativeGenerator) -> Episodes:
        return Episodes(generator, Renderer(self.tokenizer), Watched, SETTINGS, 1000, self.tokenizer.decode)

    def plain(self, version: int) -> list[Group]:
        """What the episodes are without a worker."""
        generator = NativeGenerator(self.models[version], 4, "cpu")
        generator.version = version
        return self.over(generator).generate(self.prompts, self.sampling)

    def run(self) -> None:
        generator = NativeGenerator(self.model(0), 4, "cpu")
        with contextlib.suppress(Cut):  # a test may leave before it has read all
            Obedient(self.theirs, generator, self.over(generator).generate).run()

    def give(self, version: int) -> None:
        shared = share(self.models[version].state_dict().items(), version, torch.float32)
        send(self.sock, shared.head(), file=shared.file)

    def next(self) -> Message:
        message = receive(self.sock, time.monotonic() + 20)
        assert message is not None
        return message

    def asked(self, inflight: str) -> tuple[list[Group], int]:
        """Returns what the worker answers, and how many samples it began in vain."""
        head = {"kind": "generate", "numbers": NUMBERS, "inflight": inflight}
        send(self.sock, {**head, **request_of(self.prompts, self.sampling)})
        while (message := self.next()).head["kind"] != "groups":
            assert message.head["kind"] == "loaded", message.head
        prompts = {n: p.ids for n, p in zip(NUMBERS, self.prompts, strict=True)}
        groups = unpack(torch.frombuffer(message.payload, dtype=torch.uint8), prompts)
        assert list(groups) == NUMBERS
        return list(groups.values()), message.head["rejected"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return family("qwen", tmp_path_factory.mktemp("families"))


@pytest.fixture
def side(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    """A worker that holds weights of version 1; those of version 2 come while its first answers are given."""
    side = Side(tokenizer)
    thread = threading.Thread(target=side.run)
    thread.start()
    assert side.next().head == {"kind": "ready"}
    side.give(1)
    side.next()
    monkeypatch.setattr(Watched, "at", lambda answer: side.give(2) if answer == 1 else None)
    Watched.answers = Watched.started = Watched.closed = 0
    yield side
    side.sock.close()
    thread.join(10)
    assert not thread.is_alive() and Watched.started == Watched.closed


def test_episodes_are_finished_under_the_weights_that_began_them(side: Side) -> None:
    groups, rejected = side.asked("finish")
    assert rejected == 0 and max(len(s.turns()) for group in groups for s in group) == 5
    assert groups == side.plain(1) and all(set(s.parts) == {"characters"} for group in groups for s in group)


def test_episodes_begin_again_under_the_new_weights(side: Side) -> None:
    """By key: the same as if they had begun there. The first four were closed."""
    groups, rejected = side.asked("restart")
    assert rejected == 4 and Watched.started == 8
    assert groups == side.plain(2) != side.plain(1)


def test_episodes_go_on_under_the_new_weights(side: Side) -> None:
    """First turns are of version 1, later ones of version 2 from their first token on, with the log-probs that these
    weights have for the whole row."""
    groups, rejected = side.asked("continue")
    first = side.plain(1)
    assert rejected == 0
    for group, before in zip(groups, first, strict=True):
        for sample, old in zip(group, before, strict=True):
            own = next(len(ids) for trained, ids in sample.turns() if trained)
            assert sample.ids[:own] == old.ids[:own] and sample.logprobs[:own] == old.logprobs[:own]
            by = [v for v, trained in zip(sample.versions, sample.trained, strict=True) if trained]
            assert by == [1] * own + [2] * (len(by) - own)
            expected = whole_row_logprobs(side.models[2], sample, 1.5)
            late = torch.tensor(sample.trained) & (torch.arange(len(sample.ids)) >= own)
            found = torch.tensor(sample.logprobs)
            torch.testing.assert_close(found[late], expected[late], atol=1e-4, rtol=0)  # fp32, another order of sums
    assert {v for group in groups for s in group for v in s.versions} == {1, 2}


def test_what_the_trainer_describes_is_played(tokenizer: Tokenizer, tmp_path: Path) -> None:
    environment = {"game": "nim", "args": {"note_moves": True}, "max_turns": 5}
    rollout = RolloutConfig(environment=environment, skip_special_tokens=False).model_dump(mode="json")
    settings = {"tokenizer": str(tokenizer.directory), "chat_template": None, "chat_template_kwargs": {}}
    episodes = playing_over(settings | {"rollout": rollout, "max_seq_tokens": 64}, "the generator")
    game = episodes.make()
    assert isinstance(game, Nim) and game.note_moves and episodes.generator == "the generator"
    assert (episodes.seq_len, episodes.settings.max_turns) == (64, 5)
    end = tokenizer.turn_end_ids
    assert episodes.decode(end) == "<|im_end|>" and episodes.renderer.chat.template == tokenizer.chat.template
