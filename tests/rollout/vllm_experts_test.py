"""Router replay with vLLM: what a server says of experts is checked, and, where its interpreter is there, equal to what
our own model chooses, wherever a token's keys and values come from."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.arch.families import presets
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.sampling import RolloutConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.groups import piece_batch
from llmtrain.data.post import ServerFault
from llmtrain.data.tree import Tree
from llmtrain.model.decoder import Decoder, routed_layers
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.vllm import VllmGenerator
from llmtrain.rollout.vllm_answers import BadAnswer
from llmtrain.rollout.vllm_experts import BLOCK_TOKENS, read_experts
from llmtrain.types import Batch, Group, Prompt, Sample, Sampling
from tests.rollout.experts_test import assert_close, by_layer, gradients
from tests.rollout.native_test import flat, random_decoder
from tests.rollout.vllm_stand_in import asked, interpreter
from tests.rollout.vllm_test import SHAPE, SMALL, decode
from tests.vllm_python import vllm_python

TIE = 1e-4  # between the router's logits of two experts: rounding decides; log-probs of the two sides differ by 4e-5


def saved(path: Path, **tensors: Any) -> Path:
    save_file({name.removeprefix("s"): torch.as_tensor(rows) for name, rows in tensors.items()}, path)
    return path


def int16(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int16)


GOOD = {"s0": int16([[0, 7], [1, 2], [-1, -1]]), "s1": int16([[3, 4]])}


@pytest.mark.parametrize(("num_experts", "dtype"), [(8, torch.uint8), (256, torch.uint8), (257, torch.int16)])
def test_experts_are_read(tmp_path: Path, num_experts: int, dtype: torch.dtype) -> None:
    first, second = read_experts(saved(tmp_path / "x", **GOOD), [2, 1], 2, num_experts)
    assert first.tolist() == [[0, 7], [1, 2]] and second.tolist() == [[3, 4]] and first.dtype == dtype


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"s0": int16([[0, 8], [1, 2]])}, "with expert 0 to 8 of 8"),
        ({"s0": int16([[0, -1], [1, 2]])}, "with expert -1 to 2 of 8"),
        ({"s0": int16([[0, 1]])}, r"int16 \[1, 2\], not int16 \[2 or more, 2\]"),
        ({"s0": int16([[0, 1, 2], [1, 2, 3]])}, r"\[2, 3\], not int16"),
        ({"s0": int16([[0, 1], [1, 2]])[None]}, r"\[1, 2, 2\], not int16"),
        ({"s0": torch.zeros(2, 2)}, "float32"),
        ({"s0": torch.zeros(2, 2, dtype=torch.int64)}, "int64"),
        ({"s2": int16([[0, 1]])}, r"samples \['0', '1', '2'\], not of 2"),
        ({"s0": int16([[0, 1]] * (2 + 3 * BLOCK_TOKENS))}, "of more than"),
    ],
)
def test_experts_that_are_none_are_refused(tmp_path: Path, changed: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadAnswer, match=fault):
        read_experts(saved(tmp_path / "x", **{**GOOD, **changed}), [2, 1], 2, 8)


@pytest.mark.parametrize(
    "data", [b"", b"\x93NUMPY\x01\x00", pickle.dumps([1]), b"\xff" * 8, (10).to_bytes(8, "little") + b"{}"]
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(BadAnswer, match="no file of tensors"):
        read_experts(tmp_path / "x", [2, 1], 2, 8)
    with pytest.raises(BadAnswer, match="no file of tensors"):
        read_experts(tmp_path / "missing", [2, 1], 2, 8)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved(tmp_path / "x", **GOOD))
    with pytest.raises(BadAnswer):
        read_experts(tmp_path / "link", [2, 1], 2, 8)


# Against the stand-in


def moe(family: str, layers: int, hidden: int, **experts: Any) -> ModelConfig:
    """Returns a small model of a family, with 2 of `num_experts` experts for a token."""
    fields = next(f for f in presets().values() if f["family"] == family)
    own = {**fields, **SHAPE, "vocab_size": 97, "max_positions": 512, "num_layers": layers, "hidden_size": hidden}
    chosen = {"num_experts": 8, "top_k": 2, "expert_ffn_size": 40, **experts}
    return resolve_model(ModelConfig(**{**own, "moe": fields["moe"].model_copy(update=chosen)}))


TINY = moe("qwen3-moe", 3, 16, dense_layers=[0])
Start = Callable[..., VllmGenerator]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[VllmGenerator] = []

    def started(record: bool = True, **how: Any) -> VllmGenerator:
        own = {"python": interpreter(tmp_path / "server", **how), "answer_s": 20, "start_s": 20}
        rollout = RolloutConfig(generator="vllm", vllm=own)
        own_decode = lambda ids: "".join(f"<{i}>" for i in ids)  # noqa: E731
        made.append(VllmGenerator(TINY, rollout, torch.float32, "cpu", 32, own_decode, record_experts=record))
        made[-1].load_weights(random_decoder(TINY).state_dict().items(), 1)
        return made[-1]

    yield started
    for each in made:
        each.close()


PROMPTS = [Prompt([5, 7], seed=3), Prompt([1], seed=4)]


@pytest.mark.parametrize("more", [{}, {"stop_strings": ("nowhere",)}, {"temperature": 0}])
def test_each_sample_has_the_experts_of_its_inputs(start: Start, more: dict[str, Any]) -> None:
    generator = start()
    for group in generator.generate(PROMPTS, Sampling(4, num_samples=3, **more)):
        for sample in group:
            inputs = [*sample.prompt_ids, *sample.ids[:-1]]
            assert sample.experts.tolist() == [[(t + c) % 8 for c in range(4)] for t in inputs]
            assert sample.experts.dtype == torch.uint8
    assert sorted(p.name for p in generator.server.folder.iterdir()) == ["model", "server.log"]


def test_a_server_that_need_not_record_does_not(start: Start, tmp_path: Path) -> None:
    (group,) = start(record=False).generate(PROMPTS[:1], Sampling(4))
    seen = asked(tmp_path / "server")
    assert group[0].experts is None and not any("request_id" in each for each in seen)
    assert not [each for each in seen if each.get("method") in ("llmtrain_record", "llmtrain_experts")]


@pytest.mark.parametrize("how", [{"width": 3}, {"shift": 1}, {"dtype": "F32", "form": "f"}, {"width": 0}])
def test_a_server_that_says_others_is_named(start: Start, how: dict[str, Any]) -> None:
    generator = start(experts=how)
    with pytest.raises(ServerFault, match="it answers with expert"):
        generator.generate(PROMPTS, Sampling(4))
    assert not list(generator.server.folder.glob("*.experts"))


# Against vLLM itself


WIDE = moe("qwen3-moe", 4, 128, num_experts=300, dense_layers=[0, 2])  # ids above 255; layers without experts


def served(monkeypatch: pytest.MonkeyPatch, model: ModelConfig, *arguments: str, tp: int = 1) -> VllmGenerator:
    plain = VllmGenerator._arguments
    monkeypatch.setattr(VllmGenerator, "_arguments", lambda self: [*plain(self), *arguments])
    rollout = RolloutConfig(generator="vllm", max_batch_seqs=32, tp=tp, vllm={"python": vllm_python(), **SMALL})
    return VllmGenerator(model, rollout, torch.float32, "cpu", 512, decode, record_experts=True)


def weights_of(config: ModelConfig, seed: int) -> Decoder:
    model = random_decoder(config, seed, scale=4)
    with torch.no_grad():
        for name in routed_layers(config):
            for p in model.layers[name].feedforward.experts.parameters():
                p.mul_(8)  # as the other matrices, so that experts matter
    return model


@torch.no_grad()
def logits_of(model: Decoder, sample: Sample) -> Tensor:
    """Returns the router's logits of each input of a sample, computed with the sample's experts: [T, layers, E]."""
    found: list[Tensor] = []
    routers = [model.layers[name].feedforward.router for name in routed_layers(model.config)]
    hooks = [router.register_forward_pre_hook(lambda m, x: found.append(m.logits(x[0][0]))) for router in routers]
    ids = torch.tensor([[*sample.prompt_ids, *sample.ids[:-1]]])
    model(ids, torch.arange(ids.size(1))[None], experts=sample.experts[None].short())
    for hook in hooks:
        hook.remove()
    return torch.stack(found, 1)


def check_own(model: Decoder, samples: list[Sample]) -> set[int]:
    """Checks that each token of the samples has the experts that our own model chooses, but for ties; returns all."""
    equal = count = 0
    for sample in samples:
        logits, experts = logits_of(model, sample), by_layer(sample.experts)
        assert experts.shape == (len(sample.prompt_ids) + len(sample.ids) - 1, logits.size(1), 2)
        assert (experts[..., 0] < experts[..., 1]).all()
        best = logits.topk(2, -1)
        torch.testing.assert_close(logits.gather(-1, experts).sort(-1).values, best.values.flip(-1), rtol=0, atol=TIE)
        equal += int((best.indices.sort(-1).values == experts).all(-1).sum())
        count += experts[..., 0].numel()
    print(f"{count} choices, {count - equal} ties")
    assert equal >= 0.999 * count
    return set(torch.cat([s.experts for s in samples]).flatten().tolist())


def prompts_with_a_beginning(*lengths: int, shared: int = 70) -> list[Prompt]:
    draws = torch.randint(97, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    return [Prompt([*draws[:shared], *draws[100 : 100 + n]], seed=n) for n in lengths]


def batch_of(groups: list[Group]) -> Batch:
    trees = [Tree(group) for group in groups]
    return piece_batch(trees, [list(range(len(trees)))], 2000, 0, experts=True)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_experts_are_those_of_our_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that share prompts and a long beginning, which the second call finds in the prefix cache; others that end
    at stop strings; under two versions of the weights. The update uses them as those of the native generator."""
    generator = served(monkeypatch, WIDE)
    prompts, seen = prompts_with_a_beginning(3, 40, 1), []
    try:
        for version in (1, 2):
            model = weights_of(WIDE, version)
            generator.load_weights(model.state_dict().items(), version)
            for call in range(2):
                asked_for = [dataclasses.replace(p, seed=p.seed + 100 * call) for p in prompts]
                groups = generator.generate(asked_for, Sampling(20, 4, stop_ids=tuple(range(9))))
                used = check_own(model, flat(groups))
                assert max(used) > 255 and len(used) > 150 and flat(groups)[0].experts.dtype == torch.int16
            stopping = Sampling(20, 2, stop_strings=tuple(decode([i]) for i in range(20)))
            cut = flat(generator.generate(prompts, stopping))
            assert any(s.finished and len(s.ids) < 20 for s in cut)
            check_own(model, cut)
            seen.append(torch.cat([s.experts[:70] for s in flat(groups)]))
        assert (seen[0] != seen[1]).float().mean() > 0.9
        native = NativeGenerator(model, 32, "cpu", 512, decode, record_experts=True)
        greedy = Sampling(20, temperature=0)
        ours, theirs = (g.generate(prompts, greedy) for g in (native, generator))
        assert [s.ids for s in flat(theirs)] == [s.ids for s in flat(ours)]
        by_native, by_vllm = (batch_of(groups) for groups in (ours, theirs))
        assert by_layer(by_vllm.experts).equal(by_layer(by_native.experts))
        model.train()
        replayed = gradients(model, by_native)
        assert_close(gradients(model, by_vllm), replayed)
        by_vllm.experts = torch.where(by_vllm.experts < 0, by_vllm.experts, (by_vllm.experts + 1) % 300)
        assert abs(float(gradients(model, by_vllm)[0] - replayed[0])) > 1e-2  # others would be seen
    finally:
        generator.close()


