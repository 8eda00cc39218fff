"""A run goes on only with the model that its checkpoint was made with."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.config.recipes import RECIPES
from llmtrain.config.schema import Config, ModelConfig, OptimConfig
from llmtrain.data.mix import ORDER
from llmtrain.model.decoder import parameter_shapes
from llmtrain.trainer import resume
from llmtrain.trainer.job import GuardState, Job
from llmtrain.trainer.resume import check_same_run

MOE = {"num_experts": 4, "expert_ffn_size": 16}


def go_on(before: dict, after: dict, without: str = "") -> None:
    was, now = (Config(model=ModelConfig.model_validate({"num_layers": 1, **model})) for model in (before, after))
    saved = resolve_model(was.model)
    state = {
        "model": saved.model_dump(mode="json", exclude={without}),
        "config": was.model_dump(mode="json"),
        "base": None,
    }
    reader = SimpleNamespace(names=lambda: list(parameter_shapes(saved)), state=state)
    check_same_run(job_of(now), reader, "x")


def job_of(config: Config, **others: SimpleNamespace) -> Job:
    """A job of a policy and other models, without ranks."""
    engines = {"policy": SimpleNamespace(optim=config.optim), **others}
    return Job(config, RECIPES["pretrain"], resolve_model(config.model), None, None, None, engines)


def critic(optimizer: str = "adamw", **model: object) -> SimpleNamespace:
    """A second trained model, as far as going on asks about it."""
    section = resolve_model(ModelConfig.model_validate({"num_layers": 1, "hidden_size": 32, **model}))
    return SimpleNamespace(optim=OptimConfig(name=optimizer), parts=[SimpleNamespace(config=section)])


def saved_with(config: Config, *critics: SimpleNamespace) -> CheckpointReader:
    """What a run of a policy, and of a critic if there is one, has saved; no files."""
    reader = CheckpointReader.__new__(CheckpointReader)
    states = [{"model": each.parts[0].config.model_dump(mode="json"), "optim": each.optim.name} for each in critics]
    policy = resolve_model(config.model)
    reader.prefix, roles = "", dict(zip(("critic",), states, strict=False))
    reader.state = {"model": policy.model_dump(mode="json"), "config": config.model_dump(mode="json"), "roles": roles}
    reader._parameters = dict.fromkeys(parameter_shapes(policy))
    for each in critics:
        reader._parameters |= dict.fromkeys(f"critic/{name}" for name in parameter_shapes(each.parts[0].config))
    return reader


def test_every_model_of_a_job_goes_on_with_what_it_was() -> None:
    config = Config(model=ModelConfig(num_layers=1))
    check_same_run(job_of(config, critic=critic()), saved_with(config, critic()), "x")
    check_same_run(job_of(config), saved_with(config), "x")
    other = [
        (critic(norm_eps=1e-6), "critic: model.norm_eps=1e-06: must stay 1e-05"),
        (critic(num_layers=2), "critic: x: holds other parameters than the model section describes"),
        (critic("muon"), "critic: optim.name=muon: must stay adamw"),
    ]
    for changed, message in other:
        with pytest.raises(ValueError, match=re.escape(message)):
            check_same_run(job_of(config, critic=changed), saved_with(config, critic()), "x")


def test_experts_that_adamw_updated_are_not_gone_on_with_by_muon() -> None:
    """Earlier versions left them to AdamW, whose state the checkpoint then holds."""
    config = Config(model=ModelConfig.model_validate({"num_layers": 1, "moe": MOE}), optim=OptimConfig(name="muon"))
    reader = saved_with(config)
    for adamw in ("embed.weight", "experts"):
        for name in reader._parameters:
            keys = ("exp_avg", "exp_avg_sq") if adamw in name else ("momentum",)
            reader._parameters[name] = [SimpleNamespace(keys=("weight", *keys))]
        if adamw == "embed.weight":
            check_same_run(job_of(config), reader, "x")
    message = "x: holds AdamW's state of layers.0.feedforward.experts.gate (3 such), which Muon updates since; to go on"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_same_run(job_of(config), reader, "x")


def test_a_run_goes_on_with_the_same_models() -> None:
    config = Config(model=ModelConfig(num_layers=1))
    with pytest.raises(ValueError, match="x: holds the models policy, and this run trains critic, policy"):
        check_same_run(job_of(config, critic=critic()), saved_with(config), "x")
    with pytest.raises(ValueError, match="x: holds the models critic, policy, and this run trains policy"):
        check_same_run(job_of(config), saved_with(config, critic()), "x")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"mup": {"base_hidden": 32}}, "model.mup=base_hidden=32 base_head_dim=None: must stay None"),
        ({}, {"norm_eps": 1e-6}, "model.norm_eps=1e-06: must stay 1e-05, with which x was made"),
        ({"rope_theta": 5e4}, {}, "model.rope_theta=10000.0: must stay 50000.0"),
        ({"moe": {**MOE, "top_k": 1}}, {"moe": MOE}, "model.moe.top_k=2: must stay 1"),
        (
            {},
            {"lora": {"rank": 2}},
            "model.lora={'rank': 2, 'alpha': 16.0, 'targets': ['q', 'v']}: must stay None, with",
        ),
        (
            {"lora": {"rank": 2}},
            {},
            "model.lora=None: must stay {'rank': 2, 'alpha': 16.0, 'targets': ['q', 'v']}, with",
        ),
        ({"lora": {"alpha": 8.0}}, {"lora": {}}, "model.lora.alpha=16.0: must stay 8.0, with which x was made"),
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
    engine = SimpleNamespace(
        to_device=lambda: told.append("here"),
        load_fragments=lambda *given: told.append(given),
        load_extra_state=told.append,
    )
    monkeypatch.setattr(resume, "newest_intact", lambda directory, mesh: f"{directory}/newest")
    monkeypatch.setattr(resume, "CheckpointReader", lambda path: reader)
    monkeypatch.setattr(resume, "check_same_run", lambda *_: None)
    job = SimpleNamespace(config=Config(), mesh=SimpleNamespace(rank=3), engines={"policy": engine}, state={"kl": 1.0})
    assert resume.load_newest(job) == f"{resume.checkpoint_dir(job.config)}/newest"
    assert told == ["here", ("read", 6), {"loss_scale": 2.0}, ("random state", 3)]
    assert (job.step, job.tokens, job.guard) == (7, 80, GuardState.of_checkpoint(guard))
    assert job.state == {}  # earlier versions saved none
    state["recipe_state"] = {"kl": 0.5}
    resume.load_newest(job)
    assert job.state == {"kl": 0.5}


def test_a_save_holds_what_the_recipe_carries() -> None:
    saved: list[dict] = []
    job = job_of(Config())
    job.mesh, job.state = SimpleNamespace(sizes={}), {"kl": 0.5}
    engine = SimpleNamespace(step=3, extra_state=dict, optim=job.config.optim, to_device=lambda: None)
    job.engines = {"policy": engine}
    job.saver = SimpleNamespace(save=lambda state, last: saved.append(state))
    resume.save(job)
    assert saved[0]["recipe_state"] == {"kl": 0.5} and saved[0]["order"] == ORDER
