"""Scores completions by a reward model of transformers, in this process: weights execute nothing that a model wrote.

It imports torch, so the package imports it only where a document names such a reward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.arch.own_code import loading_fault
from llmtrain.config.schema import DataConfig
from llmtrain.data.encode import Encoder
from llmtrain.data.rows import Example, parse_row
from llmtrain.data.special import SpecialText
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.model.classifier import Classifier
from llmtrain.observe.owned import read_marker
from llmtrain.rewards.scorer import Score, warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtrain.config.schema import RewardConfig

EXPORT = "llmtrain export"  # who made the directory, as its marker says
AS_IT_IS = DataConfig()  # a reward sees fields as they are named here


class ModelScorer:
    """Scores (completion, row) pairs with a reward model, which is loaded once for a process."""

    def __init__(self, reward: RewardConfig) -> None:
        assert reward.model is not None
        self.name, self.reward = reward.name, reward

    def start(self) -> None:
        """Loads the model. Raises ValueError when it is no sequence classifier with one output."""
        try:
            classifier_of(self.reward.model, self.reward.device_map, self.reward.dtype)
            reader_of(self.reward.model, self.reward.render)
        except ValueError as error:
            raise ValueError(f"rewards.{self.name}.model: {error}") from None

    def close(self) -> None:
        """Lets all reward models of this process go; they are loaded again when they are asked."""
        classifier_of.cache_clear()
        reader_of.cache_clear()

    def score(self, pairs: Sequence[tuple[str, dict[str, Any]]]) -> list[Score]:
        """Returns the scores of (completion, row) pairs; equal pairs are scored once.

        A score that is no finite number is an error, and so is a text that is longer than the model reads.
        """
        self.start()
        keys = [(text, id(row)) for text, row in pairs]
        distinct = dict(zip(keys, pairs, strict=True))
        scores = dict(zip(distinct, self._scores(list(distinct.values())), strict=True))
        failed = next((score.error for score in scores.values() if score.error), None)
        if failed is not None:
            warn_once(self.name, failed)
        return [scores[key] for key in keys]

    def _scores(self, pairs: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Score]:
        reward = self.reward
        model = classifier_of(reward.model, reward.device_map, reward.dtype)
        rows = reader_of(reward.model, reward.render).rows(pairs)
        most = model.most_tokens or math.inf
        fit = [row for row in rows if len(row) <= most]
        values = iter(model.scores(fit, reward.batch_tokens))
        for row in rows:
            if len(row) > most:
                yield Score(0.0, f"prompt and completion have {len(row)} tokens, and the model reads {most}")
                continue
            value = next(values)
            yield Score(value) if math.isfinite(value) else Score(0.0, f"returned {value}, which is no finite number")

    def fault(self, row: dict[str, Any]) -> str | None:
        """Returns why a row cannot be scored, None if it can."""
        try:
            reader_of(self.reward.model, self.reward.render).rows([("a", row)])
        except ValueError as error:
            return str(error)
        return None


@functools.cache
def classifier_of(directory: str, device_map: str, dtype: str) -> Classifier:
    """Returns the model of a directory; it is the same for all who ask."""
    return Classifier(directory, device_map, dtype)


@functools.cache
def reader_of(directory: str, render: str) -> OwnRows | Templates:
    """Returns what makes tokens of prompt and completion, as `rewards.render` says."""
    own = read_marker(Path(directory)).get("made_by") == EXPORT if render == "auto" else render == "rows"
    return OwnRows(directory) if own else Templates(directory)


class OwnRows:
    """Makes tokens as recipes of this package train them: text is text, a chat goes through the template, and what
    ends an answer ends the row."""

    def __init__(self, directory: str) -> None:
        self.tokenizer = load_tokenizer(directory)

    def rows(self, pairs: Sequence[tuple[str, dict[str, Any]]]) -> list[list[int]]:
        """Returns the tokens of each (completion, row). Raises ValueError when one has no prompt that can be read."""
        examples = [answered(text, row) for text, row in pairs]
        encoder = Encoder(self.tokenizer, examples, all_turns=False)
        drafts = [encoder.demonstration(example) for example in examples]
        return [ids for ids, _ in encoder.encode(drafts)]


class Templates:
    """Makes tokens as transformers does: by the model's chat template, a text being the turn of a user; without a
    template as plain text, with what the tokenizer puts around it and its end of text."""

    def __init__(self, directory: str) -> None:
        self.tokenizer = fast_tokenizer(directory)
        self.special = SpecialText(self.tokenizer.backend_tokenizer)

    def rows(self, pairs: Sequence[tuple[str, dict[str, Any]]]) -> list[list[int]]:
        """Returns the tokens of each (completion, row). Raises ValueError when one has no prompt that can be read."""
        return [self._row(answered(text, row)) for text, row in pairs]

    def _row(self, example: Example) -> list[int]:
        answer = example.prefill + example.answer
        if self.tokenizer.chat_template is None:
            return self._plain(example.plain if isinstance(example.prompt, list) else example.prompt, answer)
        asked = example.prompt if isinstance(example.prompt, list) else [{"role": "user", "content": example.prompt}]
        turns = self.special.guard([*asked, {"role": "assistant", "content": answer}])
        try:
            text = self.tokenizer.apply_chat_template(turns, example.tools, tokenize=False, **example.template_kwargs)
        except Exception as error:  # a template may raise anything
            raise ValueError(
                f"the chat template of the reward model refuses the row ({' '.join(str(error).split())}); change it"
            ) from None
        return self.special.encode_batch([self.special.mark(text)])[0].ids

    def _plain(self, prompt: str | None, answer: str) -> list[int]:
        if prompt is None:
            raise ValueError("the row has messages, and the reward model no chat template; give the row a `prompt`")
        end = self.tokenizer.eos_token_id
        ids = self.tokenizer(prompt + answer, split_special_tokens=True).input_ids
        return ids if end is None or ids[-1:] == [end] else [*ids, end]


def answered(completion: str, row: dict[str, Any]) -> Example:
    """Returns a row with the completion as its answer; what it had as an answer counts no more."""
    return replace(parse_row(row, AS_IT_IS, answered=False), answer=completion, turns=[], rejected=None)


def fast_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of transformers. Raises ValueError when there is none that is written in Rust: only those
    can keep special tokens apart from text that spells them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds, by what is broken
        raise ValueError(f"{directory}: transformers cannot load its tokenizer ({loading_fault(error)})") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{directory}: its tokenizer has no tokenizer.json; save it with a fast one")
    return tokenizer
