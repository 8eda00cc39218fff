"""Checks the losses and the bias that spread tokens over experts, and what is counted."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llmtrain.config.schema import ModelConfig, MoeConfig
from llmtrain.model.balance import Routing, balance_metrics, losses, update_bias
from llmtrain.model.moe import MoE

E, K = 4, 2
AUX = MoeConfig(num_experts=E, top_k=K, expert_ffn_size=8, balance="aux", aux_coef=0.3, z_coef=0.02)
CONFIGS = {
    "softmax": AUX,
    "sigmoid": AUX.model_copy(update={"gate": "sigmoid"}),
    "with a bias": AUX.model_copy(update={"gate": "sigmoid", "selection_bias": True, "balance": "bias+aux"}),
    "z alone": AUX.model_copy(update={"balance": "none"}),
    "one chosen": AUX.model_copy(update={"top_k": 1}),
}


def routing(logits: Tensor, k: int = K) -> Routing:
    """Returns the routing of logits [B, T, E] without padding."""
    return Routing.of(logits.flatten(0, 1), logits.topk(k, -1).indices.flatten(0, 1), logits.size(0))


def moe(config: MoeConfig = AUX, hidden: int = 16, seed: int = 0) -> MoE:
    model = MoE(ModelConfig(hidden_size=hidden, moe=config))
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return model


def random_rows(rows: int = 3, tokens: int = 10, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, 16, generator=torch.Generator().manual_seed(seed))


def trained(model: MoE, x: Tensor, padding: Tensor | None = None, factor: float = 0.0) -> dict[str, Tensor]:
    """Gradients by name, of x too, of a sum over the outputs (0 of padding)."""
    model.zero_grad()
    model.router.counts.loss_factor = factor
    x = x.clone().requires_grad_()
    y = model(x, padding)
    (y if padding is None else y * ~padding[..., None]).sin().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}


# The losses


def test_auxiliary_loss_worked_by_hand() -> None:
    """Shares .4 .3 .2 .1 of both tokens, experts 0 and 1 chosen: f = 2 2 0 0, so 2 (.4 + .3) for each token."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(1, 2, E)
    aux, z = losses(routing(logits), AUX)
    assert aux.item() == pytest.approx(2 * 1.4)
    assert z.item() == pytest.approx(0, abs=1e-10)  # the logits of a row are log-probabilities
    aux, z = losses(routing(logits + 3), AUX)
    assert aux.item() == pytest.approx(2 * 1.4) and z.item() == pytest.approx(2 * 9, rel=1e-6)


def test_auxiliary_loss_of_a_sigmoid_gate() -> None:
    """Scores .8 .4 .2 .2 are shares .5 .25 .125 .125; experts 0 and 1 chosen."""
    logits = torch.tensor([0.8, 0.4, 0.2, 0.2]).logit().view(1, 1, E)
    assert losses(routing(logits), CONFIGS["sigmoid"])[0].item() == pytest.approx(2 * 0.75)


def test_perfect_balance_gives_one_a_token() -> None:
    logits = torch.tensor([[5.0, 5, 0, 0], [0, 0, 5, 5], [5, 0, 5, 0], [0, 5, 0, 5]])[None]
    assert losses(routing(logits), AUX)[0].item() == pytest.approx(4)


def test_auxiliary_loss_of_transformers() -> None:
    """Theirs is top_k times ours for each token, over one layer and one row; with padding too."""
    logits = torch.randn(1, 50, E, generator=torch.Generator().manual_seed(0))
    theirs = load_balancing_loss_func((logits[0],), E, K)
    assert losses(routing(logits), AUX)[0].item() == pytest.approx(50 / K * theirs.item(), rel=1e-5)
    indices = logits[0].topk(K).indices
    indices[30:] = E
    theirs = load_balancing_loss_func((logits[0],), E, K, torch.arange(50)[None] < 30)
    ours = losses(Routing.of(logits[0], indices, 1), AUX)[0]
    assert ours.item() == pytest.approx(30 / K * theirs.item(), rel=1e-5)


# Their gradient


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_that_of_theformula(name: str, ranks: int) -> None:
    model, x, padding = moe(CONFIGS[name]), random_rows(), torch.zeros(3, 10, dtype=torch.bool)
    padding[1, 7:] = padding[2, :2] = True
    without = trained(model, x, padding)
    model.router.counts.tp_ranks = ranks
    added = {n: g - without[n] for n, g in trained(model, x, padding, factor=0.25).items()}
    plain = objective_gradients(model, x.clone().requires_grad_(), CONFIGS[name], padding)
    for other in added.keys() - plain.keys():
        assert added[other].abs().max() == 0
    for n, expected in plain.items():
        torch.testing.assert_close(added[n], 0.25 / ranks * expected, atol=2e-6, rtol=1e-4)
        assert expected.abs().max() > 1e-3


def objective_gradients(model: MoE, x: Tensor, config: MoeConfig, padding: Tensor) -> dict[str, Tensor]:
    weight = model.router.weight
    gradients = torch.autograd.grad(formula(x, weight, config, padding), (weight, x))
    return dict(zip(("router.weight", "x"), gradients, strict=True))


def formula(x: Tensor, weight: Tensor, config: MoeConfig, padding: Tensor) -> Tensor:
    """Computes the objective plainly, row by row; the chosen experts are constant."""
    total = torch.zeros(())
    for row, hidden in zip(x, padding, strict=True):
        logits = row[~hidden] @ weight.T
        scores = logits.softmax(-1) if config.gate == "softmax" else logits.sigmoid()
        n, share = len(logits), scores / scores.sum(-1, keepdim=True)
        chosen = torch.bincount(scores.topk(config.top_k).indices.flatten(), minlength=E)
        if "aux" in config.balance:
            total = total + config.aux_coef * E / (config.top_k * n) * (chosen * share.sum(0)).sum()
        total = total + config.z_coef * logits.exp().sum(-1).log().square().sum()
    return total


