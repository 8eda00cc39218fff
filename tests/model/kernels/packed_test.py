"""The packed form of decoders against the plain one: what it gives, what it shares, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llmtrain.config.schema import LoraConfig, MlaConfig, ModelConfig, MoeConfig
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.model.kernels import packed as module
from llmtrain.model.kernels.packed import Packed, PackedAttention, PackedFeedForward, PackedHead, PackedNorm, Product
from tests.model.llama import SMALL

MLA = MlaConfig(kv_rank=16, nope_head_dim=8, rope_head_dim=4, v_head_dim=8)
KINDS = {
    "llama": {},
    "untied, with biases": {"tie_embeddings": False, "qkv_bias": True, "o_bias": True, "ffn_bias": True},
    "heads normed": {"qk_norm": True, "head_dim": 8},
    "no gate, learned positions": {"gated": False, "positions": "learned", "attention_softcap": 5.0, "norm": "layer"},
    "norms with 1 + weight": {"norm_offset": True},
    "latent attention": {"attention": "mla", "mla": MLA},
    "experts": {"moe": MoeConfig(num_experts=4, shared_ffn_size=24, dense_layers=[0])},
    "adapters": {"lora": LoraConfig(rank=2, targets=["q", "down"])},
    "interleaved, scaled": {"rope_interleaved": True, "attention_scale": 0.2, "logit_softcap": 9.0},
}
IDS = torch.tensor([[5, 17, 3, 80, 41], [1, 2, 96, 4, 0]])


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_WEIGHTS", 0)


def decoder(**changes: object) -> Decoder:
    config = ModelConfig.model_validate({**SMALL.model_dump(), **changes})
    model = Decoder(config).eval()
    initialize(model, config, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1)
    return model


def shapes(packed: Packed) -> list[list[tuple[int, ...]]]:
    """Returns those of the matrices of each product."""
    products = [operation for operation in packed.operations if isinstance(operation, Product)]
    return [[tuple(part.weight.shape) for part in product.parts] for product in products]


@torch.inference_mode()
def outputs(model: Decoder) -> torch.Tensor:
    return model(IDS, torch.arange(IDS.size(1)).expand_as(IDS))


@pytest.mark.parametrize("rows", [1, 2, 10])
def test_few_rows_are_padded_unseen(rows: int) -> None:
    model = decoder(qkv_bias=True)
    fast = Packed(model).refreshed()
    ids, positions = IDS.view(1, -1)[:, :rows], torch.arange(rows)[None]
    with torch.inference_mode():
        expected, got = model(ids, positions), fast(ids, positions)
    assert got.shape == expected.shape == (1, rows, 97)
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_gives_what_the_plain_decoder_gives(changes: dict) -> None:
    model = decoder(**changes)
    fast = Packed(model).refreshed()
    expected = outputs(model)
    # sums of up to 80 products in fp32, in another order, through three layers
    assert (outputs(fast) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert len(shapes(Packed(model))) > 6


def test_projections_of_one_input_are_one_product_and_the_model_stays_as_it_is() -> None:
    model = decoder(tie_embeddings=True)
    packed = Packed(model)
    assert packed.memory_bytes == 0
    fast = packed.refreshed()
    block = fast.layers["1"]
    assert type(block.attention) is PackedAttention and type(block.feedforward) is PackedFeedForward
    assert type(fast.head) is PackedHead and "packed" not in vars(block.attention.q)
    assert type(block.attention_norm) is PackedNorm
    layer = [[(48, 48), (16, 48), (16, 48)], [(48, 48)], [(80, 48), (80, 48)], [(48, 80)]]
    assert shapes(packed) == [*3 * layer, [(97, 48)]]
    values = 97 * 48 + 3 * (48 * (48 + 16 + 16) + 48 * 48 + 3 * 80 * 48)
    assert packed.memory_bytes == 4 * values
    assert [id(p) for p in fast.parameters()] == [id(p) for p in model.parameters()]
    assert fast.head.weight is fast.embed.weight
    assert not any("Packed" in type(m).__name__ for m in model.modules())
    packed.free()
    assert packed.memory_bytes == 0


def test_a_hook_on_a_router_is_called_in_both() -> None:
    model, called = decoder(**KINDS["experts"]), []
    fast = Packed(model).refreshed()
    assert type(fast.layers["1"].feedforward.shared) is PackedFeedForward
    model.layers["1"].feedforward.router.register_forward_hook(lambda *_: called.append(1))
    outputs(fast)
    outputs(model)
    assert called == [1, 1]


def test_a_projection_with_an_adapter_stays_alone_and_its_adapter_counts() -> None:
    model = decoder(lora=LoraConfig(rank=2, targets=["q", "down"]))
    fast = Packed(model).refreshed()
    assert "packed" not in vars(fast.layers["0"].attention)
    before = outputs(fast)
    with torch.no_grad():
        model.layers["0"].attention.q.lora.b.mul_(5)
    assert (outputs(fast) - outputs(model)).abs().max() <= 1e-4 < (outputs(fast) - before).abs().max()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_packs_anew_what_was_written_to(mode: Callable) -> None:
    model = decoder()
    packed = Packed(model)
    old = outputs(packed.refreshed())
    kept = [o.weight for o in packed.operations]
    packed.refreshed()
    assert all(a is o.weight for a, o in zip(kept, packed.operations, strict=True))
    with mode():
        model.layers["2"].feedforward.up.weight.mul_(3)
    assert torch.equal(outputs(packed.decoder), old)
    new = outputs(packed.refreshed())
    assert (new - outputs(model)).abs().max() <= 1e-4 < (new - old).abs().max()


@pytest.mark.parametrize("supported", [True, False])
def test_bf16(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without AVX-512 multiplies as the plain model does, as oneDNN packs no bf16 there."""
    here = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if supported and not here:
        pytest.skip("this CPU packs no bf16")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    model = decoder().bfloat16()
    fast = Packed(model).refreshed()
    assert (fast is model) is not supported
    # both round each product once, to 8 bits; what is summed in another order may round to the neighbour
    assert (outputs(fast) - outputs(model)).abs().max() <= 0.05 * outputs(model).abs().max()


def test_only_what_gains_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_WEIGHTS", 4000)
    layer = [[(80, 48), (80, 48)]]  # q, k and v have 3,840 weights
    assert shapes(Packed(decoder())) == [*3 * layer, [(97, 48)]]
    monkeypatch.setattr(module, "LEAST_WEIGHTS", 10**6)
    model = decoder()
    assert Packed(model).refreshed() is model
    monkeypatch.setattr(module, "LEAST_WEIGHTS", 0)
    assert Packed(model.double()).decoder is model
