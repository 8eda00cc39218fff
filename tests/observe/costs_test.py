from __future__ import annotations

from llmtrain.observe.costs import Cost, total_cost


def test_a_model_costs_what_all_stages_behind_it_did() -> None:
    """Two rounds of pairs and DPO, with a teacher and a reward model of the run."""
    made_from = {
        "data": [],
        "first": ["data"],
        "pairs": ["data", "first"],
        "dpo": ["pairs", "first"],
        "teacher": [],
        "distill": ["dpo", "teacher"],
        "export": ["dpo"],
        "ppo": ["teacher", "export"],
        "other": ["of another run"],
    }
    known = {name: Cost(10**i, 2.0**i, sources) for i, (name, sources) in enumerate(made_from.items())}
    assert total_cost("first", known) == (1, 1.0)
    assert total_cost("dpo", known) == (111, 7.0)  # data counts once, though two stages read it
    assert total_cost("distill", known) == (11111, 31.0)
    assert total_cost("ppo", known) == (1011111, 95.0)
    assert total_cost("data", known) == (0, 0.0)
    assert total_cost("other", known) is None  # an earlier version did not note what that stage was made from


def test_stages_that_name_each_other() -> None:
    known = {"a": Cost(1, 5.0, ["b", "a"]), "b": Cost(2, 3.0, ["a"])}
    assert total_cost("a", known) == (2, 3.0)
