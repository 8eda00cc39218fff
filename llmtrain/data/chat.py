"""Renders conversations by a chat template: what comes before a turn of the assistant, and where the turn ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.data.special import SpecialText

if TYPE_CHECKING:
    from llmtrain.data.tokenizer import Tokenizer

# Each turn is <|im_start|>role, a newline, the content, <|im_end|>, a newline. Nothing is put before the first turn.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML}  # by the value of tokenizer.chat

Message = dict[str, Any]
"""One turn: `role`, `content`, and what else the template reads (tool_calls, reasoning_content, ...)."""

logger = logging.getLogger(__name__)

PROBE = "0123456789"  # an answer that is found again in the rendered text
OPEN, CLOSE = "<think>", "</think>"  # around what a model thinks before it answers
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # fields in which templates read it


class Turns(NamedTuple):
    """Holds a rendered conversation, up to the end of the last turn that is trained."""

    text: str  # special tokens have their names (`SpecialText.mark`)
    trained: list[tuple[int, int]]  # first and end character of what the assistant writes
    ended: bool  # the text ends with the token that ends a turn


class Chat:
    """Holds the chat template of a tokenizer. Raises ValueError when there is none, or it is broken.

    `template` names one of several templates, or a file with another; `kwargs` are its variables.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, kwargs: Mapping[str, Any]) -> None:
        self.tokenizer, self.kwargs = tokenizer, dict(kwargs)
        self.template = choose_template(tokenizer, template)
        self._refuse_broken()

    def _refuse_broken(self) -> None:
        """Raises ValueError when the template is no valid Jinja; compiling it here keeps it for later."""
        import jinja2

        try:
            self._render([{"role": "user", "content": "a"}], True, None, {})
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{self.tokenizer.directory}: the chat template is broken (line {error.lineno}: {error.message}); mend "
                "chat_template.jinja or `chat_template` in tokenizer_config.json, or name another with "
                "tokenizer.chat_template"
            ) from None
        except Exception:  # the template refuses this conversation, which says nothing of others
            return

    def _render(self, messages: Sequence[Message], generate: bool, tools: Any, kwargs: Mapping[str, Any]) -> str:
        apply = self.tokenizer.hugging_face.apply_chat_template
        settings = {**self.kwargs, **kwargs, "chat_template": self.template, "add_generation_prompt": generate}
        return apply(list(messages), tools, tokenize=False, **settings)

    def render(
        self, messages: Sequence[Message], generate: bool, tools: Any = None, kwargs: Mapping[str, Any] | None = None
    ) -> str:
        """Returns the conversation as marked text, with `generate` up to the start of the assistant's next turn.

        Raises ValueError, without a place, when the template refuses it.
        """
        try:
            text = self._render(*map(self.special.guard, (list(messages), generate, tools, dict(kwargs or {}))))
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template refuses these messages ({reason}); change them") from None
        return self.special.mark(text)

    @cached_property
    def _end_of_turn(self) -> str | None:
        """Returns the added token that the template puts right behind the assistant's text, None without one."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        try:
            text = self._render(probe, False, None, {})
        except Exception as error:  # it may want other roles, or tools
            where = self.tokenizer.directory
            logger.warning("%s: the chat template tells no end of a turn: %s", where, error)
            return None
        behind = text.rpartition(PROBE)[2].lstrip()
        added = [token.content for token in self.tokenizer.backend.get_added_tokens_decoder().values()]
        return max((token for token in added if token and behind.startswith(token)), key=len, default=None)

    @cached_property
    def turn_end_ids(self) -> tuple[int, ...]:
        """Returns the ids of the token that ends a turn of the assistant; the end of text where there is no other."""
        end = self._end_of_turn
        return (self.tokenizer.eos_id if end is None else self.tokenizer.backend.token_to_id(end),)

    @cached_property
    def special(self) -> SpecialText:
        """Returns the special tokens; the end of a turn is one, also where the tokenizer does not call it so."""
        end, own = self._end_of_turn, self.tokenizer.special_text
        return own if end is None or end in own.names else SpecialText(self.tokenizer.backend, also=(end,))

    def ends_with_special(self, text: str) -> bool:
        """Returns whether marked text ends with a special token."""
        return text.endswith(tuple(self.special.names.values()))

    def turns(
        self,
        messages: Sequence[Message],
        trained: Sequence[int],
        tools: Any = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Turns:
        """Returns the conversation with the turns of these numbers trained, each with the token that ends it.

        Raises ValueError, without a place, when a turn cannot be told from what surrounds it.
        """
        full, spans = self.render(messages, False, tools, kwargs), []
        for i in trained:
            answer, before = written(messages[i]), self.render(messages[:i], True, tools, kwargs)
            # Some templates put into a prompt what they leave out of a whole conversation, as an opening <think>.
            start = len(before) if full.startswith(before) else full.find(answer, common(full, before) - len(answer))
            through = full if i + 1 == len(messages) else self.render(messages[: i + 1], False, tools, kwargs).rstrip()
            # Others write a turn in another way once more turns follow; then only the token that ends it tells its end.
            stop = start + len(self._turn(full[start : len(through) if full.startswith(through) else None]))
            if start < 0 or not holds(full[start:stop], answer):
                raise ValueError(
                    f"the chat template does not render turn {i + 1} behind the turns before it, so it cannot be "
                    "trained; set data.trained_turns=last, or give the row another form"
                )
            if not all(holds(full[start:stop], thought) for thought in thoughts(messages[i])):
                raise ValueError(lost_thought(i + 1, last=i + 1 == len(messages)))
            spans.append((start, stop))
        text = full[: spans[-1][1]]
        return Turns(text, spans, self.ends_with_special(text))

    def _turn(self, text: str) -> str:
        """Returns the part of rendered text that is the assistant's turn: up to the first token that ends one."""
        end_ids = {*self.turn_end_ids, self.tokenizer.eos_id}
        names = [self.special.names[content] for content, i in self.special.ids.items() if i in end_ids]
        ends = [text.index(name) + len(name) for name in names if name in text]
        return text[: min(ends)] if ends else text.rstrip()


