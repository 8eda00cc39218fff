"""Decodes requests together that come one after the other, in a thread of its own."""

from __future__ import annotations

import math
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llmtrain.observe.log import log
from llmtrain.rollout.completion import Completion
from llmtrain.rollout.native import Decoding, NativeGenerator
from llmtrain.rollout.stem import without_head
from llmtrain.types import Prompt, Sampling

HEAD_TOKENS = 512  # of a prompt that is scored, whose logits exist at one time


class Token(NamedTuple):
    """Tells of one token of a request, as soon as it is sampled.

    Example: the second sample ends with the stop token 1, p = 1/2 at temperature 1:
        Token(sample=1, id=1, logprob=-0.69, plain=-0.69, top=[(1, -0.69)], version=3, end="stop")
    """

    sample: int  # its number in the group
    id: int
    logprob: float | None  # under the sampling temperature, as in `Sample.logprobs`; None where an engine gives none
    plain: float | None  # the log-prob at temperature 1; None where nobody asked
    top: list[tuple[int, float]]  # the likeliest tokens, with their log-probs at temperature 1
    version: int  # of the weights
    end: str | None  # stop: a stop token or string; length: a limit; None = more follow


Deliver = Callable[[Token | Exception], None]
"""Takes what becomes of a request, in the thread that decodes: its tokens, or the failure that ends it."""


@dataclass(eq=False)
class Request:
    """Holds what is asked for, and while it is decoded its sequences."""

    prompt: Prompt
    sampling: Sampling
    deliver: Deliver
    top: int | None = None  # how many of the likeliest tokens are told; None: not even `Token.plain`
    sequences: list[Completion] = field(default_factory=list)
    left: int = 0  # sequences that have not ended


class Streams(Protocol):
    """Answers requests that come one after the other, whoever decodes. Methods may be called in any thread."""

    max_seq_tokens: int  # of a prompt and what follows it
    vocab_size: int
    alive: bool  # whether requests can be answered
    sequences: int  # that are decoded or wait

    def refuses(self, sampling: Sampling, top: int | None) -> str | None:
        """Returns why nothing can be sampled so, for who asks; None where it can."""

    def submit(self, request: Request) -> int:
        """Starts a request and returns its number. Raises ValueError as `Generator.generate` does, RuntimeError when
        closed."""

    def drop(self, number: int) -> None:
        """Ends a request, which frees its place; one that has ended is no matter."""

    def scored(self, ids: Sequence[int], top: int) -> Future[list[Token]]:
        """Returns the future tokens of a prompt but the first, as the model sees them at temperature 1, with the `top`
        likeliest of each place."""

    def rest(self) -> None:
        """Ends all requests, and lets go of what they held until the next one comes."""

    def close(self) -> None:
        """Ends, with the generator; requests that run are told."""


