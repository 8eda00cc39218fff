"""Router replay: the experts that a generator chose are recorded, sent, laid out and used; the trainer's weights decide
how much of each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig, MoeConfig
from llmtrain.data.groups import group_length, piece_batch
from llmtrain.data.tree import Tree
from llmtrain.model.decoder import Decoder, routed_layers
from llmtrain.parallel.pipeline import inputs_of
from llmtrain.parallel.remat import remat_blocks
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.wire import pack, unpack
from llmtrain.types import Batch, Group, Prompt, Sample, Sampling
from tests.rollout.native_test import random_decoder

SOFTMAX = MoeConfig(num_experts=8, top_k=2, expert_ffn_size=24, dense_layers=[1])
SIGMOID = SOFTMAX.model_copy(
    update={"gate": "sigmoid", "selection_bias": True, "num_groups": 4, "top_groups": 2, "scale": 1.5}
)
KINDS = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
TEMPERATURE = 0.9


def decoder(kind: str = "softmax") -> Decoder:
    shape = {"num_layers": 4, "hidden_size": 32, "ffn_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 97}
    model = random_decoder(resolve_model(ModelConfig(**shape, max_positions=128, moe=KINDS[kind])))
    for name in routed_layers(model.config):
        layer = model.layers[name].feedforward
        with torch.no_grad():
            for p in layer.experts.parameters():
                p.mul_(8)  # as the other matrices, so that experts matter
        if layer.router.bias is not None:
            layer.router.bias.copy_(0.1 * torch.randn(8, generator=torch.Generator().manual_seed(1)))
    return model


def sampled(model: Decoder, shared: int = 40) -> list[Group]:
    """Returns groups of ragged lengths, sampled five at a time; the prompts begin with `shared` tokens that are the
    same."""
    draws = torch.randint(97, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [Prompt([*draws[:shared], *draws[50 : 50 + n]], seed=n) for n in (3, 9, 1)]
    generator = NativeGenerator(model, 5, "cpu", record_experts=True)
    return generator.generate(prompts, Sampling(12, 4, temperature=TEMPERATURE, stop_ids=tuple(range(9))))


def laid_out(groups: list[Group]) -> Batch:
    width = max(map(group_length, groups)) + 3
    batch = piece_batch([Tree(group) for group in groups], [[0, 1], [2]], 2 * width, 0, experts=True)
    batch.temperature = TEMPERATURE
    return batch


def scored(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the log-probs, and the experts that were used, as in `Batch.experts`."""
    used: list[Tensor] = []
    routers = [model.layers[name].feedforward.router for name in routed_layers(model.config)]
    hooks = [router.register_forward_hook(lambda m, x, output: used.append(output[0])) for router in routers]
    logprobs, _ = model(batch.input_ids, **inputs_of(batch, True))
    for hook in hooks:
        hook.remove()
    return logprobs, torch.cat(used, -1).view(*batch.labels.shape, -1)


def by_layer(experts: Tensor) -> Tensor:
    """Returns the experts of each layer in the order of their numbers."""
    return experts.long().unflatten(-1, (-1, 2)).sort(-1).values


@pytest.mark.parametrize("shared", [40, 5])  # one computed for all prompts, and not
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_both_sides_use_the_same_experts(kind: str, shared: int) -> None:
    model = decoder(kind)
    groups = sampled(model, shared)
    assert len({len(s.ids) for group in groups for s in group}) > 2
    batch = laid_out(groups)
    real = batch.segment_ids >= 0
    assert batch.experts.shape == (*batch.labels.shape, 3 * 2) and batch.experts.dtype == torch.int16
    assert (batch.experts[~real] == -1).all() and (batch.experts[real] >= 0).all()
    batch.experts[real] = batch.experts[real].roll(7, 0)  # those of other tokens
    assert scored(model, batch)[1][real].equal(batch.experts[real].long())  # what is given is used
    batch.experts = None
    _, chosen = scored(model, batch)  # the trainer's own, which has the same weights
    assert by_layer(chosen[real]).equal(by_layer(laid_out(groups).experts[real]))


def gradients(model: Decoder, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    logprobs, _ = scored(model, batch)
    loss = -(logprobs * batch.loss_mask).sum() / batch.loss_mask.sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    """To rounding: the two experts of a token may come in another order."""
    torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=1e-6)
    for name, grad in a[1].items():
        assert (grad - b[1][name]).norm() <= 1e-5 * b[1][name].norm() + 1e-7, name


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_same_weights_nothing_changes(kind: str) -> None:
    model = decoder(kind).train()
    batch = laid_out(sampled(model))
    with_replay = gradients(model, batch)
    batch.experts = None
    without = gradients(model, batch)
    assert_close(with_replay, without)
    assert all(with_replay[1][f"layers.{i}.feedforward.router.weight"].norm() > 0 for i in (0, 2, 3))


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_rematerialised(kind: str) -> None:
    model = decoder().train()
    batch = laid_out(sampled(model))
    batch.experts = batch.experts.roll(1, 1)  # others than the router's own
    plain = gradients(model, batch)
    remat_blocks(model, kind)
    assert_close(gradients(model, batch), plain)


