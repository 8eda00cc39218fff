"""The vLLM generator with a real server, where its interpreter is there: .venv-vllm (launch/vllm.sh), or what
LLMTRAIN_VLLM_PYTHON names. One server serves all of these tests but the slow ones, in their order."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from openai import OpenAI, UnprocessableEntityError

from llmtrain.arch.families import presets
from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.source import load_decoder
from llmtrain.config.environment import EnvironmentConfig
from llmtrain.config.sampling import RolloutConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.post import ServerFault
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.envs.agents import Agents
from llmtrain.envs.dialogue import Renderer
from llmtrain.envs.episodes import Episodes
from llmtrain.model.decoder import Decoder
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.vllm import VllmGenerator
from llmtrain.rollout.vllm_streams import VllmStreams
from llmtrain.trainer.completions import stop_text
from llmtrain.types import Group, Prompt, Sampling
from tests.byte_tokenizer import VOCAB_SIZE, save_byte_tokenizer
from tests.envs.own import Guess
from tests.model.llama import smollm2_directory
from tests.rollout.native_test import flat, random_decoder, random_prompts
from tests.vllm_python import vllm_python

SHAPE = {"num_layers": 3, "hidden_size": 128, "ffn_size": 160, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
TIED = resolve_model(ModelConfig(**SHAPE, vocab_size=VOCAB_SIZE, max_positions=512))
TOLERANCE = 4e-5  # of log-probs in fp32: other kernels add in another order; SmolLM2-135M differed by up to 2.7e-5
MOST_TOKENS = tuple(i for i in range(4, VOCAB_SIZE) if i % 4)  # that turns soon end with
SMALL = {"cache_gib": 0.25, "bucket_mib": 1, "start_s": 250, "answer_s": 60}  # 1 MiB: weights come in several files


def decode(ids: list[int]) -> str:
    return "".join(chr(256 + i) for i in ids)


def generator_of(model: ModelConfig, **settings: object) -> VllmGenerator:
    vllm = {"python": vllm_python(), **SMALL, **settings.pop("vllm", {})}
    rollout = RolloutConfig(generator="vllm", max_batch_seqs=32, vllm=vllm, **settings)
    return VllmGenerator(model, rollout, torch.float32, "cpu", 512, decode)


def weights_of(config: ModelConfig, seed: int) -> Decoder:
    return random_decoder(config, seed, scale=4)


@pytest.fixture(scope="module")
def server() -> Iterator[VllmGenerator]:
    generator = generator_of(TIED)
    yield generator
    generator.close()


def check_equal(
    generator: VllmGenerator, model: Decoder, version: int, prompts: list[Prompt] | None = None
) -> list[Group]:
    """Checks greedy completions of both generators, tokens and log-probs; returns them."""
    generator.load_weights(model.state_dict().items(), version)
    native = NativeGenerator(model, 32, "cpu", 512, decode)
    sampling = Sampling(30, temperature=0, stop_ids=(5, 7, 11))
    ours, theirs = (g.generate(prompts or random_prompts(), sampling) for g in (native, generator))
    assert [s.ids for s in flat(theirs)] == [s.ids for s in flat(ours)]
    assert [s.finished for s in flat(theirs)] == [s.finished for s in flat(ours)]
    assert {version} == {v for s in flat(theirs) for v in s.versions}
    pairs = zip(flat(theirs), flat(ours), strict=True)
    gaps = [abs(a - b) for their, our in pairs for a, b in zip(their.logprobs, our.logprobs, strict=True)]
    assert len(gaps) > 30 and max(gaps) <= TOLERANCE
    return theirs


@pytest.mark.timeout(300)
def test_greedy_equals_native_after_every_update(server: VllmGenerator) -> None:
    """The head is tied: a CPU build keeps a packed copy of it, which must follow; and so must the prefix cache, as the
    prompts, one of them longer than a block of it, stay the same."""
    first = check_equal(server, weights_of(TIED, 0), 1)
    second = check_equal(server, weights_of(TIED, 1), 2)
    assert [s.ids for s in flat(first)] != [s.ids for s in flat(second)]
    assert [s.ids for s in flat(check_equal(server, weights_of(TIED, 0), 3))] == [s.ids for s in flat(first)]


@torch.no_grad()
def test_logprobs_are_those_of_the_temperature(server: VllmGenerator) -> None:
    model = weights_of(TIED, 1)
    server.load_weights(model.state_dict().items(), 4)
    for temperature in (0.6, 1.0):
        for sample in flat(server.generate(random_prompts(), Sampling(8, num_samples=2, temperature=temperature))):
            ids = torch.tensor([sample.prompt_ids + sample.ids])
            logits = model(ids, torch.arange(ids.size(1))[None])[0, len(sample.prompt_ids) - 1 : -1]
            wanted = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(sample.ids)[:, None])[:, 0]
            assert (torch.tensor(sample.logprobs) - wanted).abs().max() <= TOLERANCE


def test_a_sample_follows_from_its_seed_and_its_number(server: VllmGenerator) -> None:
    prompt, sampling = Prompt([3, 4, 5], seed=7), Sampling(12, num_samples=4)
    alone = server.generate([prompt], sampling)
    among = server.generate([*random_prompts(), prompt], sampling)[-1]
    assert [s.ids for s in among] == [s.ids for s in alone[0]]
    assert len({tuple(s.ids) for s in among}) == 4
    assert server.generate([Prompt([3, 4, 5], seed=8)], sampling)[0][0].ids != among[0].ids


def test_sampled_tokens_follow_the_distribution(server: VllmGenerator) -> None:
    """1,024 first tokens after one prompt: each of the 5 likeliest within 4 standard deviations of its probability."""
    groups = server.generate([Prompt([3, 4, 5], seed=s) for s in range(32)], Sampling(1, num_samples=32))
    drawn = [(s.ids[0], s.logprobs[0]) for s in flat(groups)]
    by_token = dict(drawn)
    for token in sorted(by_token, key=by_token.__getitem__)[-5:]:
        p = math.exp(by_token[token])
        assert abs(sum(t == token for t, _ in drawn) - 1024 * p) <= 4 * math.sqrt(1024 * p * (1 - p))


def test_more_prompts_than_a_forward_takes(server: VllmGenerator) -> None:
    """10,800 tokens: a CPU build that computes a prompt in parts dies where its completion has a seed."""
    server.load_weights(weights_of(TIED, 1).state_dict().items(), 30)
    prompts = [Prompt([i, 3, 4, 5] * 75, seed=i) for i in range(36)]
    groups = server.generate(prompts, Sampling(3, num_samples=2))
    assert [len(s.ids) for s in flat(groups)] == [3] * 72


def test_stop_strings_end_as_with_native(server: VllmGenerator) -> None:
    model = weights_of(TIED, 0)
    server.load_weights(model.state_dict().items(), 5)
    native = NativeGenerator(model, 32, "cpu", 512, decode)
    whole = flat(native.generate(random_prompts(), Sampling(30, temperature=0)))
    strings = (decode(whole[0].ids[3:5]), decode(whole[2].ids[7:8]))
    sampling = Sampling(30, temperature=0, stop_strings=strings)
    ours, theirs = (flat(g.generate(random_prompts(), sampling)) for g in (native, server))
    assert [(s.ids, s.finished) for s in theirs] == [(s.ids, s.finished) for s in ours]
    assert theirs[0].finished and len(theirs[0].ids) < 30 and len(theirs[0].logprobs) == len(theirs[0].ids)


def test_an_update_that_broke_off_is_made_again(server: VllmGenerator) -> None:
    model = weights_of(TIED, 1)
    with pytest.raises(ValueError, match="missing"):
        server.load_weights(list(model.state_dict().items())[:5], 6)
    with pytest.raises(RuntimeError, match="no weights"):
        server.generate(random_prompts(), Sampling(4))
    check_equal(server, model, 7)


def test_logits_that_are_not_finite_are_said(server: VllmGenerator) -> None:
    model = weights_of(TIED, 0)
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    server.load_weights(model.state_dict().items(), 8)
    with pytest.raises(FloatingPointError, match="the weights have diverged"):
        server.generate(random_prompts(), Sampling(4))
    check_equal(server, weights_of(TIED, 0), 9)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("vllm") / "tokenizer"
    save_byte_tokenizer(directory)
    return load_tokenizer(str(directory))


@torch.no_grad()
def told(model: Decoder, ids: list[int]) -> torch.Tensor:
    """Returns the log-probs of the whole vocabulary behind each of the ids, [T, vocabulary]."""
    return model(torch.tensor([ids]), torch.arange(len(ids))[None])[0].log_softmax(-1)


def test_episodes_are_those_of_native(server: VllmGenerator, tokenizer: Tokenizer) -> None:
    """Contexts go on over several blocks of the prefix cache, under two versions of the weights."""
    rows = [Prompt(tokenizer.encode_chat(Guess(most).start({"number": 1})), most, {"number": 1}) for most in (3, 4, 5)]
    settings, sampling = EnvironmentConfig(max_turns=3), Sampling(9, 2, 0, stop_ids=MOST_TOKENS)
    for version, seed in ((20, 0), (21, 1)):
        model = weights_of(TIED, seed)
        native = NativeGenerator(model, 32, "cpu", 512, decode)
        made = []
        for generator in (native, server):
            generator.load_weights(list(model.state_dict().items()), version)
            episodes = Episodes(generator, Renderer(tokenizer), Guess, settings, 500, tokenizer.decode)
            made.append(flat(episodes.generate(rows, sampling)))
        assert [len(s.turns()) for s in made[0]] == [5, 5, 5, 5, 1, 1]  # three turns of the policy, or one that was cut
        for our, their in zip(*made, strict=True):
            assert (their.ids, their.trained, their.versions) == (our.ids, our.trained, our.versions)
            assert set(their.versions) == {version} and not their.errors
            assert max(abs(a - b) for a, b in zip(their.logprobs, our.logprobs, strict=True)) <= TOLERANCE


def test_requests_in_the_openai_protocol(
    server: VllmGenerator, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a client that knows nothing of what decodes: whole, streamed, echoed, cut at a text, and refused."""
    from llmtrain.rollout.api.app import build_app, only
    from llmtrain.rollout.api.callers import Anyone
    from llmtrain.rollout.api.model import ServedModel
    from tests.rollout.api.conftest import TOKEN, serving

    model, messages = weights_of(TIED, 1), [{"role": "user", "content": "What is 1 + 1?"}]
    server.load_weights(model.state_dict().items(), 22)
    monkeypatch.setattr(server, "decode", stop_text(tokenizer))
    streams = VllmStreams(server)
    served = ServedModel("m", tokenizer, (1, 3), streams)
    ids = {"return_token_ids": True}
    with serving(build_app(served, only(TOKEN, Anyone(served)))) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, timeout=30)

        def chat(**more: Any) -> Any:
            own = {"max_tokens": 12, "seed": 7, "n": 2, "logprobs": True, "top_logprobs": 3, "extra_body": ids}
            return client.chat.completions.create(**{"model": "m", "messages": messages, **own, **more})

        whole, prompt = chat(), tokenizer.encode_chat(messages)
        (group,) = server.generate([Prompt(prompt, 7)], Sampling(12, 2, stop_ids=(1, 3)))
        assert [c.token_ids for c in whole.choices] == [s.ids for s in group]
        for choice in whole.choices:
            expected = told(model, prompt + choice.token_ids)[len(prompt) - 1 : -1]
            for row, place, id_ in zip(expected, choice.logprobs.content, choice.token_ids, strict=True):
                assert abs(place.logprob - float(row[id_])) <= TOLERANCE
                best = [each.logprob for each in place.top_logprobs]
                assert torch.tensor(best).sub(row.topk(3).values).abs().max() <= TOLERANCE
        pieces = list(chat(stream=True))
        for choice in whole.choices:
            own = [p.choices[0] for p in pieces if p.choices[0].index == choice.index]
            assert "".join(p.delta.content or "" for p in own) == choice.message.content
        echo = {"prompt": prompt[:9], "echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
        answer = client.completions.create(model="m", **echo).choices[0].logprobs
        rows = told(model, prompt[:9])
        for at in range(1, 9):
            assert abs(answer.token_logprobs[at] - float(rows[at - 1, prompt[at]])) <= TOLERANCE
            assert abs(max(answer.top_logprobs[at].values()) - float(rows[at - 1].max())) <= TOLERANCE
        text = whole.choices[0].message.content
        stop = next(c for c in text[2:] if c != "\ufffd")
        cut = chat(stop=stop, n=1).choices[0]
        assert cut.message.content == text[: text.index(stop)] and cut.finish_reason == "stop"
        with pytest.raises(UnprocessableEntityError, match=r"must be 0 \(greedy\) or at least 0.01 with vLLM"):
            chat(temperature=0.001)
        assert streams.sequences == 0
    streams.rest()
    streams.pool.shutdown()


def test_a_program_is_recorded(server: VllmGenerator, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns of a conversation are one row of what was sampled, with its log-probs at the run's temperature."""
    from tests.envs.agents_test import A, Here, talk

    monkeypatch.setattr(server, "close", lambda: None)
    model = weights_of(TIED, 0)
    server.load_weights(model.state_dict().items(), 23)
    agents = Agents(server, tokenizer, Here(talk), False, 4)
    sampling = Sampling(12, 2, temperature=0.6, stop_ids=(1, 3))
    (group,), (again,) = (agents.generate([Prompt([1], 5, A)], sampling) for _ in range(2))
    agents.close()
    assert [s.ids for s in group] == [s.ids for s in again] and group[0].ids != group[1].ids
    for sample in group:
        assert len(sample.turns()) == 3 and set(sample.versions) == {23} and sample.parts == {"agent": 1.0}
        ids = sample.prompt_ids + sample.ids
        with torch.no_grad():
            logits = model(torch.tensor([ids]), torch.arange(len(ids))[None])[0, len(sample.prompt_ids) - 1 : -1] / 0.6
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(sample.ids)[:, None])[:, 0]
        trained = torch.tensor(sample.trained)
        assert (torch.tensor(sample.logprobs) - wanted)[trained].abs().max() <= TOLERANCE


def status(server: VllmGenerator, route: str, body: object = None, token: str | None = None) -> int:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    request = urllib.request.Request(f"{server.server.url}{route}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_we_are_answered_and_only_what_we_need(server: VllmGenerator) -> None:
    token = server.server.token
    version = {"method": "llmtrain_version", "args": []}
    assert status(server, "/health", token=token) == 200 and status(server, "/collective_rpc", version, token) == 200
    for route, body in [("/health", None), ("/collective_rpc", version), ("/reset_prefix_cache", {}), ("/sleep", {})]:
        assert status(server, route, body) == 401 == status(server, route, body, "wrong"), route
    for route in ("/v1/models", "/metrics", "/docs", "/server_info", "/v1/completions", "/update_weights", "/pause"):
        assert status(server, route, {}, token) == 404, route
    for body in [
        {"method": "shutdown", "args": []},
        {"method": "llmtrain_load", "args": [["x"]]},
        {"method": "llmtrain_load", "args": ["0.safetensors"], "kwargs": {}},
        {"method": "llmtrain_load", "args": ["x" * 5000]},
    ]:
        assert status(server, "/collective_rpc", body, token) == 403, body


def test_a_killed_engine_is_noticed_and_nothing_is_left(server: VllmGenerator) -> None:
    """Last: it ends the server. Its engine is another process than the one that answers."""
    keeper = psutil.Process(server.server.keeper.pid)
    processes = [keeper, *keeper.children(recursive=True)]
    assert len(processes) >= 4
    engine = next(p for p in processes if "EngineCore" in " ".join(p.cmdline()))
    engine.kill()
    with pytest.raises(ServerFault, match="its log ends"):
        server.generate(random_prompts(), Sampling(4))
    _, alive = psutil.wait_procs(processes, 20)
    assert not alive and not server.server.folder.exists()


def small(family: str) -> ModelConfig:
    """Returns a small model of a family. Experts of 40 rows are padded to 64 where a CPU packs them."""
    name = family.removesuffix("-untied")
    fields = next(f for f in presets().values() if f["family"] == name)
    layers = ["sliding", "sliding", "full"]
    narrow = {"sliding_window": 16, "layer_types": layers} if fields.get("layer_types") else {}
    heads = {"num_kv_heads": 4} if name == "gpt2" else {}
    own = {"tie_embeddings": False} if name != family else {}
    if fields.get("moe"):
        own["moe"] = fields["moe"].model_copy(update={"num_experts": 8, "top_k": 2, "expert_ffn_size": 40})
    sizes = {"vocab_size": 97, "max_positions": 512}
    return resolve_model(ModelConfig(**{**fields, **SHAPE, **sizes, **narrow, **heads, **own}))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "family", ["llama-untied", "gpt2", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3-moe"]
)
def test_every_family_that_is_served_equals_native(family: str) -> None:
    config = small(family)
    generator = generator_of(config)
    try:
        check_equal(generator, weights_of(config, 0), 1)
        check_equal(generator, weights_of(config, 1), 2)
    finally:
        generator.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("config", [TIED, small("mixtral")], ids=["llama", "mixtral"])
def test_processes_that_share_a_model_equal_native(config: ModelConfig) -> None:
    generator = generator_of(config, tp=2)
    try:
        check_equal(generator, weights_of(config, 0), 1)
        check_equal(generator, weights_of(config, 1), 2)
    finally:
        generator.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_smollm2_equals_native(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = str(smollm2_directory(tmp_path_factory))
    config, tokenizer = resolve_model(ModelConfig(init_from=directory)), load_tokenizer(directory)
    asked = ("What is the capital of France?", "Name three colours.", "Write a short poem about the sea.")
    prompts = [Prompt(tokenizer.encode_chat([{"role": "user", "content": text}], "")) for text in asked]
    generator = generator_of(config, vllm={"bucket_mib": 64})
    try:
        for version in (1, 2):
            groups = check_equal(generator, load_decoder(directory, config, torch.float32).eval(), version, prompts)
        assert "Paris" in tokenizer.decode(groups[0][0].ids)
    finally:
        generator.close()
