from __future__ import annotations

from pathlib import Path

import yaml

from llmtrain.observe.costs import Cost, total_cost


def test_a_model_costs_what_all_stages_behind_it_did(tmp_path: Path) -> None:
    """Two rounds of pairs and DPO, with a teacher and a reward model of the run, and first weights of another run."""

    def at(name: str) -> str:
        return str(tmp_path / name)

    documents = {
        "data": {"data": {"path": at("data")}},
        "first": {"model": {"init_from": at("elsewhere/sft")}, "data": {"train": at("data/sums.jsonl")}},
        "pairs": {"model": {"init_from": at("first")}, "data": {"train": at("data/sums.jsonl")}},
        "dpo": {"model": {"init_from": at("first/hf")}, "data": {"train": at("pairs/pairs.jsonl")}},
        "teacher": {"model": {"init_from": at("elsewhere/sft")}},
        "distill": {"model": {"init_from": at("dpo")}, "distill": {"teachers": [{"model": at("teacher")}]}},
        "ppo": {"rewards": [{"model": at("dpo/export")}], "run_dir": at("first"), "data": {"held_out": at("pairs/x")}},
        "dpo-other": {"seed": 1, "model": {"init_from": "organisation/model"}},
    }
    configs = {at(name): yaml.safe_dump(document) for name, document in documents.items()}
    known = {at(name): Cost(samples=10**i, cpu_s=2.0**i) for i, name in enumerate(documents)}

    def cost(name: str) -> tuple[int, float | None]:
        found = total_cost(at(name), known, configs)
        return found.samples, found.cpu_s

    assert cost("first") == (1, 1.0)
    assert cost("dpo") == (111, 7.0)  # data counts once, though two stages read it
    assert cost("distill") == (11111, 31.0)
    assert cost("ppo") == (1111, 15.0)
    assert cost("data") == cost("dpo-other") == (0, None)


def test_a_document_that_names_itself_or_is_none(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    configs = {a: f"model: {{init_from: {b}}}", b: f"model: {{init_from: {a}}}"}
    known = {a: Cost(1, None), b: Cost(2, 3.0)}
    assert total_cost(a, known, configs) == Cost(2, 3.0)
    for text in ("", "{", "a: \tb", "- 1", "null", "x: 'a/\\0b'", 'x: "a/\\0b"', "x: " + "/a" * 3000):
        assert total_cost(a, known, {a: text}) == Cost(0, None)
