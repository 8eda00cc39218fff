"""Writes rows that ask what another row asked, for what a model makes of prompts: demonstrations and preferences."""

from __future__ import annotations

from typing import Any

from llmtrain.data.chat import Message
from llmtrain.data.rows import Example

SHAPE = {"prompt", "messages", "conversations", "instruction", "input", "output", "question", "text", "system"}
ANSWERS = {"completion", "chosen", "rejected", "label"}


def asking(example: Example, has_chat: bool) -> dict[str, Any]:
    """Returns the row without its answer, its prompt in the field `prompt`: as a text or as messages. What else it has
    stays, such as the `answer` that a reward compares with.

    `has_chat`: the tokenizer has a chat template, which shows Alpaca's rows as a turn. The row is read to the same
    tokens as before.
    """
    kept = {name: value for name, value in example.record.items() if name not in SHAPE | ANSWERS}
    plain = example.plain if not has_chat and isinstance(example.prompt, list) else None
    rendered = {"rendered": True} if example.rendered else {}
    return {"prompt": example.prompt if plain is None else plain, **kept, **rendered}


def messages_of(example: Example) -> list[Message]:
    """Returns the prompt as a conversation; a text is a turn of the user."""
    if isinstance(example.prompt, list):
        return list(example.prompt)
    return [{"role": "user", "content": example.prompt or ""}]


def spoken(messages: list[Message]) -> str:
    """Returns a conversation as text: a single turn as it is, several with the names of who speaks.

    Example: [user "hi", assistant "yo"] -> "User: hi\\n\\nAssistant: yo"
    """
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)