def test_rows_are_independent_of_their_batch() -> None:
    """A whole batch and its rows one by one give the same sum of gradients and the same counts."""
    model, x = moe(), random_rows()
    whole = trained(model, x, factor=0.5)
    counts = model.router.counts
    load, sums = counts.load, counts.losses
    counts.reset()
    parts = [trained(model, row[None], factor=0.5) for row in x]
    torch.testing.assert_close(sum(p["router.weight"] for p in parts), whole["router.weight"], atol=1e-5, rtol=1e-4)
    assert torch.equal(counts.load, load) and counts.tokens == 30
    torch.testing.assert_close(counts.losses, sums)


def test_a_row_in_parts_over_ranks() -> None:
    """Each part of a row, given the row's counts, gives its part of the gradient and of the losses."""
    model, x = moe(), random_rows(rows=1)
    whole = trained(model, x, factor=0.5)
    counts = model.router.counts
    sums, logits = counts.losses, model.router.logits(x[0]).view(1, 10, E)
    of_row = {(1, E): routing(logits).counts, (1,): torch.tensor([10])}
    counts.row_sum = lambda part: of_row[tuple(part.shape)]
    counts.reset()
    parts = [trained(model, part, factor=0.5)["router.weight"] for part in (x[:, :4], x[:, 4:])]
    torch.testing.assert_close(sum(parts), whole["router.weight"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(counts.losses, sums)
    assert counts.load.sum() == 10 * K and counts.tokens == 10  # its own


# What is counted


def test_padding_is_neither_counted_nor_computed() -> None:
    model, x, padding = moe(), random_rows(), torch.zeros(3, 10, dtype=torch.bool)
    padding[0, 5:] = padding[2] = True
    y = model(x, padding)
    assert y[padding].abs().max() == 0
    torch.testing.assert_close(y[~padding], model(x)[~padding])
    gradients = trained(model, x, padding, factor=1.0)
    assert gradients["x"][padding].abs().max() == 0
    assert all(g.isfinite().all() for g in gradients.values())
    assert model.router.counts.load.sum() == 15 * K and model.router.counts.tokens == 15


def test_scoring_is_not_counted() -> None:
    model = moe()
    with torch.no_grad():
        model(random_rows())
    model(random_rows())  # no backward
    assert model.router.counts.load is None


def test_the_shared_expert_takes_every_token() -> None:
    model = moe(AUX.model_copy(update={"shared_ffn_size": 12}))
    x, padding = random_rows(), torch.ones(3, 10, dtype=torch.bool)
    assert torch.equal(model(x, padding), model.shared(x))


# Between updates


def test_bias_worked_by_hand() -> None:
    bias = update_bias(torch.tensor([0.5, 0.0, 0.0, 0.25]), torch.tensor([10, 4, 5, 1]), 0.125)
    assert bias.tolist() == [0.375, 0.125, 0.0, 0.375]  # the mean is 5
    exact = 2**53
    assert update_bias(torch.zeros(2), torch.tensor([exact + 1, exact]), 1.0).tolist() == [-1, 1]


def test_metrics_worked_by_hand() -> None:
    loads = {"2": torch.tensor([6, 2]), "5": torch.tensor([4, 4])}
    found = balance_metrics(loads, {"2": 8, "5": 7}, {"2": 4, "5": 4}, top_k=2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert found["load_max.2"] == 1.5 and found["load_entropy.2"] == pytest.approx(entropy)
    assert found["load_dropped.2"] == 0 and found["load_dropped.5"] == 0.125
    even = balance_metrics({"0": torch.full((8,), 3)}, {"0": 24}, {"0": 12}, top_k=2)
    assert even == {"load_max.0": 1, "load_entropy.0": pytest.approx(1), "load_dropped.0": 0}
    assert balance_metrics({"0": torch.tensor([5, 0])}, {"0": 5}, {"0": 5}, top_k=1)["load_entropy.0"] == 0


@pytest.mark.parametrize("balance", ["none", "bias", "aux"])
def test_both_ways_even_the_load(balance: str) -> None:
    """Tokens that all prefer the same experts."""
    config = AUX.model_copy(update={"balance": balance, "gate": "sigmoid", "selection_bias": True, "z_coef": 0.0})
    model = moe(config)
    model.router.weight.data *= 0.2
    x = random_rows(rows=8, tokens=64) * 0.5 + model.router.weight[0].detach() * 5
    optimizer, counts = (
        torch.optim.SGD(model.router.parameters(), lr=1.0 if balance == "aux" else 0.0),
        model.router.counts,
    )
    counts.loss_factor = 1 / x[..., 0].numel()
    for _ in range(60):
        counts.reset()
        optimizer.zero_grad()
        (model(x) * 0).sum().backward()
        optimizer.step()
        if balance == "bias":
            model.router.bias.copy_(update_bias(model.router.bias, counts.load, 0.01))
    largest = counts.load.max() / counts.load.double().mean()
    assert largest > 1.7 if balance == "none" else largest < 1.25, largest


def test_a_copy_counts_for_itself() -> None:
    model = moe()
    trained(model, random_rows(), factor=0.5)
    copied = deepcopy(model)
    assert copied.router.counts.load is None and copied.router.counts.loss_factor == 0.5
    trained(copied, random_rows(rows=1))
    assert copied.router.counts.tokens == 10 and model.router.counts.tokens == 30
