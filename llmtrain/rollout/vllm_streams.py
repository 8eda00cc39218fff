"""Answers requests that come one after the other with a vLLM server, which decodes together what is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from llmtrain.config.vllm import LEAST_TEMPERATURE
from llmtrain.rollout.continuous import Continuous, Request, Streams, Token
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.vllm import VllmGenerator
from llmtrain.types import Sampling


@dataclass(eq=False)
class Sent:
    """Holds a request until it has ended."""

    request: Request
    left: int  # samples that have not ended
    over: bool = False  # nobody hears more of it


class VllmStreams:
    """Implements `Streams` over a server: each sample is a streamed answer of its own, which a thread reads; at most
    `generator.settings.max_batch_seqs` at once, others wait.

    The tokens of a request are those that `generator.generate` gives for its prompt, seed and sampling, up to the
    rounding of a batch.
    """

    def __init__(self, generator: VllmGenerator, most_seqs: int | None = None) -> None:
        """`most_seqs` are decoded together where that is less than `generator.settings.max_batch_seqs`."""
        self.generator, most = generator, generator.settings.max_batch_seqs
        self.pool = ThreadPoolExecutor(min(most_seqs or most, most), "stream")
        self.changed = threading.Condition()
        self.sent: dict[int, Sent] = {}  # by number
        self.count, self.closing = 0, False
        self.reading = 0  # samples and prompts whose thread has not ended

    @property
    def max_seq_tokens(self) -> int:
        return self.generator.max_seq_tokens

    @property
    def vocab_size(self) -> int:
        return self.generator.model.vocab_size

    @property
    def alive(self) -> bool:
        return self.generator.server.keeper.poll() is None

    @property
    def sequences(self) -> int:
        """Returns how many sequences are decoded or wait."""
        with self.changed:
            return sum(sent.left for sent in self.sent.values())

    def refuses(self, sampling: Sampling, top: int | None) -> str | None:
        """Returns why nothing can be sampled so, for who asks; see Streams."""
        t = sampling.temperature
        if 0 < t < LEAST_TEMPERATURE:
            return f"temperature={t:g}: must be 0 (greedy) or at least {LEAST_TEMPERATURE:g} with vLLM; change it"
        if top is not None and not self.generator.raw and t not in (0, 1):
            return (
                f"logprobs: are those of temperature 1, and vLLM gives those of rollout.temperature={t:g}; ask for none"
            )
        return None

    def submit(self, request: Request) -> int:
        """Starts a request and returns its number; see Streams."""
        self.generator.check([request.prompt], request.sampling)
        with self.changed:
            if self.closing:
                raise RuntimeError("the generator is closed")
            self.generator.woken("weights", "kv_cache")
            self.count += 1
            sent = self.sent[self.count] = Sent(request, request.sampling.num_samples)
            self.reading += sent.left
            for sample in range(sent.left):
                self.pool.submit(self._read, self.count, sent, sample)
            return self.count

    def drop(self, number: int) -> None:
        """Ends a request; see Streams. The server hears of it when it has sent the next token."""
        self._end(number)

    def scored(self, ids: Sequence[int], top: int) -> Future[list[Token]]:
        """Returns the future tokens of a prompt; see Streams."""
        with self.changed:
            self.reading += 1
        future = self.pool.submit(self.generator.scored, list(ids), top)
        future.add_done_callback(lambda _: self._let_go())  # also of one that is cancelled before it begins
        return future

    def rest(self) -> None:
        """Ends all requests, and waits until the server has heard of it. Raises ServerFault when it has sampled with
        other weights than those that were loaded last."""
        self._end_all(RuntimeError("ended"))
        with self.changed:
            self.changed.wait_for(lambda: not self.reading)
        self.generator.check_version(self._deadline())

    def close(self) -> None:
        """Ends the server; requests that run are told."""
        with self.changed:
            self.closing = True
        self._end_all(RuntimeError("the server has ended"))
        self.generator.close()  # and with it what the threads read
        self.pool.shutdown(cancel_futures=True)

    def _deadline(self) -> float:
        return time.monotonic() + self.generator.settings.vllm.answer_s

    def _read(self, number: int, sent: Sent, sample: int) -> None:
        """Delivers the tokens of a sample; runs in a thread of the pool."""
        prompt, sampling, top = sent.request.prompt, sent.request.sampling, sent.request.top
        try:
            if sent.over:
                return
            with closing(self.generator.stream(prompt, sample, sampling, self._deadline(), top)) as tokens:
                for token in tokens:
                    if sent.over:
                        return
                    if token.end:  # first: who hears it finds the place free
                        self._complete(number, sent)
                    sent.request.deliver(token)
        except Exception as error:  # whatever it is, other requests go on
            self._end(number, error)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Notes that nothing is read of a sample or prompt any more."""
        with self.changed:
            self.reading -= 1
            self.changed.notify_all()

    def _complete(self, number: int, sent: Sent) -> None:
        """Notes that a sample has ended; the request leaves with its last one."""
        with self.changed:
            sent.left -= 1
            if not sent.left:
                self.sent.pop(number, None)

    def _end(self, number: int, error: Exception | None = None) -> None:
        """Lets go of a request, and tells it why where it has not ended."""
        with self.changed:
            sent = self.sent.pop(number, None)
        if sent is not None:
            sent.over = True
            if error is not None:
                sent.request.deliver(error)

    def _end_all(self, error: Exception) -> None:
        with self.changed:
            numbers = list(self.sent)
        for number in numbers:
            self._end(number, error)


def streams_of(generator: NativeGenerator | VllmGenerator, most_seqs: int | None = None) -> Streams:
    """Returns what answers requests with the generator, `most_seqs` at once where that is less than it can."""
    kind = Continuous if isinstance(generator, NativeGenerator) else VllmStreams
    return kind(generator, most_seqs)
