"""What data.curriculum changes in a run of GRPO, with the stubs of grpo_wiring_test.py."""

from __future__ import annotations

import json
from collections.abc import Callable

from llmtrain.rules.check import violations
from tests.recipes import grpo_wiring_test as wiring
from tests.recipes.grpo_wiring_test import Run

start = wiring.start
FILTER = "data.curriculum={max_pass_rate: 0.9}"


def test_a_run_skips_what_it_solves(start: Callable[..., Run]) -> None:
    """Of 12 problems every fourth is always solved (`wiring.Run`); the second epoch leaves these out."""
    run = start(FILTER, "train.steps=6").go()
    asked = [run.numbers[tuple(prompt.ids)] for prompts, _ in run.generator.asked for prompt in prompts]
    assert sorted(asked[:12]) == list(range(12))
    assert [number for number in asked[12:21] if number % 4 == 3] == []
    assert run.job.state["curriculum"]["skipped"] >= 3


def test_a_resumed_run_goes_on_with_its_rows(start: Callable[..., Run]) -> None:
    whole = start(FILTER, "train.steps=6").go()
    first = start(FILTER, "train.steps=3").go()
    rest = start(FILTER, "train.steps=6")
    rest.job.state, rest.job.step = json.loads(json.dumps(first.job.state)), 3
    rest.go()
    assert rest.generator.asked == whole.generator.asked[3:]


def test_recipes_that_sample_nothing_refuse_it(start: Callable[..., Run]) -> None:
    config = start(FILTER).job.config
    assert any("data.curriculum: is for recipes that sample" in line for line in violations(config, 1, "sft"))
    assert not any("curriculum" in line for line in violations(config, 1, "grpo"))


def test_a_filter_needs_rewards(start: Callable[..., Run]) -> None:
    """distill takes `rewards: []`."""

    def refused(*overrides: str) -> bool:
        config = start("distill.on_policy=true", *overrides).job.config
        return any("read rewards, and rewards=[]" in line for line in violations(config, 1, "distill"))

    assert refused(FILTER, "rewards=[]")
    assert not refused(FILTER)
    assert not refused(FILTER, "rewards=[]", "rollout.environment={game: nim}")
    assert not refused("data.curriculum={column: level}", "rewards=[]")
