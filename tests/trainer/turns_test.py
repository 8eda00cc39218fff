"""Models take turns on a device; those that share their parts move as one."""

from __future__ import annotations

from llmtrain.trainer.turns import Turns
from tests.recipes.stubs import StubScorer


def test_one_model_is_on_the_device_and_the_others_wait() -> None:
    policy, critic = StubScorer(lambda batch: None), StubScorer(lambda batch: None)
    adapted = StubScorer(lambda batch: None, parts=policy.parts)  # a reference that is the policy without its adapters
    models = (policy, critic, adapted)
    turns = Turns(models, waits=True)
    for working, here in ((None, ()), (policy, (policy, adapted)), (critic, (critic,)), (adapted, (policy, adapted))):
        turns.of(working)
        assert [model.here for model in models] == [any(model is each for each in here) for model in models]
    turns = Turns(models, waits=False)
    for model in models:
        model.here = True
    turns.of(critic)
    turns.of(None)
    assert all(model.here for model in models)
