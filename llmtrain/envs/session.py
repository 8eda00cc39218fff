"""Records what a program and the policy say to each other, as tokens: a session is one run of the program."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmtrain.data.chat import Message
from llmtrain.data.sampler import derive
from llmtrain.envs.dialogue import Dialogue, Renderer, Rewritten
from llmtrain.rollout.api.choices import Delta
from llmtrain.rollout.api.model import ServedModel, message_of
from llmtrain.rollout.api.refused import Refused
from llmtrain.rollout.api.requests import ChatRequest, CompletionRequest
from llmtrain.types import Sample, Sampling


@dataclass(eq=False)
class Thread:
    """Holds one conversation of a session: a row of tokens."""

    dialogue: Dialogue
    messages: list[Message] = field(default_factory=list)  # what the client has said and heard, without ids
    answered: bool = False  # the last message is the policy's
    asking: bool = True  # a request is under way
    finished: bool = False  # the last turn was not cut


class Session:
    """Implements a `Caller` whose conversations are recorded.

    A request whose messages go on from a recorded conversation is that conversation's tokens, as they were sampled, and
    behind them what is new. One that does not, as its history was rewritten, starts a new row. The run says how is
    sampled: of a request `max_tokens` (at most the run's), `stop` and `stop_token_ids` are obeyed.
    """

    def __init__(self, model: ServedModel, renderer: Renderer | None, sampling: Sampling, seed: int) -> None:
        self.model, self.renderer, self.settings, self.base_seed = model, renderer, sampling, seed
        self.threads: list[Thread] = []
        self.pending: dict[int, list[Thread]] = {}  # by request: the row of each prompt
        self.requests, self.ended = 0, False
        self.lock = threading.Lock()

    def prompts(self, asked: ChatRequest | CompletionRequest) -> list[list[int]]:
        """Returns the token ids of each prompt; see Caller. Any model's name will do."""
        if (asked.n or 1) > 1:
            raise Refused(422, f"n={asked.n}: a session that is recorded has one answer to a request; ask again", "n")
        with self.lock:
            if self.ended:
                raise Refused(401, "the program has ended, and its key with it", code="invalid_api_key")
            if isinstance(asked, ChatRequest):
                threads = [self._conversation(asked)]
            else:
                threads = [Thread(Dialogue(self.renderer, [], [], ids)) for ids in self.model.prompts(asked)]
            rows = [thread.dialogue.context for thread in threads]
            for ids in rows:
                self.model.check_prompt(ids, 1, "messages" if isinstance(asked, ChatRequest) else "prompt")
            self.pending[id(asked)] = threads
            self.threads += [thread for thread in threads if thread not in self.threads]
            for thread in threads:
                thread.asking = True
        return rows

    def sampling(self, asked: ChatRequest | CompletionRequest, prompt_tokens: int) -> Sampling:
        """Returns the run's settings, with the stops of the request; see Caller."""
        most = min(self.settings.max_new_tokens, self.model.continuous.max_seq_tokens - prompt_tokens)
        stop_ids = (*self.settings.stop_ids, *(asked.stop_token_ids or ()))
        stops, most = (*self.settings.stop_strings, *asked.stop), min(most, asked.wanted or most)
        return replace(self.settings, max_new_tokens=most, num_samples=1, stop_ids=stop_ids, stop_strings=stops)

    def seed(self, asked: ChatRequest | CompletionRequest) -> int:
        """Returns the seed of the next request; see Caller."""
        with self.lock:
            self.requests += 1
            return derive(self.base_seed, f"request/{self.requests}")

    def heard(self, asked: ChatRequest | CompletionRequest, prompt: int, whole: Delta) -> None:
        """Records an answer; see Caller."""
        with self.lock:
            if self.ended:  # its rows are read by now
                return
            thread, tokens = self.pending[id(asked)][prompt], whole.tokens
            thread.finished, thread.answered = whole.end != "length", True
            columns = [[t.logprob for t in tokens], [t.version for t in tokens]]
            thread.dialogue.say(Sample([], [t.id for t in tokens], [True] * len(tokens), *columns, thread.finished))
            calls = [{"function": call._asdict()} for call in whole.calls]
            thread.messages.append({"role": "assistant", "content": whole.text, "tool_calls": calls})

    def left(self, asked: ChatRequest | CompletionRequest) -> None:
        """Lets go of the rows of a request; see Caller."""
        with self.lock:
            for thread in self.pending.pop(id(asked), ()):
                thread.asking = False

    def end(self) -> None:
        """Records nothing more: the program has ended, and what it asked last may still be answered."""
        with self.lock:
            self.ended = True

    def _conversation(self, asked: ChatRequest) -> Thread:
        """Returns the conversation that the messages go on from, or a new one."""
        if asked.chat_template_kwargs:
            message = "chat_template_kwargs: are the run's here; set tokenizer.chat_template_kwargs"
            raise Refused(422, message, "chat_template_kwargs")
        if self.renderer is None:
            raise Refused(400, "messages: the tokenizer has no chat template; ask POST /v1/completions", "messages")
        messages = [message_of(turn.model_dump(exclude_unset=True)) for turn in asked.messages]
        tools = asked.shown_tools or []
        for thread in sorted(self.threads, key=lambda thread: -len(thread.messages)):
            if not thread.asking and thread.dialogue.tools == tools and self._goes_on(thread, messages):
                return thread
        try:
            return Thread(Dialogue(self.renderer, messages, tools), messages)
        except ValueError as error:
            raise Refused(400, str(error), "messages") from None

    def _goes_on(self, thread: Thread, messages: Sequence[Message]) -> bool:
        """Adds what is new to a conversation that the messages begin with; returns whether they do."""
        count = len(thread.messages)
        if not thread.messages or list(map(_compared, messages[:count])) != list(map(_compared, thread.messages)):
            return False
        new = list(messages[count:])
        if not thread.answered:  # it was asked, and the answer never came
            return not new
        limit = self.model.continuous.max_seq_tokens
        try:
            if not new or not thread.dialogue.hear(new, limit - 1):
                if not new:
                    return False
                rule = f"the conversation would have more than the {limit} tokens of a row, the context length here"
                message = f"messages: {rule}; shorten it"
                raise Refused(400, message, "messages", "context_length_exceeded")
        except Rewritten:
            return False
        except ValueError as error:
            raise Refused(400, str(error), "messages") from None
        thread.messages, thread.answered = [*thread.messages, *new], False
        return True


def _compared(message: Message) -> Any:
    """Returns what must be equal in a message that was said before: of the policy's turns the text, but for white space
    around it, and the calls, as clients do not send back more."""
    if message["role"] != "assistant":
        return message
    calls = [each.get("function", {}) for each in message.get("tool_calls") or ()]
    return "assistant", message["content"].strip(), [(c.get("name"), c.get("arguments", {})) for c in calls]
