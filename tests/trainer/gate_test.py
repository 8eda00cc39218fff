"""When generator and trainer are compared."""

from __future__ import annotations

import pytest

from llmtrain.config.schema import RolloutConfig
from llmtrain.trainer.gate import Disagreement, Gate
from llmtrain.types import Sample
from tests.group_rows import group_batch
from tests.recipes.stubs import StubEngine, shifted
from tests.rollout.fleets import MESH


def test_in_step_every_update_is_compared() -> None:
    gate = Gate(RolloutConfig(), "fp32", MESH)
    gate.after_update(0.0009, 3)
    with pytest.raises(Disagreement, match=r"step 4: generator and trainer differ by 0\.0011 "):
        gate.after_update(0.0011, 3)


def test_what_older_weights_sampled_is_not_compared_but_the_first_step_is() -> None:
    gate = Gate(RolloutConfig(max_staleness=1, placement="ahead", workers=1), "fp32", MESH)
    gate.after_update(5.0, 3)  # a difference that was learned
    batch = group_batch([[Sample([1], [2, 3], [True] * 2, [-1.0] * 2, [0, 0], True)]], 16, 1, pad_id=0)
    with pytest.raises(Disagreement, match=r"step 1: generator and trainer differ by 0\.01 "):
        gate.before_update(StubEngine(shifted(0.01)), [batch], 0)


def test_a_stale_record_is_compared_at_the_start_of_the_run_and_not_where_it_resumes() -> None:
    rollout = RolloutConfig(max_staleness=1, placement="ahead", workers=1, replay="there")
    batch = group_batch([[Sample([1], [2, 3], [True] * 2, [-1.0] * 2, [0, 0], True)]], 16, 1, pad_id=0)
    Gate(rollout, "fp32", MESH).before_update(StubEngine(shifted(0.01)), [batch], 4)
    for own, number in ((rollout, 0), (rollout.model_copy(update={"max_staleness": 0}), 4)):
        with pytest.raises(Disagreement, match=rf"step {number + 1}: generator and trainer differ by 0\.01 "):
            Gate(own, "fp32", MESH).before_update(StubEngine(shifted(0.01)), [batch], number)
