"""Holds the chat templates that a tokenizer made here may carry."""

from __future__ import annotations

# Each turn is <|im_start|>role, a newline, the content, <|im_end|>, a newline. Nothing is put before the first turn.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML}  # by the value of tokenizer.chat