class Continuous:
    """Implements `Streams` with the decoding of a generator: requests that are there at the same time are decoded
    together, at most `generator.max_batch_seqs` sequences; others wait.

    The tokens of a request are those that `generator.generate` gives for its prompt, seed and sampling, whatever else
    runs.
    """

    def __init__(self, generator: NativeGenerator, most_seqs: int | None = None) -> None:
        """`most_seqs` are decoded together where that is less than `generator.max_batch_seqs`."""
        self.generator, self.most_seqs = generator, min(most_seqs or generator.max_batch_seqs, generator.max_batch_seqs)
        self.changed = threading.Condition()
        self.coming: dict[int, Request] = {}  # by number, not yet seen by the thread
        self.running: dict[int, Request] = {}
        self.dropped: set[int] = set()
        self.jobs: list[tuple[Future, Callable[[], Any]]] = []
        self.count, self.closing = 0, False
        self.decoding: Decoding | None = None
        self.told: dict[Completion, tuple[float, list[tuple[int, float]]]] = {}  # of the newest token, where asked for
        self.thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self.thread.start()

    @property
    def max_seq_tokens(self) -> int:
        return self.generator.max_seq_tokens

    @property
    def vocab_size(self) -> int:
        return self.generator.model.config.vocab_size

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    @property
    def sequences(self) -> int:
        """Returns how many sequences are decoded or wait."""
        with self.changed:
            return sum(r.sampling.num_samples for r in (*self.coming.values(), *self.running.values()))

    def refuses(self, sampling: Sampling, top: int | None) -> str | None:
        """Returns None: all that a request may ask for can be sampled."""
        return None

    def submit(self, request: Request) -> int:
        """Starts a request and returns its number; see Streams."""
        self.generator.sequences(0, request.prompt, request.sampling)  # refuses what is wrong, in the caller's thread
        with self.changed:
            if self.closing:
                raise RuntimeError("the generator is closed")
            self.count += 1
            self.coming[self.count] = request
            self.changed.notify()
            return self.count

    def drop(self, number: int) -> None:
        """Ends a request, which frees its place; one that has ended is no matter."""
        with self.changed:
            if self.coming.pop(number, None) is None and number in self.running:
                self.dropped.add(number)
                self.changed.notify()

    def call(self, job: Callable[[], Any]) -> Future:
        """Returns the future result of what the thread does between two rounds."""
        future: Future = Future()
        with self.changed:
            if self.closing:
                raise RuntimeError("the generator is closed")
            self.jobs.append((future, job))
            self.changed.notify()
        return future

    def renew(self, between: Callable[[], object]) -> None:
        """Calls `between`, which may load other weights, between two rounds: what is decoded goes on under these, as in
        `NativeGenerator.generate`. Raises what it raises."""

        def job() -> None:
            version = self.generator.version
            between()
            if self.generator.version != version and self.decoding is not None:
                self.decoding.forget()

        self.call(job).result()

    def scored(self, ids: Sequence[int], top: int) -> Future[list[Token]]:
        """Returns the future tokens of a prompt; see Streams."""
        return self.call(lambda: prompt_tokens(self.generator, ids, top))

    def rest(self) -> None:
        """Ends all requests, and lets go of the cache until the next one comes."""
        self.call(lambda: self._fail(RuntimeError("ended"))).result()

    def close(self) -> None:
        """Ends the thread after its round; requests that run are told."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()
        self.generator.close()

    @torch.inference_mode()
    def _run(self) -> None:
        while not self.closing:
            try:
                self._awaken()
                self._round()
            except Exception as error:  # whatever it is, the next request may do better
                log("".join(traceback.format_exception(error)).rstrip())
                self._fail(error)
        self._fail(RuntimeError("the server has ended"))

    def _awaken(self) -> None:
        """Waits until there is work, and takes over what has come and gone."""
        with self.changed:
            self.changed.wait_for(lambda: self.closing or self.coming or self.running or self.jobs)
            new, self.coming = self.coming, {}
            self.running.update(new)
            dropped, self.dropped = self.dropped, set()
        for number in new:
            self._admit(number)
        for number in dropped:
            self._leave(number)

    def _admit(self, number: int) -> None:
        request = self.running[number]
        request.sequences = self.generator.sequences(number, request.prompt, request.sampling)
        request.left = len(request.sequences)
        if self.decoding is None:
            self.decoding = self.generator.decoding(self.most_seqs, self._look)
        self.decoding.waiting.extend(request.sequences)

    def _leave(self, number: int) -> None:
        with self.changed:
            gone = self.running.pop(number, None)
        if gone is not None and self.decoding is not None:
            self.decoding.drop(number)

    def _round(self) -> None:
        with self.changed:
            jobs, self.jobs = self.jobs, []
        for future, job in jobs:
            if not future.set_running_or_notify_cancel():  # who asked is gone
                continue
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)
        if self.running:
            fresh = self.decoding.round()
            self._fail_not_finite([s for s in fresh if not math.isfinite(s.logprobs[-1])])
            for sequence in fresh:
                if sequence.group in self.running:
                    self._deliver(sequence)

    def _fail_not_finite(self, sequences: list[Completion]) -> None:
        """Ends the requests of these sequences. Others go on, with a cache that none of what they left can reach."""
        if not sequences:
            return
        for group in {s.group for s in sequences}:
            error = FloatingPointError("the logits are not finite; the weights have diverged")
            log(f"request {group}: {error}")
            request = self.running[group]
            self._leave(group)
            request.deliver(error)
        self.decoding.cache.clean()

    def _look(self, sequences: list[Completion], logits: Tensor) -> None:
        """Notes log-probs at temperature 1, of the sampled and the likeliest tokens, for those who asked."""
        tops = [self.running[s.group].top for s in sequences]
        rows = [row for row, top in enumerate(tops) if top is not None]
        self.told = {}
        if not rows:
            return
        logp = logits[rows].float().log_softmax(-1)
        chosen = torch.tensor([sequences[row].tokens[-1] for row in rows], device=logp.device)
        plain = logp.gather(-1, chosen[:, None])[:, 0].tolist()
        best, ids = (x.tolist() for x in logp.topk(min(max(tops[row] for row in rows), logp.size(-1)), -1))
        for i, row in enumerate(rows):
            count = tops[row]
            self.told[sequences[row]] = plain[i], list(zip(ids[i][:count], best[i][:count], strict=True))

    def _deliver(self, sequence: Completion) -> None:
        """Tells of the newest token of a sequence; the request leaves with its last one."""
        request = self.running[sequence.group]
        plain, top = self.told.get(sequence, (None, []))
        end = "stop" if sequence.stopped else "length" if sequence.done else None
        number, version = request.sequences.index(sequence), self.generator.version
        request.deliver(Token(number, sequence.tokens[-1], sequence.logprobs[-1], plain, top, version, end))
        request.left -= end is not None
        if not request.left:
            with self.changed:
                del self.running[sequence.group]

    def _fail(self, error: Exception) -> None:
        """Ends all requests. The cache goes too: it may hold numbers that are not finite."""
        with self.changed:
            ended = [*self.running.values(), *self.coming.values()]
            jobs, self.jobs = self.jobs, []
            self.running, self.coming, self.decoding, self.generator.cache = {}, {}, None, None
        for request in ended:
            request.deliver(error)
        for future, _ in jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


@torch.inference_mode()
def prompt_tokens(generator: NativeGenerator, ids: Sequence[int], top: int) -> list[Token]:
    """Returns what the model says of each of `ids` but the first, given those before it: log-probs at temperature 1,
    and the `top` likeliest tokens there."""
    rows = torch.tensor([list(ids)], device=generator.device)
    hidden = without_head(generator.model)(rows, torch.arange(len(ids), device=generator.device)[None])[0, :-1]
    found: list[Token] = []
    for start in range(0, len(ids) - 1, HEAD_TOKENS):
        logp = generator.model.head(hidden[start : start + HEAD_TOKENS]).float().log_softmax(-1)
        labels = rows[0, start + 1 : start + 1 + len(logp)]
        plain = logp.gather(-1, labels[:, None])[:, 0].tolist()
        best, likeliest = (x.tolist() for x in logp.topk(min(top, logp.size(-1)), -1))
        for label, value, *of_place in zip(labels.tolist(), plain, likeliest, best, strict=True):
            pairs = list(zip(*of_place, strict=True))
            found.append(Token(0, label, value, value, pairs, generator.version, None))
    return found
