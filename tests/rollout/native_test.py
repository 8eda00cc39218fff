"""The native generator against transformers, against the decoder's own full forward, and against itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.rollout.native import NativeGenerator
from llmtrain.types import Group, Prompt, Sample, Sampling
from tests.model.families import pair
from tests.model.llama import SMALL, loaded, random_llama, smollm2_directory

UNTIED = SMALL.model_copy(update={"tie_embeddings": False, "num_kv_heads": 3, "head_dim": 16})
LENGTHS = (5, 1, 70, 12, 12, 33)  # 70 + new tokens cross a bucket of 64


def random_decoder(config: ModelConfig = SMALL, seed: int = 0, scale: float = 8) -> Decoder:
    model = Decoder(config)
    initialize(model, config, seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.dim() == 2 else 1)
    return model


def random_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Prompt]:
    generator = torch.Generator().manual_seed(2)
    return [Prompt(torch.randint(97, (n,), generator=generator).tolist(), seed=i) for i, n in enumerate(lengths)]


def flat(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group]


def completions(samples: list[Sample]) -> list[list[int]]:
    return [r.ids for r in samples]


@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
def test_greedy_equals_transformers(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("hf")
    llama = random_llama(config, seed=1)
    llama.save_pretrained(directory)
    generator = NativeGenerator(loaded(directory, config), max_batch_seqs=4, device="cpu")
    prompts = random_prompts()
    sampling = Sampling(30, temperature=0, stop_ids=(llama.config.eos_token_id,))
    for prompt, sample in zip(prompts, flat(generator.generate(prompts, sampling)), strict=True):
        ids = torch.tensor([prompt.ids])
        expected = llama.generate(ids, max_new_tokens=30, do_sample=False, attention_mask=torch.ones_like(ids))
        assert sample.prompt_ids + sample.ids == expected[0].tolist()


@torch.no_grad()
def test_windows_equal_transformers_beyond_the_ring() -> None:
    """Gemma 3, rows several times as long as its window and longer than a bucket, prompts on either side of one."""
    shape = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 10, "vocab_size": 97, "max_position_embeddings": 256}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    with pair(Gemma3ForCausalLM, Gemma3TextConfig(**shape, sliding_window=12, layer_types=layers)) as p:
        generator = NativeGenerator(p.ours, max_batch_seqs=3, device="cpu")
        prompts = random_prompts((90, 3, 70, 12))
        samples = flat(generator.generate(prompts, Sampling(70, temperature=0)))
        assert [layer.tokens for layer in generator.cache.layers] == [64, 192, 64]
        for prompt, sample in zip(prompts, samples, strict=True):
            ids = torch.tensor([prompt.ids])
            settings = {"max_new_tokens": 70, "do_sample": False, "attention_mask": torch.ones_like(ids)}
            expected = p.theirs.generate(ids, eos_token_id=None, pad_token_id=0, **settings)
            assert prompt.ids + sample.ids == expected[0].tolist()


@torch.no_grad()
def test_greedy_equals_transformers_on_smollm2(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = smollm2_directory(tmp_path_factory)
    tokenizer, llama = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    model = loaded(directory, resolve_model(ModelConfig(init_from=str(directory))))
    questions = ("What is the capital of France?", "Hello")
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [Prompt(tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"]) for c in chats]
    sampling = Sampling(8, num_samples=2, temperature=0, stop_ids=(2,))
    samples = flat(NativeGenerator(model, 3, "cpu").generate(prompts, sampling))
    for prompt, first, second in zip(prompts, samples[::2], samples[1::2], strict=True):
        ids = torch.tensor([prompt.ids])
        expected = llama.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
        assert prompt.ids + first.ids == expected[0].tolist()
        assert first.ids == second.ids
    assert tokenizer.decode(samples[0].ids, skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.parametrize("sampling", [Sampling(40, 3, 0.7), Sampling(20, 2, 1.5, top_p=0.8), Sampling(9, 1, 0)])
@torch.no_grad()
def test_logprobs_equal_the_full_forward(sampling: Sampling) -> None:
    model = random_decoder()
    samples = flat(NativeGenerator(model, 5, "cpu").generate(random_prompts(), sampling))
    assert len(samples) == 6 * sampling.num_samples
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        temperature = torch.tensor([sampling.temperature or 1.0])
        logp, _ = model(ids[:, :-1], torch.arange(ids.size(1) - 1)[None], labels=ids[:, 1:], temperature=temperature)
        got, expected = torch.tensor(sample.logprobs), logp[0, len(sample.prompt_ids) - 1 :]
        assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("max_batch_seqs", [1, 3, 7])
def test_batch_size_changes_nothing(max_batch_seqs: int) -> None:
    sampling = Sampling(20, num_samples=4, temperature=1.3, stop_ids=tuple(range(5)))
    model = random_decoder()
    whole = flat(NativeGenerator(model, 64, "cpu").generate(random_prompts(), sampling))
    parts = flat(NativeGenerator(model, max_batch_seqs, "cpu").generate(random_prompts(), sampling))
    assert completions(whole) == completions(parts)
    assert len({tuple(c) for c in completions(whole)}) > 20  # the samples of a group differ
    assert len({len(c) for c in completions(whole)}) > 5  # and end at different steps
    assert [r.prompt_ids for r in parts] == [p.ids for p in random_prompts() for _ in range(4)]


def test_weights_that_change_in_flight() -> None:
    """One row at a time: the first sequence has 20 tokens when the weights change, the others begin under the new
    ones, without what was computed of their prompts before."""
    old, new = random_decoder(seed=0), random_decoder(seed=1)
    prompts = random_prompts((40, 40, 12))
    prompts = [Prompt(prompts[0].ids[:36] + p.ids[:4]) for p in prompts]  # begin alike: computed once
    sampling, calls = Sampling(30, temperature=0), []
    generator = NativeGenerator(random_decoder(seed=0), 1, "cpu")

    def between() -> None:
        calls.append(None)
        if len(calls) == 20:
            generator.load_weights(new.state_dict().items(), 5)

    samples = flat(generator.generate(prompts, sampling, between))
    before = flat(NativeGenerator(old, 1, "cpu").generate(prompts, sampling))
    after = flat(NativeGenerator(new, 1, "cpu").generate(prompts, sampling))
    assert samples[0].versions == [0] * 20 + [5] * 10
    assert samples[0].ids[:20] == before[0].ids[:20] and samples[0].ids[20:] != before[0].ids[20:]
    for i in (1, 2):
        assert samples[i].versions == [5] * 30 and samples[i].ids == after[i].ids != before[i].ids
        assert samples[i].logprobs == pytest.approx(after[i].logprobs, abs=1e-5)  # another order of products


def test_a_look_between_tokens_changes_nothing() -> None:
    generator = NativeGenerator(random_decoder(), 3, "cpu")
    sampling = Sampling(10, 2)
    assert generator.generate(random_prompts(), sampling, lambda: None) == generator.generate(
        random_prompts(), sampling
    )


def test_a_prompt_gives_the_same_alone_and_on_a_used_cache() -> None:
    generator = NativeGenerator(random_decoder(), 64, "cpu")
    sampling = Sampling(20, num_samples=2)
    together = completions(flat(generator.generate(random_prompts(), sampling)))
    alone = [c for p in random_prompts() for c in completions(flat(generator.generate([p], sampling)))]
    assert together == alone
    fewer = completions(flat(generator.generate(random_prompts(), Sampling(5, num_samples=1))))
    assert fewer == [c[:5] for c in together[::2]]


def test_a_stream_gives_the_tokens_of_the_first_sample() -> None:
    generator, prompt = NativeGenerator(random_decoder(), 4, "cpu"), random_prompts((9,))[0]
    sampling = Sampling(12, num_samples=2, temperature=1.2, stop_ids=tuple(range(5)))
    (first, _) = generator.generate([prompt], sampling)[0]
    assert list(generator.stream(prompt, sampling)) == first.ids
    left = generator.stream(prompt, sampling)
    assert next(left) == first.ids[0]
    left.close()
    assert generator.generate([prompt], sampling)[0][0].ids == first.ids
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        next(generator.stream(Prompt([]), sampling))


def test_seeds_decide() -> None:
    generator = NativeGenerator(random_decoder(), 64, "cpu")
    ids = [3, 1, 4]
    a, b, again = flat(generator.generate([Prompt(ids, 1), Prompt(ids, 2), Prompt(ids, 1)], Sampling(12)))
    assert a.ids == again.ids != b.ids


def test_many_prompts_are_prefilled_in_several_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_decoder()
    expected = flat(NativeGenerator(model, 64, "cpu").generate(random_prompts(), Sampling(4)))
    monkeypatch.setattr("llmtrain.rollout.native._PREFILL_TOKENS", 80)
    got = flat(NativeGenerator(model, 64, "cpu").generate(random_prompts(), Sampling(4)))
    assert completions(got) == completions(expected)


def test_a_prompt_is_computed_once_for_its_group() -> None:
    model = random_decoder()
    computed = []
    model.embed.register_forward_pre_hook(lambda _, args: computed.append(args[0].numel()))
    flat(NativeGenerator(model, 3, "cpu").generate(random_prompts((7, 7)), Sampling(1, num_samples=8)))
    assert sum(computed) == 14


def test_stop_token_ends_and_is_included() -> None:
    generator = NativeGenerator(random_decoder(), 4, "cpu")
    free = flat(generator.generate(random_prompts(), Sampling(20, temperature=1.0)))
    stop = free[0].ids[6]
    stopped = flat(generator.generate(random_prompts(), Sampling(20, temperature=1.0, stop_ids=(stop, 1000))))
    for a, b in zip(free, stopped, strict=True):
        cut = a.ids.index(stop) + 1 if stop in a.ids else 20
        assert b.ids == a.ids[:cut]
        assert b.finished == (stop in a.ids)
        assert b.logprobs == pytest.approx(a.logprobs[:cut], abs=1e-5)
    assert stopped[0].finished


def test_ends_at_max_positions() -> None:
    config = SMALL.model_copy(update={"max_positions": 40})
    long, short = flat(
        NativeGenerator(random_decoder(config), 4, "cpu").generate(random_prompts((39, 35)), Sampling(8))
    )
    assert (len(long.ids), len(short.ids)) == (1, 5)
    assert not long.finished
    (shorter,) = flat(
        NativeGenerator(random_decoder(config), 4, "cpu", 38).generate(random_prompts((35,)), Sampling(8))
    )
    assert len(shorter.ids) == 3


def test_bad_calls() -> None:
    generator = NativeGenerator(random_decoder(), 4, "cpu", max_seq_tokens=16)
    assert flat(generator.generate([], Sampling(4))) == []
    with pytest.raises(ValueError, match="prompt 1 has 16 tokens: must be 1 to 15"):
        flat(generator.generate(random_prompts((3, 16)), Sampling(4)))
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        flat(generator.generate([Prompt([])], Sampling(4)))
    for wrong in (
        *({"max_new_tokens": 0}, {"num_samples": 0}, {"top_p": 0.0}, {"top_k": -1}),
        *({"temperature": -1}, {"temperature": 1e-300}, {"temperature": 9.9e-7}),
    ):
        with pytest.raises(ValueError, match="must be"):
            flat(generator.generate(random_prompts((3,)), Sampling(**{"max_new_tokens": 1, **wrong})))


def test_diverged_weights_are_named_and_leave_no_trace() -> None:
    model = random_decoder()
    generator = NativeGenerator(model, 4, "cpu")
    good = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = completions(flat(generator.generate(random_prompts(), Sampling(6))))
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
        model.layers["0"].attention.v.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        flat(generator.generate(random_prompts(), Sampling(6)))
    generator.load_weights(good.items(), 1)
    assert completions(flat(generator.generate(random_prompts(), Sampling(6)))) == expected


def test_load_weights_and_version() -> None:
    model, other = random_decoder(seed=0), random_decoder(seed=1)
    generator = NativeGenerator(model, 4, "cpu")
    (before,) = flat(generator.generate([Prompt([1, 2])], Sampling(9)))
    generator.load_weights([*other.named_parameters(), ("head.weight", other.head.weight)], version=5)
    (after,) = flat(generator.generate([Prompt([1, 2])], Sampling(9)))
    (expected,) = flat(NativeGenerator(other, 4, "cpu").generate([Prompt([1, 2])], Sampling(9)))
    assert before.versions == [0] * 9 and after.versions == [5] * 9
    assert after.ids == expected.ids != before.ids
    assert model.head.weight is model.embed.weight

    weights = dict(other.named_parameters())
    for wrong, message in (
        ({k: v for k, v in weights.items() if k != "norm.weight"}, "norm.weight: not among the weights"),
        ({**weights, "norm.bias": weights["norm.weight"]}, "norm.bias .* no tensor so named"),
        ({**weights, "norm.weight": torch.ones(3)}, r"norm.weight \[3\]: the generator's model has \[48\]"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.load_weights(wrong.items(), version=6)
        assert generator.version == 5


def test_sleep_frees_the_cache() -> None:
    generator = NativeGenerator(random_decoder(), 4, "cpu")
    before = completions(flat(generator.generate(random_prompts(), Sampling(5))))
    generator.sleep()
    assert generator.cache is None
    with pytest.raises(RuntimeError, match="wake"):
        flat(generator.generate(random_prompts(), Sampling(5)))
    generator.wake()
    assert completions(flat(generator.generate(random_prompts(), Sampling(5)))) == before


def test_bf16() -> None:
    generator = NativeGenerator(random_decoder().bfloat16(), 4, "cpu")
    samples = flat(generator.generate(random_prompts(), Sampling(10, num_samples=2)))
    assert generator.cache.keys[0].dtype == torch.bfloat16
    assert all(len(r.ids) == 10 and max(r.logprobs) <= 0 for r in samples)
