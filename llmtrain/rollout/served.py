"""Asks a model behind a server for the log-probs of given tokens (POST /completions of the OpenAI protocol, as vLLM and
SGLang extend it: prompts as token ids, echoed with their log-probs and ids)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from llmtrain.data.post import ServerFault, post_json

BYTES_PER_TOKEN, OTHER_BYTES = 1024, 65_536  # of an answer: log-probs, ids and texts of two tokens a position
ABOVE_ZERO = 1e-3  # a log-prob may be, by rounding in 16 bits
BELOW_ALL = -9999.0  # what vLLM writes for minus infinity, which JSON has no word for
ID_PREFIX = "token_id:"


@dataclass(frozen=True)
class ServedModel:
    """Holds where a model answers, and how it is asked; threads of one process may share it.

    Example: ServedModel("http://127.0.0.1:8000/v1", "teacher").logprobs([[5, 7, 9]]) is [[log p(7|5), log p(9|5, 7)]]
    """

    url: str
    model: str  # the name that the server gives it
    token: str | None = field(default=None, repr=False)
    threads: int = 8  # requests under way at once
    deadline_s: float = 120.0  # for all sequences of a call together

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Returns the log-probs of all tokens of each sequence but its first, at temperature 1, in nats.

        Raises ServerFault when an answer does not come in time, or does not fit what was asked.
        """
        choices = self._choices(sequences)
        return [read_logprobs(self.url, choice, ids) for choice, ids in zip(choices, sequences, strict=True)]

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids that the server's tokenizer gives each text, perhaps behind one that begins every text.

        Raises ServerFault as `logprobs` does.
        """
        return [read_ids(self.url, choice) for choice in self._choices(texts)]

    def _choices(self, prompts: Sequence[Sequence[int]] | Sequence[str]) -> list[dict[str, Any]]:
        """Returns the choice of the answer to each prompt; the deadline is one for all."""
        deadline = time.monotonic() + self.deadline_s
        pool = ThreadPoolExecutor(self.threads)
        try:
            return list(pool.map(lambda prompt: self._ask(prompt, deadline), prompts))
        finally:
            pool.shutdown(cancel_futures=True)  # those under way end by the deadline

    def _ask(self, prompt: Sequence[int] | str, deadline: float) -> dict[str, Any]:
        """Returns the only choice of the answer to a prompt. A token is sampled behind it, as not every server can do
        without."""
        wanted = {"echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 1.0}
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True, "add_special_tokens": False}
        asked = [list(prompt)] if not isinstance(prompt, str) else prompt
        body = {"model": self.model, "prompt": asked, **wanted, **ids}
        max_bytes = OTHER_BYTES + BYTES_PER_TOKEN * len(prompt)
        answer = post_json(f"{self.url.rstrip('/')}/completions", body, self.token, max_bytes, deadline)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ServerFault(f"{self.url}: answers without a completion of the one prompt that was sent")
        return choices[0]


def read_ids(url: str, choice: dict[str, Any]) -> list[int]:
    """Returns the ids of the prompt that a choice is of. Raises ServerFault when it does not say."""
    ids = choice.get("prompt_token_ids")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ServerFault(
            f"{url}: answers without the ids of the prompt's tokens (prompt_token_ids), so nobody knows what its "
            "log-probs are of; serve the model with a version of vLLM or SGLang that knows return_token_ids"
        )
    return ids


def read_logprobs(url: str, choice: dict[str, Any], ids: Sequence[int]) -> list[float]:
    """Returns the log-probs of all `ids` but the first, whose choice this is. Raises ServerFault unless there is one of
    each of them and a number that a log-prob can be, and none of the first."""
    n, found = len(ids), choice.get("logprobs")
    if read_ids(url, choice) != list(ids):
        raise ServerFault(f"{url}: answers for other token ids than were sent")
    said = found.get("token_logprobs") if isinstance(found, dict) else None
    if not isinstance(said, list) or len(said) not in (n, n + 1):  # of the sampled token, too
        count = len(said) if isinstance(said, list) else "no"
        raise ServerFault(f"{url}: answers with {count} log-probs to {n} tokens; it must give one of each (echo)")
    _check_names(url, found.get("tokens"), ids)
    if said[0] is not None:
        raise ServerFault(
            f"{url}: the log-prob of the first token is {str(said[0])[:40]}, and must be null, as nothing stands "
            "before it; the log-probs of the others may be shifted by one"
        )
    for i, value in enumerate(said[1:n], 1):
        if type(value) not in (int, float) or not BELOW_ALL < value <= ABOVE_ZERO:  # NaN is neither
            raise ServerFault(
                f"{url}: the log-prob of token {ids[i]} at {i} is {str(value)[:40]}, and must be a number above "
                f"{BELOW_ALL:g} and at most 0; the server computes wrongly, or gives something else"
            )
    return [min(float(value), 0.0) for value in said[1:n]]


def _check_names(url: str, names: Any, ids: Sequence[int]) -> None:
    """Raises ServerFault when the server names the tokens of its log-probs by their ids, and these are others."""
    if not isinstance(names, list) or not all(isinstance(n, str) and n.startswith(ID_PREFIX) for n in names):
        return  # SGLang gives their texts
    if names[: len(ids)] != [f"{ID_PREFIX}{i}" for i in ids]:
        raise ServerFault(f"{url}: gives the log-probs of other tokens than were sent")
