"""Scores completions by a rubric: a model behind a server (POST /chat/completions of the OpenAI protocol) judges each
several times."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from llmtrain.config.schema import DataConfig
from llmtrain.config.served import token_of
from llmtrain.data.asked import messages_of, spoken
from llmtrain.data.post import ServerFault, post_json
from llmtrain.data.rows import parse_row
from llmtrain.observe.log import log
from llmtrain.rewards.rubric import filled, read_rubric, rubric_score
from llmtrain.rewards.scorer import Score, warn_once

if TYPE_CHECKING:
    from llmtrain.config.schema import RewardConfig

AS_IT_IS = DataConfig()  # a reward sees fields as they are named here
BYTES_PER_TOKEN, OTHER_BYTES = 64, 65_536  # of an answer: the text of a token, and what stands around
PROBE = ("What is 2 + 2?", "4")  # a task and an answer, which a judge must be able to judge


class JudgeScorer:
    """Scores (completion, row) pairs by the judge of `rewards.rubric`. Equal questions are asked once in a process, and
    with `cache` once for all runs."""

    def __init__(self, reward: RewardConfig) -> None:
        assert reward.rubric is not None
        self.name, self.settings, self.known = reward.name, reward.rubric, None
        self.key = f"rewards.{reward.name}.rubric"

    def start(self) -> None:
        """Reads rubric and cache, and lets the judge judge once. Raises ValueError for a rubric without its fields,
        ServerFault when the judge does not answer, or not as asked."""
        if self.known is None:
            self.rubric = read_rubric(f"{self.key}.rubric", self.settings.rubric)
            self.known = read_cache(self.settings.cache)
            self._judged(filled(self.rubric, *PROBE), time.monotonic() + self.settings.deadline_s, up=True)

    def close(self) -> None:
        """Forgets what was judged; a cache on the disk stays."""
        self.known = None

    def score(self, pairs: Sequence[tuple[str, dict[str, Any]]]) -> list[Score]:
        """Returns the mean score of the judgements of each (completion, row). It is an error where none of them holds a
        score, or the judge did not answer in time."""
        self.start()
        asked = [filled(self.rubric, task_of(row), text) for text, row in pairs]
        missing = [text for text in dict.fromkeys(asked) if self.hash(text) not in self.known]
        deadline = time.monotonic() + self.settings.deadline_s
        with ThreadPoolExecutor(self.settings.threads) as pool:
            found = dict(zip(missing, pool.map(lambda text: self._score(text, deadline), missing), strict=True))
        self._keep({self.hash(text): score.value for text, score in found.items() if score.error is None})
        failed = next((score.error for score in found.values() if score.error), None)
        if failed is not None:
            warn_once(self.name, failed)
        return [found[text] if text in found else Score(self.known[self.hash(text)]) for text in asked]

    def fault(self, row: dict[str, Any]) -> str | None:
        """Returns why a row cannot be judged, None if it can."""
        try:
            task_of(row)
        except ValueError as error:
            return str(error)
        return None

    def hash(self, asked: str) -> str:
        """Returns what a judgement is kept under: all that it follows from but the server's address."""
        s = self.settings
        parts = [s.model, s.votes, s.temperature, s.max_tokens, s.lowest, s.highest, asked]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _score(self, asked: str, deadline: float) -> Score:
        try:
            replies = self._judged(asked, deadline)
        except ServerFault as error:
            return Score(0.0, str(error))
        found = [rubric_score(reply, self.settings.lowest, self.settings.highest) for reply in replies]
        kept = [score for score in found if score is not None]
        return Score(fmean(kept)) if kept else Score(0.0, f"no judgement holds a score: {replies[0][:80]!r}")

    def _judged(self, asked: str, deadline: float, up: bool = False) -> list[str]:
        """Returns the judgements of a completion. Raises ServerFault unless there are as many as were asked for, and
        with `up` at once where nothing listens; else the judge may be starting again."""
        s = self.settings
        body = {"model": s.model, "messages": [{"role": "user", "content": asked}], "n": s.votes}
        body |= {"temperature": s.temperature, "max_tokens": s.max_tokens}
        most = OTHER_BYTES + BYTES_PER_TOKEN * s.votes * s.max_tokens
        answer = post_json(f"{s.url.rstrip('/')}/chat/completions", body, token_of(s.token_env), most, deadline, up=up)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        texts = [text_of(choice) for choice in choices] if isinstance(choices, list) else []
        if len(texts) != s.votes or None in texts:
            raise ServerFault(f"{s.url}: answers with {len(texts)} judgements, {s.votes} were asked for (n)")
        return texts

    def _keep(self, scores: Mapping[str, float]) -> None:
        """Remembers scores, and appends them to the cache."""
        self.known |= scores
        if self.settings.cache is not None and scores:
            lines = "".join(json.dumps({"key": key, "score": score}) + "\n" for key, score in scores.items())
            Path(self.settings.cache).parent.mkdir(parents=True, exist_ok=True)
            with open(self.settings.cache, "ab", buffering=0) as file:  # in one write: ranks share the file
                file.write(lines.encode())


def task_of(row: Mapping[str, Any]) -> str:
    """Returns what a row asks, as text. Raises ValueError when it has no prompt that can be read."""
    example = parse_row(dict(row), AS_IT_IS, answered=False)
    return spoken(messages_of(example)) + example.prefill


def text_of(choice: Any) -> str | None:
    """Returns the text of a choice of an answer, None where it has none."""
    message = choice.get("message") if isinstance(choice, dict) else None
    text = message.get("content") if isinstance(message, dict) else None
    return text if isinstance(text, str) else None


def read_cache(path: str | None) -> dict[str, float]:
    """Returns the scores in a cache. A line that is no judgement, such as one that a kill has cut, is left out, and the
    log says how many there are."""
    known, broken = {}, 0
    for line in Path(path).read_bytes().splitlines() if path is not None and os.path.exists(path) else ():
        try:
            row = json.loads(line)
            known[str(row["key"])] = float(row["score"])
        except (ValueError, KeyError, TypeError):
            broken += 1
    if broken:
        log(f"{path}: {broken} lines hold no judgement, and are left out")
    return known