PARTS = ("--enable-chunked-prefill", "--max-num-batched-tokens", "64")  # fewer than a prompt has, in a forward


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("arguments", "temperature"), [(PARTS, 0.0), ((), 1.0)], ids=["parts", "whole"])
def test_experts_of_requests_that_were_set_back(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], temperature: float
) -> None:
    """A cache of 24 blocks, far less than 12 sequences need: they are set back, and others compute on in their
    blocks. In parts: greedily alone, as `VllmGenerator._arguments` says."""
    config = moe("mixtral", 3, 128)
    generator = served(monkeypatch, config, "--num-gpu-blocks-override", "24", *arguments)
    model = weights_of(config, 0)
    try:
        generator.load_weights(model.state_dict().items(), 1)
        for strings in ((), (decode([96, 96, 96]),)):
            prompts = prompts_with_a_beginning(60, 70, 80, 90, 100, 110, shared=20)
            groups = generator.generate(prompts, Sampling(120, 2, temperature, stop_strings=strings))
            assert check_own(model, flat(groups)) == set(range(8))
    finally:
        generator.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_experts_of_processes_that_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = moe("mixtral", 3, 128)
    generator, model = served(monkeypatch, config, tp=2), weights_of(config, 0)
    try:
        generator.load_weights(model.state_dict().items(), 1)
        groups = generator.generate(prompts_with_a_beginning(3, 40, 1), Sampling(20, 4))
        assert check_own(model, flat(groups)) == set(range(8))
        assert not list(generator.server.folder.glob("*.experts"))
    finally:
        generator.close()
