"""A document that is written out whole, as stages of a run and config.yaml are, is as valid as what the user wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.load import dump, load
from llmtrain.config.recipes import RECIPES
from llmtrain.rules.check import violations

VARIANTS = {
    "dpo": (("dpo.loss=ipo",), ("dpo.loss=simpo",), ("dpo.length_normalized=true",)),
    "ppo": (
        ("ppo.length_alpha=0.05",),
        ("ppo.kl_coef=0.1", "ppo.kl_target=0.1"),
        ("ppo.kl_coef=0.1", "ppo.kl_in=loss"),
    ),
    "grpo": tuple((f"grpo.objective={name}",) for name in ("clip", "gspo", "cispo")),
    "raft": tuple((f"raft.variant={name}",) for name in ("raft", "raft++", "reinforce-rej")),
    "distill": (("distill.on_policy=true",), ("distill.divergence=jsd",), ("distill.top_k=0",)),
}
CASES = [(name, overrides) for name in RECIPES for overrides in ((), *VARIANTS.get(name, ()))]


@pytest.mark.parametrize(("command", "overrides"), CASES, ids=lambda value: str(value))
def test_written_out_it_means_the_same(small: Path, tmp_path: Path, command: str, overrides: tuple[str, ...]) -> None:
    config = load(str(small), list(overrides))
    whole = tmp_path / "whole.yaml"
    whole.write_text(dump(config))
    again = load(str(whole), [])
    assert violations(again, 1, command) == violations(config, 1, command)
    assert dump(again) == dump(config)
