"""A run goes on only with the model that its checkpoint was made with."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.recipes import RECIPES
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.model.decoder import parameter_shapes
from llmtrain.trainer import resume
from llmtrain.trainer.job import GuardState
from llmtrain.trainer.resume import check_same_run

MOE = {"num_experts": 4, "expert_ffn_size": 16}


def go_on(before: dict, after: dict, without: str = "") -> None:
    was, now = (Config(model=ModelConfig.model_validate({"num_layers": 1, **model})) for model in (before, after))
    saved = resolve_model(was.model)
    state = {"model": saved.model_dump(mode="json", exclude={without}), "config": was.model_dump(mode="json")}
    reader = SimpleNamespace(names=lambda: list(parameter_shapes(saved)), state=state)
    job = SimpleNamespace(config=now, model=resolve_model(now.model), recipe=RECIPES["pretrain"])
    check_same_run(job, reader, "x")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"mup": {"base_hidden": 32}}, "model.mup=base_hidden=32 base_head_dim=None: must stay None"),
        ({}, {"norm_eps": 1e-6}, "model.norm_eps=1e-06: must stay 1e-05, with which x was made"),
        ({"rope_theta": 5e4}, {}, "model.rope_theta=10000.0: must stay 50000.0"),
        ({"moe": {**MOE, "top_k": 1}}, {"moe": MOE}, "model.moe.top_k=2: must stay 1"),
    ],
)
def test_another_function_of_the_same_weights(before: dict, after: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        go_on(before, after)


def test_what_concerns_training_alone_may_change() -> None:
    go_on({"moe": MOE}, {"moe": {**MOE, "balance": "aux", "aux_coef": 0.1}})


def test_a_checkpoint_from_before_a_field_was_there() -> None:
    go_on({}, {}, without="mup")
    with pytest.raises(ValueError, match=r"model\.mup=.*must stay None"):
        go_on({}, {"mup": {"base_hidden": 32}}, without="mup")


def test_a_run_goes_on_with_its_counters_and_the_random_state_of_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    guard = {"losses": [2.0], "skips": 1, "rewinds": [[2, 1, 64]]}
    state = {"optimizer_step": 6, "step": 7, "tokens": 80, "engine": {"loss_scale": 2.0}, "guard": guard}
    reader = SimpleNamespace(state=state, read="read", restore_rng=lambda rank: told.append(("random state", rank)))
    engine = SimpleNamespace(load_fragments=lambda *given: told.append(given), load_extra_state=told.append)
    monkeypatch.setattr(resume, "newest_intact", lambda directory, mesh: f"{directory}/newest")
    monkeypatch.setattr(resume, "CheckpointReader", lambda path: reader)
    monkeypatch.setattr(resume, "check_same_run", lambda *_: None)
    job = SimpleNamespace(config=Config(), mesh=SimpleNamespace(rank=3), engine=engine)
    assert resume.load_newest(job) == f"{resume.checkpoint_dir(job.config)}/newest"
    assert told == [("read", 6), {"loss_scale": 2.0}, ("random state", 3)]
    assert (job.step, job.tokens, job.guard) == (7, 80, GuardState(**guard))
