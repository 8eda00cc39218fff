"""Rules of experts and scalar heads: broken once, each says value, rule and remedy; kept, they are silent."""

from __future__ import annotations

import pytest

from llmtrain.config.recipes import config_class
from llmtrain.config.schema import ModelConfig, MoeConfig
from llmtrain.rules.check import violations

GOOD = {"num_experts": 8, "top_k": 2, "num_groups": 4, "top_groups": 2}


def found(model: dict, moe: dict) -> list[str]:
    config = config_class()(model=ModelConfig(**model, moe=MoeConfig(**{**GOOD, **moe})), parallel={"dp_shard": 1})
    return [line for line in violations(config, 1, "pretrain") if "model." in line]


@pytest.mark.parametrize(
    ("model", "moe", "expected"),
    [
        ({}, {"top_k": 9, "num_groups": 1, "top_groups": 1}, "model.moe.top_k=9: must be at most num_experts=8"),
        ({}, {"num_groups": 3}, "model.moe.num_groups=3: must divide num_experts=8"),
        ({}, {"top_groups": 5}, "top_groups=5 be at most num_groups"),
        ({}, {"top_k": 5}, "model.moe.top_k=5: the top_groups=2 groups hold fewer experts"),
        ({}, {"gate": "sigmoid", "num_groups": 8}, "model.moe.num_groups=8: with gate: sigmoid the two best"),
        ({}, {"dense_layers": [0, 4]}, "model.moe.dense_layers: 4 is no layer of 0 .. 3"),
        ({}, {"balance": "bias"}, "model.moe.balance=bias: moves model.moe.selection_bias, which is off"),
        ({}, {"balance": "bias+aux"}, "model.moe.balance=bias+aux: moves model.moe.selection_bias, which is off"),
        ({"gated": False}, {}, "model.gated=False, ffn_bias=False: with model.moe they are true and false"),
        ({"ffn_bias": True}, {}, "model.gated=True, ffn_bias=True: with model.moe they are true and false"),
        ({"block": "parallel"}, {}, "model.block=parallel: not with model.moe"),
    ],
)
def test_one_broken_rule_is_one_line(model: dict, moe: dict, expected: str) -> None:
    lines = found(model, moe)
    assert len(lines) == 1 and expected in lines[0] and "; " in lines[0], lines


@pytest.mark.parametrize(
    "moe",
    [
        {"top_k": 8, "num_groups": 1, "top_groups": 1},  # every expert
        {"top_groups": 4},  # every group
        {"top_k": 4},  # every expert of the top groups
        {"num_groups": 8},  # an expert a group
        {"gate": "sigmoid", "num_groups": 4},  # two experts a group
        {"gate": "sigmoid", "num_experts": 1, "top_k": 1, "num_groups": 1, "top_groups": 1},
        {"dense_layers": [0, 3]},  # the first and the last of 4 layers
    ],
)
def test_the_largest_and_the_smallest_that_a_rule_allows(moe: dict) -> None:
    assert not found({}, moe)


def test_good_experts_pass() -> None:
    for moe in ({}, {"gate": "sigmoid", "selection_bias": True, "balance": "bias"}, {"balance": "aux", "z_coef": 0.1}):
        assert not found({}, moe)


def of_scalar(command: str, tp: int = 1, **model: object) -> list[str]:
    shape = {"head": "scalar", "num_heads": 4, "num_kv_heads": 4, **model}
    config = config_class()(model=ModelConfig.model_validate(shape), parallel={"dp_shard": 1, "tp": tp})
    return [line for line in violations(config, tp, command) if line.startswith("model.") and "init_from:" not in line]


@pytest.mark.parametrize(
    ("command", "model", "expected"),
    [
        *(
            (command, {}, f"model.head=scalar: {command} needs log-probs of tokens")
            for command in ("pretrain", "sft", "grpo", "eval")
        ),
        ("export", {"tie_embeddings": True}, "model.tie_embeddings=true: not with model.head=scalar"),
        ("export", {"family": "palm"}, "model.head=scalar: not with model.family=palm on disk"),
        ("plan", {"mtp_layers": 1}, "model.mtp_layers=1: not with model.head=scalar"),
        ("plan", {"lora": {}}, "model.lora: not with model.head=scalar"),
        ("plan", {"mup": {"base_hidden": 64}}, "model.mup: not with model.head=scalar"),
        ("plan", {"hidden_size": 130, "head_dim": 32}, "model.hidden_size=130: must be a multiple of parallel.tp=4"),
    ],
)
def test_a_scalar_head_is_refused_where_it_is_not_shown(command: str, model: dict, expected: str) -> None:
    lines = of_scalar(command, tp=4 if "hidden_size" in model else 1, **model)
    assert len(lines) == 1 and expected in lines[0] and "; " in lines[0], lines


def test_a_scalar_head_passes_alone() -> None:
    assert not of_scalar("plan") and not of_scalar("export") and not of_scalar("plan", tp=2, tie_embeddings=False)


def test_a_plan_of_a_reward_model_has_its_head() -> None:
    """Without, it would count logits that `reward` never makes."""
    for head, expected in (
        ("lm", ["model.head=lm: reward trains a model with one number a position; set"]),
        ("scalar", []),
    ):
        lines = violations(config_class()(reward={}, model=ModelConfig(head=head)), 1, "plan")
        assert [line.rpartition(" ")[0] for line in lines] == expected
