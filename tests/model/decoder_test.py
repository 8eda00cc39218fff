"""Checks the decoder by itself: sizes, packed documents, padding, shared prompts."""

from __future__ import annotations

import pytest
import torch

from llmtrain.arch.families import presets
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, init_tensor, initialize, parameter_shapes
from tests.model.llama import SMALL

PUBLISHED = {  # parameters of the released models, from their model cards' safetensors
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "smollm2-135m": 134_515_008,
}


@pytest.fixture
def model() -> Decoder:
    model = Decoder(SMALL)
    initialize(model, SMALL, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    return model


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_parameter_counts(preset: str) -> None:
    with torch.device("meta"):
        model = Decoder(resolve_model(ModelConfig(preset=preset)))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[preset]


@pytest.mark.parametrize("preset", [name for name in presets() if name.startswith("llama3")])
def test_shapes_need_no_memory(preset: str) -> None:
    config = resolve_model(ModelConfig(preset=preset))
    assert parameter_shapes(config)["layers.1.attention.k.weight"] == (8 * 128, config.hidden_size)


@torch.no_grad()
def test_packed_documents_are_separate(model: Decoder) -> None:
    ids = torch.arange(20)[None] * 7 % SMALL.vocab_size
    positions = torch.cat([torch.arange(8), torch.arange(9), torch.zeros(3, dtype=torch.long)])[None]
    segments = torch.tensor([0] * 8 + [1] * 9 + [-1] * 3)[None]
    packed = model(ids, positions, segment_ids=segments)
    first = model(ids[:, :8], positions[:, :8])
    second = model(ids[:, 8:17], positions[:, 8:17])
    torch.testing.assert_close(packed[:, :17], torch.cat([first, second], 1), atol=1e-5, rtol=1e-5)
    assert (packed[:, 8:17] - model(ids, positions)[:, 8:17]).abs().max() > 0.1
    assert packed.isfinite().all()


@torch.no_grad()
def test_padding_changes_nothing(model: Decoder) -> None:
    ids = torch.arange(12)[None]
    positions = torch.arange(12)[None]
    segments = torch.tensor([0] * 8 + [-1] * 4)[None]
    other = ids.clone()
    other[:, 8:] = 50
    expected = model(ids[:, :8], positions[:, :8])
    for padded in (ids, other):
        torch.testing.assert_close(model(padded, positions, segments)[:, :8], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_branches_equal_whole_sequences(model: Decoder) -> None:
    """The example of `types.Batch`, prompt p q and samples x y and z, gives what whole sequences give."""
    p, q, x, y, z = 3, 14, 15, 92, 65
    ids = torch.tensor([[p, q, x, y, q, z]])
    positions = torch.tensor([[0, 1, 2, 3, 1, 2]])
    ends = torch.tensor([[6, 4, 4, 4, 6, 6]])
    shared = model(ids, positions, segment_ids=torch.zeros_like(ids), ends=ends)
    first = model(torch.tensor([[p, q, x, y]]), torch.arange(4)[None])
    second = model(torch.tensor([[p, q, z]]), torch.arange(3)[None])
    torch.testing.assert_close(shared[:, :4], first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared[:, 4:], second[:, 1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_stages_compose(model: Decoder) -> None:
    """Parts may be missing: two halves of the layers give the whole."""
    ids, positions = torch.arange(10)[None], torch.arange(10)[None]
    whole = model(ids, positions)
    first, last = Decoder(SMALL), Decoder(SMALL)
    initialize(first, SMALL, seed=1)
    first.load_state_dict(model.state_dict())
    last.load_state_dict(model.state_dict())
    first.norm = first.head = last.embed = None
    del first.layers["2"], last.layers["0"], last.layers["1"]
    torch.testing.assert_close(last(first(ids, positions), positions), whole, atol=0, rtol=0)


@torch.no_grad()
def test_log_probs_of_the_reference_head(model: Decoder) -> None:
    ids, positions = torch.arange(6)[None], torch.arange(6)[None]
    labels = torch.tensor([[1, 2, -100, 4, 5, -100]])
    logp, entropy = model(ids, positions, labels=labels, temperature=torch.tensor([0.5]))
    expected = torch.distributions.Categorical(logits=model(ids, positions) / 0.5)
    kept = labels[0] >= 0
    torch.testing.assert_close(logp[0, kept], expected.log_prob(labels.clamp(min=0))[0, kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy[0, kept], expected.entropy()[0, kept], atol=1e-5, rtol=1e-5)
    assert logp[0, ~kept].eq(0).all() and entropy[0, ~kept].eq(0).all()


def test_initial_values_depend_on_name_and_seed_only() -> None:
    shape = (64, 64)
    a = init_tensor("layers.0.attention.q.weight", shape, SMALL, seed=1)
    assert torch.equal(a, init_tensor("layers.0.attention.q.weight", shape, SMALL, seed=1))
    assert not torch.equal(a, init_tensor("layers.1.attention.q.weight", shape, SMALL, seed=1))
    assert not torch.equal(a, init_tensor("layers.0.attention.q.weight", shape, SMALL, seed=2))
    assert abs(a.std() - 0.02) < 1e-3
    residual = init_tensor("layers.0.attention.o.weight", shape, SMALL, seed=1)
    assert abs(residual.std() - 0.02 / 6**0.5) < 1e-3
