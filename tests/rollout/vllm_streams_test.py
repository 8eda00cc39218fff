"""Requests that a vLLM server answers, one after the other, against a stand-in for it. What a real one makes of them is
in vllm_test.py."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config.sampling import RolloutConfig
from llmtrain.data.post import ServerFault
from llmtrain.rollout.continuous import Continuous, Request, Token
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.vllm import VllmGenerator
from llmtrain.rollout.vllm_answers import BadAnswer, likeliest_of, read_prompt
from llmtrain.rollout.vllm_streams import VllmStreams, streams_of
from llmtrain.types import Prompt, Sampling
from tests.rollout.api.conftest import random_model
from tests.rollout.continuous_test import heard
from tests.rollout.native_test import random_decoder
from tests.rollout.vllm_client_test import MODEL, PROMPTS, expected
from tests.rollout.vllm_stand_in import asked, interpreter

Behave = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams") / "server"


@pytest.fixture(scope="module")
def streams(folder: Path) -> Iterator[VllmStreams]:
    """Three at once, of a server that tells log-probs of temperature 1."""
    settings = {"python": interpreter(folder), "answer_s": 20, "start_s": 20}
    rollout = RolloutConfig(generator="vllm", vllm=settings, max_batch_seqs=3)
    generator = VllmGenerator(MODEL, rollout, torch.float32, "cpu", 64, lambda ids: "".join(map(chr, ids)), raw=True)
    generator.load_weights(random_decoder(MODEL).state_dict().items(), 7)
    found = streams_of(generator)
    assert isinstance(found, VllmStreams) and found.alive and (found.max_seq_tokens, found.vocab_size) == (64, 97)
    yield found
    found.close()
    assert not found.alive


@pytest.fixture
def behave(folder: Path, streams: VllmStreams) -> Iterator[Behave]:
    yield lambda **how: (folder / "how.json").write_text(json.dumps(how))
    (folder / "how.json").write_text("{}")


def test_a_request_is_what_generate_samples(streams: VllmStreams) -> None:
    """Each sample ends by itself: at a stop token, at a stop string, at its limit."""
    whole = [expected(PROMPTS[0], i, 6) for i in range(3)]
    stop_id, stop_text = whole[0][2], chr(whole[1][3])
    sampling = Sampling(6, 3, stop_ids=(stop_id,), stop_strings=(stop_text,))
    (group,) = streams.generator.generate(PROMPTS[:1], sampling)
    inbox: queue.Queue[Any] = queue.Queue()
    streams.submit(Request(PROMPTS[0], sampling, inbox.put))
    got = heard(inbox, 3)
    assert [[t.id for t in tokens] for tokens in got] == [s.ids for s in group]
    assert [tokens[-1].end for tokens in got] == ["stop" if s.finished else "length" for s in group]
    assert len(got[0]) == 3 and len(got[1]) == 4
    assert [t.logprob for t in got[0]] == group[0].logprobs
    assert got[0][0] == Token(0, whole[0][0], -(whole[0][0] + 1) / 100, None, [], 7, None)
    assert streams.sequences == 0


def test_the_likeliest_tokens_are_told_with_or_without_the_drawn_one(streams: VllmStreams, folder: Path) -> None:
    inbox: queue.Queue[Any] = queue.Queue()
    streams.submit(Request(PROMPTS[1], Sampling(3, temperature=0.5, top_p=0.9), inbox.put, top=2))
    (tokens,) = heard(inbox, 1)
    assert all(t.plain == -(t.id + 1) / 100 and t.logprob is None for t in tokens)  # of temperature 0.5: not told
    best = {i: -(i + 1) / (100 if i == tokens[0].id else 200) for i in (0, 1, 2, tokens[0].id)}
    assert tokens[0].top == sorted(best.items(), key=lambda pair: -pair[1])[:2]
    sent = [each for each in asked(folder) if each.get("stream")][-1]["sampling_params"]
    assert (sent["n"], sent["logprobs"], sent["temperature"], sent["top_p"]) == (1, 3, 0.5, 0.9)
    assert streams.scored([4, 8, 96], 1).result(20) == [
        Token(0, 8, -0.09, -0.09, [(96, -0.005)], 7, None),
        Token(0, 96, -0.005, -0.005, [(96, -0.005)], 7, None),
    ]


def test_at_most_so_many_are_asked_for_at_once(streams: VllmStreams) -> None:
    """Three threads read. What a request that was dropped is told more, is at most what each of them had in hand."""
    inbox: queue.Queue[Any] = queue.Queue()
    number = streams.submit(Request(PROMPTS[2], Sampling(60, 5), inbox.put))
    assert streams.sequences == 5
    assert {inbox.get(timeout=10).sample for _ in range(12)} <= {0, 1, 2}
    streams.drop(number)
    streams.drop(number)
    streams.drop(99)
    told = inbox.qsize()
    assert streams.sequences == 0
    streams.rest()
    assert inbox.qsize() - told <= 3 and not any(isinstance(each, Exception) for each in inbox.queue)
    ended: queue.Queue[Any] = queue.Queue()
    streams.submit(Request(PROMPTS[2], Sampling(60), ended.put))
    ended.get(timeout=10)
    streams.rest()
    with pytest.raises(RuntimeError, match="ended"):
        heard(ended, 1)


def test_a_stream_that_breaks_off_fails_its_request_alone_and_once(streams: VllmStreams, behave: Behave) -> None:
    inbox: queue.Queue[Any] = queue.Queue()
    behave(breaks_off=2)
    streams.submit(Request(PROMPTS[0], Sampling(9, 2), inbox.put))
    with pytest.raises(ServerFault, match="breaks off"):
        heard(inbox, 2)
    streams.rest()
    assert not any(isinstance(each, Exception) for each in inbox.queue) and streams.sequences == 0
    behave()
    after: queue.Queue[Any] = queue.Queue()
    streams.submit(Request(PROMPTS[0], Sampling(9), after.put))
    assert len(heard(after, 1)[0]) == 9


def test_weights_of_another_version_are_noticed_at_the_end(streams: VllmStreams, behave: Behave) -> None:
    behave(version="6")
    with pytest.raises(ServerFault, match=r"weights of version .*'6'.*, not 7"):
        streams.rest()


def test_a_prompt_that_is_scored_is_waited_for(streams: VllmStreams, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a sample is: the server takes no new weights while it computes. One that nobody waits for any more is none."""
    begun, goes_on, rested = threading.Semaphore(0), threading.Event(), threading.Event()

    def scored(ids: list[int], top: int) -> list[Token]:
        begun.release()
        assert goes_on.wait(20)
        return []

    monkeypatch.setattr(streams.generator, "scored", scored)
    running, waiting = [streams.scored([4, 8], 0) for _ in range(3)], streams.scored([4, 8], 0)
    assert all(begun.acquire(timeout=10) for _ in running) and waiting.cancel()
    resting = threading.Thread(target=lambda: [streams.rest(), rested.set()])
    resting.start()
    assert not rested.wait(0.2)
    goes_on.set()
    assert rested.wait(10) and [each.result(0) for each in running] == [[], [], []]


