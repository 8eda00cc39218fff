"""Sequences that come one after the other, against the generator that has them all at once."""

from __future__ import annotations

import queue
import threading

import pytest
import torch

from llmtrain.rollout.continuous import Continuous, Request, Token
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.sampling import sample as sampled
from llmtrain.types import Prompt, Sampling
from tests.rollout.api.conftest import random_model

SETTINGS = (Sampling(9, 2), Sampling(20, 1, 0.5, top_p=0.8), Sampling(14, 3, 0), Sampling(5, 2, 1.3, top_k=7))


def heard(inbox: queue.Queue, samples: int) -> list[list[Token]]:
    tokens: list[list[Token]] = [[] for _ in range(samples)]
    while not all(each and each[-1].end for each in tokens):
        token = inbox.get(timeout=20)
        if isinstance(token, Exception):
            raise token
        tokens[token.sample].append(token)
    return tokens


def test_what_comes_later_joins_and_changes_nothing() -> None:
    model = random_model()
    running = Continuous(NativeGenerator(model, 3, "cpu"))
    alone = NativeGenerator(model, 8, "cpu")
    asked = [(Prompt(list(range(5 + i, 30 + 7 * i)), seed=i), SETTINGS[i % 4]) for i in range(8)]
    inboxes = [queue.Queue() for _ in asked]
    first = threading.Event()

    def put(inbox: queue.Queue, token: Token | Exception) -> None:
        inbox.put(token)
        first.set()

    for i, ((prompt, sampling), inbox) in enumerate(zip(asked, inboxes, strict=True)):
        running.submit(Request(prompt, sampling, lambda t, inbox=inbox: put(inbox, t), top=2 if i % 2 else None))
        assert first.wait(20)  # the first is under way before the others come
    for (prompt, sampling), inbox in zip(asked, inboxes, strict=True):
        (expected,) = alone.generate([prompt], sampling)
        got = heard(inbox, sampling.num_samples)
        assert [[t.id for t in tokens] for tokens in got] == [s.ids for s in expected]
        for tokens, sample in zip(got, expected, strict=True):
            assert [t.logprob for t in tokens] == pytest.approx(sample.logprobs, abs=1e-5)  # fp32, other batches
            assert (
                tokens[0].plain is None
                or sampling.temperature not in (0, 1)
                or tokens[0].plain == pytest.approx(tokens[0].logprob, abs=1e-6)
            )
    assert running.sequences == 0
    running.close()


def test_a_request_that_is_dropped_makes_room() -> None:
    running = Continuous(NativeGenerator(random_model(), 2, "cpu"))
    long, short = queue.Queue(), queue.Queue()
    number = running.submit(Request(Prompt([5, 6]), Sampling(3000, 2), long.put))
    long.get(timeout=20)
    running.submit(Request(Prompt([7]), Sampling(3), short.put))
    running.drop(number)
    running.drop(number)
    running.drop(99)
    assert len(heard(short, 1)[0]) == 3 and running.sequences == 0
    running.close()


def test_what_is_wrong_is_told_to_who_asked() -> None:
    running = Continuous(NativeGenerator(random_model(), 2, "cpu"))
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        running.submit(Request(Prompt([]), Sampling(3), print))
    with pytest.raises(ZeroDivisionError):
        running.call(lambda: 1 // 0).result(20)
    inbox, weight = queue.Queue(), running.generator.model.head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    running.submit(Request(Prompt([5]), Sampling(3), inbox.put))
    with pytest.raises(FloatingPointError, match="not finite"):
        heard(inbox, 1)
    with torch.no_grad():
        weight.copy_(kept)
    running.submit(Request(Prompt([5]), Sampling(3), inbox.put))
    assert len(heard(inbox, 1)[0]) == 3
    running.close()


def test_who_leaves_before_a_job_harms_nobody() -> None:
    """A client that goes cancels its job; the requests beside it go on."""
    running, inbox, go_on = Continuous(NativeGenerator(random_model(), 2, "cpu")), queue.Queue(), threading.Barrier(2)
    running.submit(Request(Prompt([5, 6]), Sampling(40), inbox.put))
    running.call(lambda: [go_on.wait(20), go_on.wait(20)])
    go_on.wait(20)  # the thread is in that job, so the next one waits
    assert running.call(int).cancel()
    go_on.wait(20)
    assert running.call(lambda: 7).result(20) == 7
    assert len(heard(inbox, 1)[0]) == 40
    running.close()


def test_a_request_that_is_not_finite_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beside it, before and after it in the batch, and one that takes its rows later, get their own tokens."""
    model = random_model()
    running = Continuous(NativeGenerator(model, 4, "cpu"))
    alone = NativeGenerator(model, 4, "cpu")

    def poisoned(logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
        """Breaks what the request of temperature 0.25 has once it is active: its log-probs and rows of the cache."""
        tokens, logprobs = sampled(logits, uniforms, sampling)
        decoding = running.decoding
        rows = [i for i, s in enumerate(decoding.active) if s.sampling.temperature == 0.25]
        if sampling.temperature == 0.25 and rows:
            logprobs = logprobs.clone().fill_(float("nan"))
            for block in (*decoding.cache.keys, *decoding.cache.values):
                block[rows] = float("nan")
        return tokens, logprobs

    kept = Prompt(list(range(5, 25)), 1), Sampling(60, 1, 0.5)
    inboxes = [queue.Queue() for _ in range(4)]
    monkeypatch.setattr("llmtrain.rollout.native.sample", poisoned)
    running.submit(Request(*kept, inboxes[0].put))
    running.submit(Request(Prompt(list(range(40, 70))), Sampling(9, 2, 0.25), inboxes[1].put))
    running.submit(Request(*kept, inboxes[2].put))
    with pytest.raises(FloatingPointError, match="not finite"):
        heard(inboxes[1], 2)
    running.submit(Request(*kept, inboxes[3].put))
    got = [heard(inboxes[i], 1)[0] for i in (0, 2, 3)]
    running.close()
    monkeypatch.undo()
    ((expected,),) = alone.generate([kept[0]], kept[1])
    assert [[t.id for t in tokens] for tokens in got] == [expected.ids] * 3
    assert inboxes[1].empty()  # the failure is told once


def test_the_end_is_told_to_who_waits() -> None:
    running, inbox = Continuous(NativeGenerator(random_model(), 1, "cpu")), queue.Queue()
    running.submit(Request(Prompt([5]), Sampling(4000), inbox.put))
    inbox.get(timeout=20)
    running.close()
    with pytest.raises(RuntimeError, match="the server has ended"):
        heard(inbox, 1)
    with pytest.raises(RuntimeError, match="is closed"):
        running.call(int)
    assert not running.thread.is_alive()
