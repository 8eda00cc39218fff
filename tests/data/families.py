"""Tiny tokenizers as the families have them: how they cut text, what they put before it, and their chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmtrain.data.chat import CHATML
from llmtrain.data.tokenizer import Tokenizer as Ours
from llmtrain.data.tokenizer import load_tokenizer

TEXT = [
    "The answer is 42, so 3 + 4 = 7.\n\nsystem user assistant model",
    " spaces  and\ttabs; punctuation: (x) [y] {z}!",
]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
QWEN3 = (  # reasoning of earlier turns is left out, and thinking can be switched off
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}{% set thought = m.reasoning_content | default("
    "m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '') %}"
    "{% if loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
R1 = (  # a prompt opens the reasoning, which a whole conversation leaves out
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (  # without any special token
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_level(special: list[str], split: str | None = None, ignore_merges: bool = False) -> Tokenizer:
    """Returns a BPE on bytes, as GPT-2's and Llama 3's."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    cut = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([*cut, level]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=BYTES)
    made.train_from_iterator(TEXT, trainer)
    return made


def sentencepiece_bpe(special: list[str], prepend: str) -> Tokenizer:
    """Returns a BPE on characters with byte fallback, as Llama 2's (`always`: a space before a text), Mistral's
    (`first`) and Gemma's (`never`)."""
    space = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
    learned.train_from_iterator(TEXT * 3, trainers.BpeTrainer(vocab_size=110))
    model = json.loads(learned.to_str())["model"]
    names = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"])]
    merges = [tuple(pair) for pair in model["merges"]]
    vocab = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.pre_tokenizer = space
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([*special, "<unk>"])
    return made


def unigram(special: list[str]) -> Tokenizer:
    """Returns a Unigram model whose vocabulary holds its special tokens, as T5's."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    letters = sorted(set("".join(TEXT)))
    special = ["<unk>", *special]
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=special, unk_token="<unk>", initial_alphabet=letters
    )
    made.train_from_iterator(TEXT * 3, trainer)
    return made


def with_bos(made: Tokenizer, bos: str) -> Tokenizer:
    """Returns the tokenizer with a rule that puts `bos` before every text."""
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return made


Family = tuple[Callable[[], Tokenizer], str | dict, dict[str, str]]

FAMILIES: dict[str, Family] = {
    "qwen": (
        lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        CHATML,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "qwen3": (
        lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        QWEN3,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "llama3": (
        lambda: with_bos(
            byte_level(
                ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
                LLAMA3_SPLIT,
                ignore_merges=True,
            ),
            "<|begin_of_text|>",
        ),
        LLAMA3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "llama2": (
        lambda: with_bos(sentencepiece_bpe(["<s>", "</s>"], "always"), "<s>"),
        LLAMA2,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "mistral": (
        lambda: with_bos(sentencepiece_bpe(["<s>", "</s>"], "first"), "<s>"),
        LLAMA2,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "gemma": (
        lambda: with_bos(
            sentencepiece_bpe(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "never"), "<bos>"
        ),
        GEMMA,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    ),
    "r1": (
        lambda: byte_level(["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"]),
        R1,
        {"bos_token": "<|begin|>", "eos_token": "<|end|>"},
    ),
    "phi3": (
        lambda: byte_level(["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]),
        PHI3,
        {"eos_token": "<|endoftext|>"},
    ),
    "plain": (lambda: byte_level(["<|endoftext|>"]), PLAIN, {"eos_token": "<|endoftext|>"}),
    "unigram": (
        lambda: unigram(["<|im_start|>", "<|im_end|>"]),
        CHATML,
        {"eos_token": "<|im_end|>", "unk_token": "<unk>"},
    ),
}


def family_directory(name: str, directory: Path) -> Path:
    """Writes the tokenizer of a family as transformers saves it, and returns where."""
    make, template, tokens = FAMILIES[name]
    fast = PreTrainedTokenizerFast(tokenizer_object=make(), **tokens)
    fast.chat_template = template
    fast.save_pretrained(directory / name)
    return directory / name


def family(name: str, directory: Path) -> Ours:
    """Returns our tokenizer of a family."""
    return load_tokenizer(str(family_directory(name, directory)))