def choose_template(tokenizer: Tokenizer, template: str | None) -> str | None:
    """Returns what transformers is to use: a name, the text of a template, or None for the tokenizer's own.

    Raises ValueError when the tokenizer has none, or none of that name.
    """
    known = tokenizer.hugging_face.chat_template
    if template is not None and os.path.isfile(template):
        return Path(template).read_text(encoding="utf-8")
    names = sorted(known) if isinstance(known, dict) else []
    if template is not None and template not in names:
        raise ValueError(
            f"tokenizer.chat_template={template}: neither a file nor a template of {tokenizer.directory}, which has "
            f"{', '.join(names) or 'no names for templates'}; give one of them, or a file with a template"
        )
    if template is None and names and "default" not in names:
        raise ValueError(
            f"{tokenizer.directory}: has several chat templates and none is the default; set tokenizer.chat_template "
            f"to one of {', '.join(names)}"
        )
    if not known:
        raise ValueError(
            f"{tokenizer.directory}: the tokenizer has no chat template, so `messages` cannot be rendered; give the "
            "field `prompt` instead, set tokenizer.chat_template to a file, or add `chat_template` to "
            "tokenizer_config.json"
        )
    return template


def common(first: str, second: str) -> int:
    """Returns the length of the beginning that two texts share."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def written(message: Message) -> str:
    """Returns the text of a message that a template surely renders: without reasoning, which it may leave out."""
    content = message.get("content") or ""
    return content.rpartition(CLOSE)[2].strip()


def thoughts(message: Message) -> list[str]:
    """Returns what the assistant thinks in a turn: what stands before the last `</think>`, and in fields of their
    own."""
    content = message.get("content") or ""
    before = content.rpartition(CLOSE)[0].strip().removeprefix(OPEN)
    return [before, *(message[name] for name in THOUGHTS if isinstance(message.get(name), str))]


def lost_thought(number: int, last: bool) -> str:
    """Returns what a user is told of a trained turn whose thinking the template does not render."""
    remedy = (
        "give the answer as a text, in the field `completion` behind the messages, or set tokenizer.chat_template to "
        "one that keeps it"
        if last
        else "set data.trained_turns=last, or `weight: 0` in that turn"
    )
    return f"the chat template leaves out what turn {number} thinks, so it would not be trained; {remedy}"


def holds(turn: str, text: str) -> bool:
    """Returns whether a rendered turn holds this text, but for white space that a template may change."""
    return "".join(text.split()) in "".join(turn.split())