def test_replay_closes_most_of_the_gap_that_another_choice_makes() -> None:
    """The generator's routers are those of the trainer with a little noise, as rounding in 16 bits gives: it flips
    choices near a tie. The trainer that chooses anew then computes with other experts."""
    model, noisy = decoder(), decoder()
    with torch.no_grad():
        for name in routed_layers(noisy.config):
            weight = noisy.layers[name].feedforward.router.weight
            weight.add_(0.02 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
        batch = laid_out(sampled(noisy))
        gaps = {}
        for name, given in {"replay": batch.experts, "choice": None}.items():
            batch.experts = given
            logprobs, used = scored(model, batch)
            difference = (logprobs - batch.extra["old_logprobs"]).abs()[batch.loss_mask]
            gaps[name] = (float(difference.mean()), float(difference.max()), used)
    real = batch.segment_ids >= 0
    flipped = (by_layer(gaps["choice"][2][real]) != by_layer(gaps["replay"][2][real])).any(-1).float().mean()
    print({"flipped": float(flipped), **{name: gap[:2] for name, gap in gaps.items()}})
    assert 0.001 < flipped < 0.1
    assert gaps["replay"][0] < gaps["choice"][0] / 3 and gaps["replay"][1] < gaps["choice"][1] / 3


def sample(prompt: list[int], ids: list[int], experts: list[list[int]], dtype: torch.dtype = torch.uint8) -> Sample:
    n = len(ids)
    return Sample(prompt, ids, [True] * n, [-1.0] * n, [0] * n, True, experts=torch.tensor(experts, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_over_the_wire_with_the_prompt_once(dtype: torch.dtype) -> None:
    p, q, x, y, z = [0, 1], [2, 3], [4, 5], [6, 7], [8, 9]
    groups = {
        3: [sample([1, 2], [5, 6, 7], [p, q, x, y], dtype), sample([1, 2], [5], [p, q], dtype)],
        0: [sample([9], [5, 6], [z, x], dtype), sample([9], [6, 6], [z, y], dtype)],
    }
    sent = pack(groups)
    found = unpack(sent, [[9], [], [], [1, 2]])
    assert list(found) == [3, 0] and found == groups
    for number, group in groups.items():
        for mine, theirs in zip(group, found[number], strict=True):
            assert theirs.experts.dtype == dtype and theirs.experts.equal(mine.experts)
    from safetensors.torch import load

    assert load(sent.numpy().tobytes())["experts"].tolist() == [p, q, x, y, z, x, y]


def test_a_prompt_that_is_not_the_one_that_was_asked_for_brings_its_own_length() -> None:
    groups = {0: [sample([1, 2, 3], [5, 6], [[0, 1], [2, 3], [4, 5], [6, 7]])]}
    (found,) = unpack(pack(groups, [[1]]), [[1]])[0]
    assert found == groups[0][0] and found.experts.equal(groups[0][0].experts)


def test_a_decoding_that_goes_on_records_too() -> None:
    """The hooks of routers note whatever is computed: who decodes takes it away."""
    generator = NativeGenerator(decoder(), 4, "cpu", record_experts=True)
    decoding = generator.decoding(4)
    (completion,) = generator.sequences(0, Prompt([5, 7, 9]), Sampling(4))
    decoding.waiting.append(completion)
    while decoding.waiting or decoding.active:
        with torch.inference_mode():
            decoding.round()
    assert completion.sample(0).experts.shape == (3 + 4 - 1, 6) and generator.experts.noted == []


def test_nothing_is_sent_where_nothing_is_recorded() -> None:
    plain = Sample([1], [5], [True], [-1.0], [0], True)
    assert unpack(pack({0: [plain]}), [[1]])[0][0].experts is None
    assert unpack(pack({}), []) == {}


def test_the_example_of_types_laid_out() -> None:
    """Samples `x y` and `z` of the prompt `p q`, then another group in the same row."""
    p, q, x, other = [1, 2], [3, 4], [5, 6], [7, 7]
    pair = [sample([10, 11], [12, 13], [p, q, x]), sample([10, 11], [14], [p, q])]
    groups = [Tree(pair), Tree([sample([15], [16], [other])])]
    batch = piece_batch(groups, [[0, 1], []], 6, 0, experts=True)
    assert batch.experts.tolist() == [[p, q, x, q, other, [-1, -1]], [[-1, -1]] * 6]
    assert piece_batch(groups, [[0]], 6, 0).experts is None


def test_a_sample_has_experts_of_every_input() -> None:
    with pytest.raises(AssertionError, match="of each input"):
        sample([1, 2], [3, 4], [[0, 1]] * 4)
