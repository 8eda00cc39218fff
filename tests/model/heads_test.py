"""The scalar head: one fp32 value a position, in the decoder and by its initial weights."""

from __future__ import annotations

import pytest
import torch

from llmtrain.arch.parameters import local_shape, outer_shapes
from llmtrain.arch.resolve import parameter_count, resolve_model, train_flops_per_token
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, init_std, init_tensor, initialize, parameter_shapes
from llmtrain.model.heads import ScalarHead

SMALL = {"num_layers": 1, "hidden_size": 8, "ffn_size": 8, "num_heads": 2, "num_kv_heads": 2, "vocab_size": 16}


def small(**fields: object) -> ModelConfig:
    return resolve_model(ModelConfig.model_validate({**SMALL, "head": "scalar", **fields}))


def test_a_product_in_fp32() -> None:
    head = ScalarHead(3).bfloat16()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    values = head(torch.tensor([[[257.0, 1.0, 0.0], [0.0, 0.0, 3.0]]]))
    assert values.dtype == torch.float32 and values.tolist() == [[255.0, 1.5]]  # bf16 has no 255.0 + 2


@pytest.mark.parametrize("softcap", [None, 1e-3])
def test_values_at_all_positions_whatever_the_labels(softcap: float | None) -> None:
    model = Decoder(small(logit_softcap=softcap))
    initialize(model, model.config, seed=0)
    ids, positions = torch.arange(6).view(2, 3), torch.arange(3).expand(2, 3)
    values = model(ids, positions)
    hot = torch.full((2,), 2.0)
    labelled = model(ids, positions, labels=torch.full((2, 3), -100), temperature=hot)
    assert values.shape == (2, 3) and values.ne(0).all() and torch.equal(values, labelled)
    head, model.head = model.head, None
    torch.testing.assert_close(values, model(ids, positions) @ head.weight[0])


def test_shapes_are_those_of_the_arithmetic() -> None:
    model = small()
    assert parameter_shapes(model)["head.weight"] == outer_shapes(model)[1]["head.weight"] == (1, 8)
    assert local_shape("head.weight", (1, 8), model, tp=4) == (1, 2)
    assert local_shape("head.weight", (16, 8), small(head="lm", tie_embeddings=False), tp=4) == (4, 8)
    tied = small(head="lm")
    assert parameter_count(model) == parameter_count(tied) + 8
    # 6 a weight: the head has 8, a tied one multiplies with all of the embedding's
    assert train_flops_per_token(tied, 4) - train_flops_per_token(model, 4) == 6 * (16 * 8 - 8)


def test_initial_values_are_small_at_any_width_and_a_function_of_the_seed() -> None:
    model = small(hidden_size=4096)
    assert init_std("head.weight", (1, 4096), model) == 1 / 4097
    one = init_tensor("head.weight", (1, 4096), model, seed=1)
    assert one.std().item() == pytest.approx(1 / 4097, rel=0.05)
    assert torch.equal(one, init_tensor("head.weight", (1, 4096), model, seed=1))
    assert not torch.equal(one, init_tensor("head.weight", (1, 4096), model, seed=2))
