"""The generator with packed weights: the tokens of the plain one, and never those of old weights."""

from __future__ import annotations

import pytest
import torch

from llmtrain.model.kernels import packed
from llmtrain.rollout.native import NativeGenerator
from llmtrain.types import Sampling
from tests.rollout.native_test import completions, flat, random_decoder, random_prompts

SAMPLING = Sampling(12, num_samples=2, temperature=1.2, stop_ids=(3, 4))


@pytest.fixture
def plain() -> dict[int, list]:
    """Returns the samples of two models, by seed, from a generator that packs nothing: they are small."""
    generators = {seed: NativeGenerator(random_decoder(seed=seed), 5, "cpu") for seed in (0, 1)}
    assert all(g.packed.decoder is g.model for g in generators.values())
    return {seed: flat(g.generate(random_prompts(), SAMPLING)) for seed, g in generators.items()}


@pytest.fixture
def generator(plain: dict, monkeypatch: pytest.MonkeyPatch) -> NativeGenerator:
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 0)
    generator = NativeGenerator(random_decoder(), 5, "cpu")
    assert generator.packed.decoder is not generator.model
    return generator


def same(samples: list, expected: list) -> bool:
    """Tells whether tokens are equal, and log-probs up to rounding: fp32, logits of up to 50."""
    close = (
        a == pytest.approx(b, abs=1e-4)
        for a, b in zip([s.logprobs for s in samples], [s.logprobs for s in expected], strict=True)
    )
    return completions(samples) == completions(expected) and all(close)


def test_samples_what_the_plain_generator_samples(generator: NativeGenerator, plain: dict) -> None:
    assert same(flat(generator.generate(random_prompts(), SAMPLING)), plain[0])


def test_loaded_weights_are_those_that_sample(generator: NativeGenerator, plain: dict) -> None:
    generator.generate(random_prompts(), SAMPLING)
    generator.load_weights(random_decoder(seed=1).named_parameters(), version=1)
    assert same(flat(generator.generate(random_prompts(), SAMPLING)), plain[1])
    assert not same(plain[1], plain[0])


def test_weights_changed_in_place_are_those_that_sample(generator: NativeGenerator, plain: dict) -> None:
    """The tied head too, of which a packed copy that is out of date goes unnoticed elsewhere."""
    generator.generate(random_prompts(), SAMPLING)
    with torch.no_grad():
        for p, other in zip(generator.model.parameters(), random_decoder(seed=1).parameters(), strict=True):
            p.copy_(other)
    prompt = random_prompts()[:1]
    assert list(generator.stream(prompt[0], SAMPLING)) == plain[1][0].ids
    assert generator.model.head.weight is generator.model.embed.weight


@torch.inference_mode()
def test_a_decoding_that_goes_on_sees_new_weights(generator: NativeGenerator, plain: dict) -> None:
    """As `llmtrain serve` does: what starts after the weights were loaded is sampled from them alone."""
    decoding = generator.decoding(4)
    decoding.waiting.extend(generator.sequences(0, random_prompts()[0], SAMPLING))
    decoding.round()
    generator.load_weights(random_decoder(seed=1).named_parameters(), version=1)
    later = generator.sequences(1, random_prompts()[1], SAMPLING)
    decoding.waiting.extend(later)
    while decoding.waiting or decoding.active:
        decoding.round()
    assert same([s.sample(1) for s in later], plain[1][2:4])


def test_packed_weights_live_while_it_is_awake(generator: NativeGenerator, plain: dict) -> None:
    assert generator.packed.memory_bytes == 0
    generator.generate(random_prompts(), SAMPLING)
    # all products: without norms, and the tied head, which is the embedding, counts once
    assert generator.packed.memory_bytes == sum(p.nbytes for p in generator.model.parameters() if p.dim() == 2)
    generator.sleep()
    assert generator.packed.memory_bytes == 0
    generator.wake()
    assert same(flat(generator.generate(random_prompts(), SAMPLING)), plain[0])
