"""Checks the choice of experts, worked by hand."""

from __future__ import annotations

import pytest
import torch

from llmtrain.config.schema import ModelConfig, MoeConfig
from llmtrain.model.decoder import Decoder, init_tensor, initialize
from llmtrain.model.router import Router


def router(**moe: object) -> Router:
    """Returns a router whose logits are its input."""
    config = MoeConfig(**moe)
    made = Router(ModelConfig(hidden_size=config.num_experts, moe=config))
    with torch.no_grad():
        made.weight.copy_(torch.eye(config.num_experts))
    return made


def routed(r: Router, *logits: float) -> dict[int, float]:
    """Returns expert -> weight of one token."""
    indices, weights = r(torch.tensor([[logits]]))
    return dict(sorted(zip(indices[0].tolist(), weights[0].tolist(), strict=True)))


LN = torch.arange(1, 9).log().tolist()  # softmax of the first n: shares in the ratio 1 : 2 : ... : n


def test_softmax() -> None:
    assert routed(router(num_experts=4, top_k=2), *LN[:4]) == pytest.approx({2: 3 / 7, 3: 4 / 7})
    assert routed(router(num_experts=4, top_k=2, normalize=False), *LN[:4]) == pytest.approx({2: 0.3, 3: 0.4})
    scaled = router(num_experts=4, top_k=2, normalize=False, scale=2.5)
    assert routed(scaled, *LN[:4]) == pytest.approx({2: 0.75, 3: 1.0})


def test_the_best_group_by_its_best_expert() -> None:
    """Softmax scores are in the ratio 1 5 | 4 4 | 2 3: groups 0 and 1 are kept; the third group's 3 is not chosen."""
    ratios = torch.tensor([1.0, 5, 4, 4, 2, 3])
    r = router(num_experts=6, top_k=4, num_groups=3, top_groups=2, normalize=False)
    found = routed(r, *ratios.log().tolist())
    assert found == pytest.approx({0: 1 / 19, 1: 5 / 19, 2: 4 / 19, 3: 4 / 19})


def test_the_best_group_by_its_two_best_experts() -> None:
    """Sigmoid scores are .9 .1 | .6 .5 | .2 .3: group 1 has 1.1, group 0 1.0."""
    scores = torch.tensor([0.9, 0.1, 0.6, 0.5, 0.2, 0.3])
    r = router(num_experts=6, top_k=2, num_groups=3, top_groups=1, gate="sigmoid")
    assert routed(r, *scores.logit().tolist()) == pytest.approx({2: 6 / 11, 3: 5 / 11})


def test_the_bias_chooses_but_does_not_weigh() -> None:
    scores = torch.tensor([0.9, 0.1, 0.6, 0.5]).logit().tolist()
    r = router(num_experts=4, top_k=2, gate="sigmoid", selection_bias=True, normalize=False)
    assert routed(r, *scores) == pytest.approx({0: 0.9, 2: 0.6})
    r.bias.copy_(torch.tensor([-0.5, 0.6, 0.0, 0.0]))  # .4 .7 .6 .5
    assert routed(r, *scores) == pytest.approx({1: 0.1, 2: 0.6})
    assert "bias" in r.state_dict() and "bias" not in dict(r.named_parameters())


def test_negative_choices_stay_within_their_groups() -> None:
    """A choice below 0 in a kept group comes before one above 0 in another."""
    scores = torch.tensor([0.9, 0.1, 0.5, 0.3]).logit().tolist()
    r = router(num_experts=4, top_k=2, num_groups=2, top_groups=1, gate="sigmoid", selection_bias=True)
    r.bias.copy_(torch.tensor([0.5, -0.2, 0.0, 0.0]))
    assert set(routed(r, *scores)) == {0, 1}


def test_padding_goes_nowhere() -> None:
    r = router(num_experts=4, top_k=2)
    indices, weights = r(torch.randn(2, 3, 4), torch.tensor([[False, False, True], [False, True, True]]))
    nowhere = torch.tensor([False, False, True, False, True, True])
    assert indices[nowhere].eq(4).all() and weights[nowhere].eq(0).all()
    assert indices[~nowhere].lt(4).all() and torch.allclose(weights[~nowhere].sum(1), torch.ones(3))


def test_scores_and_bias_are_fp32() -> None:
    """Scores and bias are fp32 whatever the module is cast to; and the bias moves with it."""
    r = router(num_experts=4, top_k=2, selection_bias=True)
    r.bias.fill_(1.001)
    r = r.to(torch.bfloat16)
    assert r.weight.dtype == torch.bfloat16 and r.bias.dtype == torch.float32 and r.bias[0] == torch.tensor(1.001)
    assert r(torch.randn(1, 2, 4).bfloat16())[1].dtype == torch.float32
    assert r.to("meta").bias.is_meta and r.to_empty(device="cpu").bias.dtype == torch.float32


def test_initial_values() -> None:
    moe = MoeConfig(num_experts=8, expert_ffn_size=64, shared_ffn_size=64, selection_bias=True)
    config = ModelConfig(num_layers=8, moe=moe)
    model = Decoder(config)
    model.layers["0"].feedforward.router.bias.fill_(7)
    initialize(model, config, seed=0)
    feedforward = model.layers["0"].feedforward
    assert feedforward.router.bias.eq(0).all()
    for p, std in (
        (feedforward.router.weight, 0.02),
        (feedforward.experts.gate, 0.02),
        (feedforward.experts.down, 0.02 / 4),
        (feedforward.shared.down.weight, 0.02 / 4),
    ):
        assert p.std().item() == pytest.approx(std, rel=0.1)
    name = "layers.0.feedforward.experts.down"
    assert torch.equal(feedforward.experts.down, init_tensor(name, (8, 128, 64), config, 0))
