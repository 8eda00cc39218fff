"""Generates by running a program of the user's that talks to the policy: a server in this process records it."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from llmtrain.data.sampler import derive
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.data.tree import shared_tokens
from llmtrain.envs.dialogue import Renderer
from llmtrain.envs.episodes import FAILED
from llmtrain.envs.program import Program, Task, rewards_of
from llmtrain.envs.session import Session, Thread
from llmtrain.rollout.generator import Weights
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.vllm import VllmGenerator
from llmtrain.rollout.vllm_streams import streams_of
from llmtrain.sandbox.pool import Reply
from llmtrain.types import Group, Prompt, Sample, Sampling

NAME = "policy"  # what the server calls the model; requests may call it as they like
RENEW_S = 0.1  # between looks for newer weights while the program runs
SILENT = "it asked the policy for nothing"
OTHERS = "some of its prompts begin with another token than those of its group; begin all with the same words"


class Agents:
    """Implements a `Generator` whose samples are runs of a program. Each gets a key of its own, by which the server
    knows the session; a group holds the rows of all sessions of a prompt (see `Sample.attempt`)."""

    def __init__(
        self,
        generator: NativeGenerator | VllmGenerator,
        tokenizer: Tokenizer,
        program: Program,
        rewarded: bool,
        most_seqs: int,
    ) -> None:
        """`rewarded`: there are rewards beside what the program returns. `most_seqs` are decoded together."""
        self.generator, self.tokenizer, self.program, self.rewarded = generator, tokenizer, program, rewarded
        self.renderer = Renderer(tokenizer) if tokenizer.has_chat else None
        self.most_seqs = most_seqs
        self.sessions: dict[str, Session] = {}
        self.server: Server | None = None

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, between: Callable[[], object] | None = None
    ) -> list[Group]:
        """Returns the group of each prompt, with the rows of `num_samples` runs of the program. Prompts without an
        example, by which a run probes its generator, are continued by the generator itself.

        `between` may load other weights: it is called again and again, between two rounds of decoding, and what the
        program asks goes on under these. What it raises is raised when the runs have ended. Native generators alone.
        """
        if not any(prompt.example for prompt in prompts):
            return self.generator.generate(prompts, sampling)
        self.server = self.server or Server(self.generator, self.tokenizer, self.sessions, self.most_seqs)
        asked = [(prompt, i) for prompt in prompts for i in range(sampling.num_samples)]
        made = {secrets.token_urlsafe(24): self._session(sampling, *each) for each in asked}
        self.sessions.update(made)
        try:
            tasks = [Task(p.example, self.server.url, key) for key, (p, _) in zip(made, asked, strict=True)]
            with self.server.renewing(between):
                replies = self.program.run(tasks)
        finally:
            self.sessions.clear()
            for session in made.values():
                session.end()
            self.server.rest()
        runs = list(zip(made.values(), replies, strict=True))
        n = sampling.num_samples
        return [self._group(runs[i : i + n], prompts[i // n]) for i in range(0, len(runs), n)]

    def _session(self, sampling: Sampling, prompt: Prompt, number: int) -> Session:
        assert self.server is not None
        return Session(self.server.model, self.renderer, sampling, derive(prompt.seed, f"agent/{number}"))

    def _group(self, runs: Sequence[tuple[Session, Reply]], prompt: Prompt) -> Group:
        """Returns the rows of all runs of the program with one example. They share a prompt: what all begin with."""
        spoken = [[t for t in session.threads if any(t.dialogue.trained)] for session, _ in runs]
        first = next((t.dialogue.prompt_ids[:1] for t in chain.from_iterable(spoken)), prompt.ids[:1])
        own = [[t for t in threads if t.dialogue.prompt_ids[:1] == first] for threads in spoken]
        starts = [t.dialogue.prompt_ids for t in chain.from_iterable(own)] or [first]
        shared = starts[0][: shared_tokens(min(starts), max(starts))]
        group: Group = []
        for attempt, (threads, (_, reply)) in enumerate(zip(own, runs, strict=True)):
            parts, error = rewards_of(reply, needed=not self.rewarded)
            error = error or (None if len(threads) == len(spoken[attempt]) else OTHERS)
            for sample in self._rows(threads, shared) or [self._silent(shared)]:
                error = error or (None if threads else SILENT)
                sample.parts, sample.attempt = dict(parts), attempt
                sample.errors = {} if error is None else {FAILED: error}
                group.append(sample)
        return group

    def _rows(self, threads: Sequence[Thread], shared: list[int]) -> Group:
        return [t.dialogue.sample(t.finished, len(shared), t.dialogue.versions[0]) for t in threads]

    def _silent(self, shared: list[int]) -> Sample:
        """Returns a row in which nothing is trained, of a run that has none: its reward counts in the group."""
        return Sample(shared, [self.tokenizer.eos_id], [False], [0.0], [self.generator.version], False)

    def load_weights(self, weights: Weights, version: int) -> None:
        self.generator.load_weights(weights, version)

    def checksums(self) -> list[dict[str, str]]:
        return self.generator.checksums()

    def sleep(self) -> None:
        self.generator.sleep()

    def wake(self) -> None:
        self.generator.wake()

    def close(self) -> None:
        """Ends the server and the program's processes."""
        self.program.close()
        if self.server is not None:
            self.server.close()
        self.generator.close()


class Server:
    """Holds a server of this process: it listens at a free port of this machine, in threads."""

    def __init__(
        self,
        generator: NativeGenerator | VllmGenerator,
        tokenizer: Tokenizer,
        sessions: dict[str, Session],
        most_seqs: int,
    ) -> None:
        import uvicorn  # of the extra `serve`

        from llmtrain.rollout.api.app import build_app
        from llmtrain.rollout.api.model import ServedModel

        self.continuous = streams_of(generator, most_seqs)
        self.model = ServedModel(NAME, tokenizer, (), self.continuous)
        sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        app = build_app(self.model, sessions.get)  # keys are random: how long a look-up takes tells nothing of them
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]}, daemon=True)
        self.thread.start()

    @contextlib.contextmanager
    def renewing(self, between: Callable[[], object] | None) -> Iterator[None]:
        """Calls `between` (None: nothing) again and again meanwhile. Raises what it raised, at the end."""
        if between is None:
            yield
            return
        over, failed = threading.Event(), []

        def renew() -> None:
            while not over.wait(RENEW_S) and not failed:
                try:
                    self.continuous.renew(between)
                except Exception as error:  # of any kind: who waits for the program raises it
                    failed.append(error)

        thread = threading.Thread(target=renew, name="renewing", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if failed:
            raise failed[0]

    def rest(self) -> None:
        """Ends the requests that are left, and lets go of the cache."""
        self.continuous.rest()

    def close(self) -> None:
        """Ends the server."""
        self.server.should_exit = True
        self.thread.join()
        self.continuous.close()
