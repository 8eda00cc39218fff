"""Runs many episodes together over a generator: tokens in, tokens out, one turn of all that still go on at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain

from llmtrain.config.environment import EnvironmentConfig
from llmtrain.data.chat import Message
from llmtrain.data.sampler import derive
from llmtrain.data.tree import shared_tokens
from llmtrain.envs.base import Environment, Reply
from llmtrain.envs.dialogue import Dialogue, Renderer, Rewritten
from llmtrain.rollout.generator import Generator
from llmtrain.types import Group, Prompt, Sample, Sampling

FAILED = "environment"  # the name under which Sample.errors tells that the environment itself failed


class Episode:
    """Holds one episode while it runs: an environment, and the rows of each side that has spoken: its conversation, and
    again from where its history was rewritten."""

    def __init__(
        self,
        environment: Environment,
        renderer: Renderer,
        prompt: Prompt,
        number: int,
        most_tokens: int,
        new_rows: bool = False,
    ) -> None:
        """`most_tokens` bounds a row. `new_rows`: where the chat template renders earlier turns in another way, a new
        row begins; else that is an error."""
        self.environment, self.renderer, self.prompt, self.number = environment, renderer, prompt, number
        self.most_tokens, self.new_rows = most_tokens, new_rows
        self.player, self.turns = 0, 0
        self.going_on, self.finished = True, False
        self.sides: dict[int, list[Dialogue]] = {}
        self.parts: dict[int, dict[str, float]] = {}
        self.errors: dict[str, str] = {}

    def start(self) -> None:
        """Starts the environment, whose first messages the prompt holds as tokens."""
        try:
            messages = self.environment.start(self.prompt.example)
            self.sides[0] = [Dialogue(self.renderer, messages, self.environment.tools, self.prompt.ids)]
        except (Exception, SystemExit) as error:  # of a user's own code; the other episodes go on
            self.sides[0] = [Dialogue(self.renderer, [], [], self.prompt.ids)]
            self._fail(error)

    @property
    def context(self) -> list[int]:
        """Returns the tokens that the next turn follows."""
        return self.sides[self.player][-1].context

    def turn(self, sample: Sample, text: str, max_turns: int) -> None:
        """Takes a turn of the policy, and has the environment answer it."""
        self.sides[self.player][-1].say(sample)
        self.turns += 1
        if not self.going_on:  # it failed at its start
            return
        try:
            reply = self.environment.step(text)
            self._credit(reply)
            check_reply(reply, self.environment.players)
            self.finished = sample.finished and bool(reply.done)
            self.going_on = sample.finished and not reply.done and self.turns < max_turns and self._hear(reply)
        except (Exception, SystemExit) as error:  # as above
            self._fail(error)

    def _hear(self, reply: Reply) -> bool:
        """Adds what is said to who speaks next; returns whether there is room for another turn."""
        self.player, messages = reply.player, reply.messages
        rows = self.sides.get(self.player, [])
        if reply.history is not None:
            messages = reply.history
        elif rows:
            try:
                return rows[-1].hear(messages, self.most_tokens - 1, as_text=self.new_rows)
            except Rewritten:
                if not self.new_rows:
                    raise
                messages = [*rows[-1].history(), *messages]
        row = Dialogue(self.renderer, messages, self.environment.tools)
        if rows and row.prompt_ids[:1] != rows[0].prompt_ids[:1]:
            raise ValueError("a rewritten history begins with another token than the first; begin it as `start` does")
        if len(row.prompt_ids) >= self.most_tokens:
            return False
        self.sides[self.player] = [*rows, row]
        return True

    def _credit(self, reply: Reply) -> None:
        """Adds the rewards of a reply. Raises ValueError for one that is no finite number."""
        self.errors |= {str(name): str(reason) for name, reason in reply.errors.items()}
        for player, parts in chain([(self.player, reply.parts)], reply.parts_of.items()):
            own = self.parts.setdefault(player, {})
            for name, value in parts.items():
                if not math.isfinite(value):
                    raise ValueError(f"the part {name} is {value!r:.40}, no finite number")
                total = own.get(str(name), 0.0) + float(value)
                if not math.isfinite(total):
                    raise ValueError(f"the part {name} is {value!r:.40}, and its sum over the turns no finite number")
                own[str(name)] = total

    def _fail(self, error: BaseException) -> None:
        self.going_on, self.errors = False, {FAILED: f"{type(error).__name__}: {error}"[:300]}

    def samples(self, prompt_tokens: int) -> list[Sample]:
        """Returns the rows of each side, which are one attempt, with its rewards. A side that never spoke has a row in
        which nothing is trained: its reward counts in the group."""
        first, made, players = self.sides[0][0], [], self.environment.players
        for player in range(players):
            for row in self.sides.get(player) or [Dialogue(self.renderer, [], [], first.prompt_ids)]:
                sample = row.sample(self.finished, prompt_tokens, first.versions[0])
                sample.parts, sample.errors = dict(self.parts.get(player, {})), dict(self.errors)
                sample.attempt = self.number * players + player
                made.append(sample)
        return made


def check_reply(reply: Reply, players: int) -> None:
    """Raises ValueError for a reply that a lenient chat template would render as something else, in silence."""
    check_messages(reply.messages, ("user", "tool", "system"), "answer as user or tool")
    if reply.player not in range(players):
        raise ValueError(f"the player {reply.player!r:.40} speaks next, and there are {players} from 0 on")
    if reply.history is not None:
        check_history(reply.history, reply.messages)


def check_history(history: Sequence[Message], messages: Sequence[Message]) -> None:
    """Raises ValueError for a rewritten history that no turn of the policy can follow."""
    if not isinstance(history, Sequence) or not history:
        raise ValueError(f"the history is {history!r:.40}, and no list of messages")
    check_messages(history, ("user", "tool", "system", "assistant"), "a history has user, assistant, tool and system")
    if history[-1]["role"] == "assistant":
        raise ValueError("the history ends with a message of the assistant; end it with what the policy answers")
    if messages:
        raise ValueError("there are messages beside a history, which is all that the policy sees; put them into it")


def check_messages(messages: Sequence[Message], roles: Sequence[str], remedy: str) -> None:
    """Raises ValueError where one is no message, or has another role than these."""
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"a message is {message!r:.60}, and no object with text as `content`")
        if message.get("role") not in roles:
            raise ValueError(f"a message has the role {message.get('role')!r:.40}; {remedy}")


def group_of(episodes: Sequence[Episode]) -> Group:
    """Returns the samples of the episodes of one prompt. They share a prompt: what all of their rows begin with."""
    starts = [row.prompt_ids for episode in episodes for rows in episode.sides.values() for row in rows]
    shared = shared_tokens(min(starts), max(starts))
    if episodes[0].environment.players > 1:  # a side that never spoke has a token behind it
        shared = min(shared, min(map(len, starts)) - 1)
    if shared < 1:
        raise ValueError(
            "rollout.environment: the conversations of the sides begin with different tokens, so they share no prompt; "
            "begin them with a message of the same role and the same first words"
        )
    return [sample for episode in episodes for sample in episode.samples(shared)]


class Episodes:
    """Answers prompts as `Generator.generate` does, each with `num_samples` episodes.

    A group holds the rows of every side of every episode (see `Sample.attempt`). An episode is finished when its
    environment says so; it is cut, and not finished, at `max_turns`, where a turn reaches `max_new_tokens`, or where
    `seq_len` is full. The tokens drawn depend only on the weights, the prompt, its seed and example, the sample's
    number and what the environment answers.
    """

    def __init__(
        self,
        generator: Generator,
        renderer: Renderer,
        make: Callable[[], Environment],
        settings: EnvironmentConfig,
        seq_len: int,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """`decode` returns the text of a turn, as rewards read it; `seq_len` bounds a row, in tokens."""
        self.generator, self.renderer, self.make = generator, renderer, make
        self.settings, self.seq_len, self.decode = settings, seq_len, decode

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, between: Callable[[], object] | None = None
    ) -> list[Group]:
        """Returns the group of each prompt, in their order. Prompts without an example, by which a run probes its
        generator, are continued by the generator itself. Raises as the generator does.

        `between` may load other weights: it is called before each turn behind the first, which these weights then write
        from its first token on, and by the generator within turns. What it raises ends all episodes: their environments
        are closed, and whoever calls again has them start anew.
        """
        if not prompts:
            return []
        ask = self.generator.generate if between is None else partial(self.generator.generate, between=between)
        if not any(prompt.example for prompt in prompts):
            return ask(prompts, sampling)
        with ThreadPoolExecutor(self.settings.threads) as pool:
            games = [[self._episode(p, i) for i in range(sampling.num_samples)] for p in prompts]
            episodes = list(chain.from_iterable(games))
            try:
                list(pool.map(Episode.start, episodes))
                first = ask(prompts, sampling)  # a prompt once for its group
                self._turn(pool, episodes, list(chain.from_iterable(first)))
                while going_on := [episode for episode in episodes if episode.going_on]:
                    if between is not None:
                        between()
                    self._turn(pool, going_on, self._next(ask, going_on, sampling))
            finally:
                list(pool.map(lambda episode: episode.environment.close(), episodes))
        return [group_of(each) for each in games]

    def _episode(self, prompt: Prompt, number: int) -> Episode:
        new_rows = self.settings.rewritten == "new_row"
        return Episode(self.make(), self.renderer, prompt, number, self.seq_len, new_rows)

    def _next(
        self, ask: Callable[[Sequence[Prompt], Sampling], list[Group]], episodes: Sequence[Episode], sampling: Sampling
    ) -> list[Sample]:
        """Returns the next turn of each episode; its random stream follows from the prompt's seed."""
        asked = [Prompt(e.context, derive(e.prompt.seed, f"turn/{e.number}/{e.turns}")) for e in episodes]
        groups = ask(asked, replace(sampling, num_samples=1))
        return [sample for (sample,) in groups]

    def _turn(self, pool: ThreadPoolExecutor, episodes: Sequence[Episode], samples: Sequence[Sample]) -> None:
        """Hands each episode its turn, several at the same time: an environment may wait for what it asks."""

        def take(episode: Episode, sample: Sample) -> None:
            episode.turn(sample, self.decode(sample.ids), self.settings.max_turns)

        list(pool.map(take, episodes, samples))