def test_what_cannot_be_told_is_refused(streams: VllmStreams, monkeypatch: pytest.MonkeyPatch) -> None:
    for sampling in (Sampling(4), Sampling(4, temperature=0), Sampling(4, temperature=0.3, top_p=0.5, top_k=3)):
        assert streams.refuses(sampling, 20) is None
    assert streams.refuses(Sampling(4, temperature=0.005), None).startswith("temperature=0.005: must be 0 (greedy)")
    with pytest.raises(ValueError, match="prompt 0 has 64 tokens"):
        streams.submit(Request(Prompt([1] * 64), Sampling(3), print))
    monkeypatch.setattr(streams.generator, "raw", False)
    assert streams.refuses(Sampling(4, temperature=0.5), None) is None
    assert streams.refuses(Sampling(4, temperature=0.5), 0).startswith("logprobs: are those of temperature 1")


def test_the_native_generator_is_decoded_here() -> None:
    native = streams_of(NativeGenerator(random_model(), 1, "cpu"))
    assert isinstance(native, Continuous) and native.alive and native.vocab_size == 260
    assert native.refuses(Sampling(4, temperature=0.005), 20) is None
    native.close()
    assert not native.alive


def test_what_is_no_log_prob_is_refused() -> None:
    place = {"token_id": 5, "logprob": -0.5, "top_logprobs": [{"token_id": 9, "logprob": -0.25}]}
    told = {"logprobs": {"content": [place]}}
    assert likeliest_of(told, 1, 1) == [[(9, -0.25)]] and likeliest_of(told, 1, None) == likeliest_of(told, 1, 0) == [
        []
    ]
    for wrong in (None, [], [7], [{"token_id": "9", "logprob": -0.25}], [{"token_id": 9, "logprob": 0.25}]):
        with pytest.raises(BadAnswer):
            likeliest_of({"logprobs": {"content": [{**place, "top_logprobs": wrong}]}}, 1, 1)
    for rows in (None, [None], [None, None], [None, {"8": {"logprob": -0.5}}], [None, {"9": {"logprob": 0.5}}]):
        with pytest.raises(BadAnswer):
            read_prompt({"prompt_logprobs": rows}, [4, 9], 0)
    with pytest.raises(FloatingPointError):
        read_prompt({"prompt_logprobs": [None, {"9": {"logprob": -9999.0}}]}, [4, 9], 0)
