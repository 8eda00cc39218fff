"""Provides a tokenizer whose tokens are bytes, with a chat template: made in an instant, it encodes any text."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from llmtrain.data.chat import CHATML
from llmtrain.data.tokenizer import save

SPECIAL = ("<pad>", "<eos>", "<|im_start|>", "<|im_end|>")
TEMPLATE = CHATML.replace(
    "message['content'] +",
    "message['content'] + (message['tool_calls'] | tojson if message['tool_calls'] else '') +",
)  # and in front of it, what may be called
TOOLS = "{% if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
VOCAB_SIZE = len(SPECIAL) + 256


def save_byte_tokenizer(directory: Path) -> None:
    """Writes it: ids 0 to 3 are the special tokens, then comes one for each byte."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False, use_regex=False), ByteDecoder()
    tokenizer.add_special_tokens(list(SPECIAL))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    save(tokenizer, str(directory), {**config, "chat_template": TOOLS + TEMPLATE})
