"""Names the special tokens, and which of them a configuration needs."""

from __future__ import annotations

from llmtrain.config.schema import DataConfig, TokenizerConfig

PAD, EOS = "<pad>", "<eos>"  # ids 0 and 1 of a tokenizer trained here
IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # ChatML: around each turn; the second ends documents too
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
# As many as in T5: at its rates enough for 2,000 tokens. Longer documents have the same share hidden, in longer spans.
SPANS = tuple(f"<|extra_id_{i}|>" for i in range(100))

NUM_BYTES = 256  # every tokenizer trained here holds all of them


def end_of_text(tokenizer: TokenizerConfig) -> str:
    """Returns the token that ends a document and an answer.

    With a chat template it is the one that ends a turn, so that a model which stops there has ended its turn.
    """
    return IM_END if tokenizer.chat == "chatml" else EOS


def sentinels(data: DataConfig) -> tuple[str, ...]:
    """Returns the special tokens that the objectives need."""
    return (FIM if data.fim_share else ()) + (SPANS if data.span_share else ())


def added_tokens(tokenizer: TokenizerConfig, data: DataConfig) -> list[str]:
    """Returns the special tokens besides padding and end of text, in the order of their ids."""
    start_of_turn = (IM_START,) if tokenizer.chat == "chatml" else ()
    return [*start_of_turn, *sentinels(data), *tokenizer.special_tokens]


def special_tokens(tokenizer: TokenizerConfig, data: DataConfig) -> list[str]:
    """Returns all special tokens of a tokenizer that is trained: ids 0, 1, 2, ..."""
    return [PAD, end_of_text(tokenizer), *added_tokens(tokenizer, data)]
