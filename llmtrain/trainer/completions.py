"""Reads the `rollout` section: how completions are sampled, where they end, and how they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from llmtrain.config.schema import Config
from llmtrain.data.ends import end_ids
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.trainer.job import tokenizer_dir
from llmtrain.types import Sampling


def sampling_of(config: Config, tokenizer: Tokenizer) -> Sampling:
    """Returns what the rollout section asks for. A completion also ends with the end tokens of the tokenizer and of the
    model that the run starts from."""
    r, ends = config.rollout, end_ids(tokenizer, (config.model.init_from, tokenizer_dir(config)))
    return Sampling(r.max_new_tokens, r.group_size, r.temperature, r.top_p, r.top_k, ends, tuple(r.stop))


def completion_text(config: Config, tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Returns how completions are decoded for rewards and records."""
    return partial(tokenizer.decode, skip_special=config.rollout.skip_special_tokens)


def stop_text(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Returns how completions are decoded to look for `rollout.stop` in them, which may name special tokens."""
    return partial(tokenizer.decode, skip_special=False)
