"""Trains a tokenizer: BPE, WordPiece or Unigram on bytes.

A rule splits a text into words, each word is written as its UTF-8 bytes (one printable character for each), and the
algorithm works on these. The vocabulary holds all 256 bytes, so no text is unknown, and the decoder concatenates the
bytes of the tokens: any text comes back byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llmtrain.config.schema import DataConfig, TokenizerConfig
from llmtrain.config.specials import NUM_BYTES, PAD, end_of_text, special_tokens
from llmtrain.data.chat import TEMPLATES
from llmtrain.data.tokenizer import save
from llmtrain.data.unigram import train_unigram

NUMBER = {"single": r"\p{N}", "triples": r"\p{N}{1,3}", "none": r"\p{N}+"}
ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Splitting rules of published tokenizers, with NUMBER for their rule of digits. GPT-2's is built into the library.
GPT4 = rf"{ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|NUMBER| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDING}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDING}?|NUMBER|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORD = {"gpt4": GPT4, "gpt4o": GPT4O}
# For WordPiece and Unigram: their time grows with the square of a word's length, and text may be one long word.
MAX_WORD_BYTES = 64


def train_tokenizer(
    texts: Iterable[str], directory: str, config: TokenizerConfig, data: DataConfig | None = None
) -> None:
    """Trains on `texts` as `config` says, and writes a Hugging Face directory, whole or not at all.

    BPE: arXiv 1508.07909. WordPiece: the longest known token first (arXiv 1609.08144, section 4.1), on a vocabulary
    that grows as BPE's does. Unigram: arXiv 1804.10959. `data` says which objectives need sentinels. Special tokens
    count in `config.vocab_size`. Raises ValueError when `texts` do not yield that many tokens.
    """
    specials = special_tokens(config, data or DataConfig())
    words = pre_tokenizer(config)
    if config.algorithm == "unigram":
        trained = train_unigram(texts, words, config.vocab_size, specials)
    else:
        trained = train_pairs(texts, words, config, specials)
    trained.pre_tokenizer, trained.decoder = words, decoders.ByteLevel()
    if trained.get_vocab_size() != config.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={config.vocab_size}: the text yields {trained.get_vocab_size()} tokens ({NUM_BYTES} "
            f"bytes, {len(specials)} specials and what was learned); give more text or that size"
        )
    save(trained, directory, entries(config, specials))


def train_pairs(
    texts: Iterable[str], words: pre_tokenizers.PreTokenizer, config: TokenizerConfig, specials: list[str]
) -> Tokenizer:
    """Trains BPE or WordPiece.

    WordPiece's prefix for "inside a word" is empty: a word's first token contains the space before it, and a prefix
    made of text would be ambiguous.
    """
    common = {"vocab_size": config.vocab_size, "special_tokens": specials, "show_progress": False}
    common["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    if config.algorithm == "bpe":
        model, trainer = models.BPE(), trainers.BpeTrainer(**common)
    else:
        model = models.WordPiece(max_input_chars_per_word=MAX_WORD_BYTES)
        trainer = trainers.WordPieceTrainer(continuing_subword_prefix="", **common)
    trained = Tokenizer(model)
    trained.pre_tokenizer = words
    trained.train_from_iterator(texts, trainer)
    return trained


def pre_tokenizer(config: TokenizerConfig) -> pre_tokenizers.PreTokenizer:
    """Returns the steps that split text into words and words into bytes. No token crosses a split."""
    number, gpt2 = NUMBER[config.digits], config.split == "gpt2"
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)]
    if not gpt2:
        steps.insert(0, cut(WORD[config.split].replace("NUMBER", number)))
    elif config.digits == "single":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif config.digits == "triples":
        steps.insert(0, cut(number))
    if config.algorithm != "bpe":
        steps.append(cut(f".{{1,{MAX_WORD_BYTES}}}"))
    return pre_tokenizers.Sequence(steps)


def cut(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Returns a splitter for which each match is a word, and so is the text between two matches."""
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def entries(config: TokenizerConfig, specials: list[str]) -> dict[str, object]:
    """Returns the content of tokenizer_config.json."""
    written: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    written |= {"eos_token": end_of_text(config), "pad_token": PAD, "clean_up_tokenization_spaces": False}
    if specials[2:]:
        written["extra_special_tokens"] = specials[2:]
    if config.chat != "none":
        written["chat_template"] = TEMPLATES[config.chat]
    return written
