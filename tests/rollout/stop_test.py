"""Stop strings are found at the token that completes them, whatever the tokens are cut like."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.stop import Stop
from llmtrain.types import Sampling
from tests.rollout.native_test import flat, random_decoder, random_prompts

TEXT = ["the end of it all\n\nQ: one\nA: 1\n\nQ: ééé ☃☃ 🎈 Stop. stop stop\n"] * 3


def byte_level() -> tuple[Tokenizer, list[list[int]]]:
    """A tokenizer, and runs of tokens to draw from."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", "<x>"]
    settings = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, **settings))
    return trained, [[i] for i in range(trained.get_vocab_size())]


def metaspace() -> tuple[Tokenizer, list[list[int]]]:
    words = ["▁the", "▁end", "▁", "Q", ":", "<0xE2>", "<0x98>", "<0x83>", "e", "n", "d", "▁Q:"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    snowman = [5, 6, 7]  # bytes of one character, which decode together or not at all
    return backend, [snowman, *([i] for i in range(len(words)) if i not in snowman)]


STRINGS = ("\n\nQ:", "☃", " end", "Stop", "<end>", "é", "🎈", " the end of it", "e", "Q: ")


@pytest.mark.parametrize("kind", [byte_level, metaspace])
def test_as_if_the_whole_completion_were_decoded(kind: type) -> None:
    backend, units = kind()
    draw = random.Random(0)
    decode = lambda ids: backend.decode(list(ids), skip_special_tokens=False)  # noqa: E731
    found = 0
    for _ in range(300):
        ids = [i for _ in range(draw.randrange(1, 80)) for i in draw.choice(units)]
        if draw.random() < 0.7:
            ids += backend.encode(draw.choice(TEXT), add_special_tokens=False).ids
        strings = tuple(draw.sample(STRINGS, draw.randrange(1, 4)))
        stop = Stop((), strings, decode)
        ends = (n for n in range(1, len(ids) + 1) if any(s in decode(ids[:n]) for s in strings))
        expected = next(ends, None)
        assert next((n for n in range(1, len(ids) + 1) if stop(ids[:n])), None) == expected
        found += expected is not None
    assert found > 100


def test_tokens_without_text_do_not_hide_what_is_before_them() -> None:
    """A decoder may drop any number of tokens; the tail then reaches further back."""
    stop = Stop((), ("abcd",), lambda ids: "".join(chr(i) for i in ids if i))
    assert stop([*map(ord, "xxxabc"), *[0] * 200, ord("d")])
    assert not stop([*map(ord, "xxxab"), *[0] * 200, ord("d")])


def test_stop_tokens_need_no_decoder() -> None:
    assert Stop((3, 5))([1, 5]) and not Stop((3, 5))([5, 1])


@pytest.mark.parametrize("max_batch_seqs", [2, 64])
def test_the_generator_stops_and_keeps_the_tokens(max_batch_seqs: int) -> None:
    decode = lambda ids: " ".join(f"<{i}>" for i in ids)  # noqa: E731
    sampling = Sampling(20, num_samples=2, temperature=1.3)
    free = flat(NativeGenerator(random_decoder(), max_batch_seqs, "cpu").generate(random_prompts(), sampling))
    first = free[3].ids
    text = decode(first[6:8])  # two tokens in a row
    stopping = Sampling(20, num_samples=2, temperature=1.3, stop_ids=(first[-1],), stop_strings=("<none>", text))
    stopped = NativeGenerator(random_decoder(), max_batch_seqs, "cpu", decode=decode).generate(
        random_prompts(), stopping
    )
    for got, whole in zip(flat(stopped), free, strict=True):
        ends = (n for n in range(1, 21) if whole.ids[n - 1] == first[-1] or text in decode(whole.ids[:n]))
        length = next(ends, 20)
        assert got.ids == whole.ids[:length]
        assert got.finished == (length < 20 or got.ids[-1] == first[-1] or text in decode(got.ids))
    assert len(flat(stopped)[3].ids) == 8
