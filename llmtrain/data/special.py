"""Keeps special tokens apart from text that spells them: what a user wrote is never one."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

import tokenizers


class SpecialText:
    """Encodes text in which special tokens have names of their own, which nobody can write.

    Every special token, and each of `also`, has another name in a copy of the tokenizer; it holds a random number. So
    `<eos>` in a text is five characters, and the name of `<eos>` is the end of a document. Ids are those of the
    tokenizer itself. A conversation is rendered in three steps, so that its template need not know of this:

        guard("say <eos>")         -> "say [number.1]": what a user wrote spells no special token
        the chat template renders  -> only what the template itself put there is a whole `<eos>`
        mark(rendered)             -> that one gets its name, and what the user wrote comes back
    """

    def __init__(self, backend: tokenizers.Tokenizer, also: Sequence[str] = ()) -> None:
        number, self.guard_number = secrets.randbits(128), secrets.randbits(128)
        rules = json.loads(backend.to_str())
        special = [t for t in rules["added_tokens"] if t["content"] and (t["special"] or t["content"] in also)]
        self.ids = {t["content"]: t["id"] for t in special}
        self.names = {content: f"<{number}.{i}>" for content, i in self.ids.items()}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.contents = {i: content for content, i in self.ids.items()}
        self.guarded = re.compile(rf"\[{self.guard_number}\.(\d+)\]")
        self.backend = tokenizers.Tokenizer.from_str(json.dumps(renamed(rules, self.names)))
        moved = [c for c, i in self.ids.items() if self.backend.token_to_id(self.names[c]) != i]
        if moved:
            raise ValueError(f"special token {moved[0]!r}: its id is not that of the vocabulary; mend tokenizer.json")

    def guard(self, value: Any) -> Any:
        """Returns plain data in which no text spells a special token."""
        if isinstance(value, str):
            return self.pattern.sub(lambda found: f"[{self.guard_number}.{self.ids[found[0]]}]", value)
        if isinstance(value, dict):
            return {self.guard(k): self.guard(v) for k, v in value.items()}
        return [self.guard(v) for v in value] if isinstance(value, list) else value

    def mark(self, text: str) -> str:
        """Returns rendered text with the names of its special tokens."""
        marked = self.pattern.sub(lambda found: self.names[found[0]], text)
        return self.guarded.sub(lambda found: self.contents[int(found[1])], marked)

    def encode_batch(self, texts: Sequence[str], places: bool = False) -> list[tokenizers.Encoding]:
        """Returns the encodings of texts in which special tokens have their names, computed on all cores; with `places`
        they know which characters a token stands for, which takes longer."""
        encode = self.backend.encode_batch if places else self.backend.encode_batch_fast
        return encode(list(texts), add_special_tokens=False)


def renamed(rules: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Returns the content of a tokenizer.json with other names for some tokens, and nothing that adds or moves any."""
    model = rules["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:  # Unigram: pairs of token and score
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    added = [token | {"content": names.get(token["content"], token["content"])} for token in rules["added_tokens"]]
    return rules | {"added_tokens": added, "model": model, "post_processor": None, "padding": None, "truncation": None}
