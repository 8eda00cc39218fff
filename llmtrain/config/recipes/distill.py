"""Describes distillation: its section, its rules, and how a run on the student's own samples differs from one on given
rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from llmtrain.config.recipes.base import SAMPLING_PLOTS, Passes, Recipe, StepSize, rows_of, sampled, without_effect
from llmtrain.config.schema import Config
from llmtrain.config.section import Count, DeadlineS, Section, UserPath
from llmtrain.config.served import SCHEMES, address, reachable


class TeacherConfig(Section):
    """Names a frozen model that the student learns from. Its token ids must be the student's."""

    path: UserPath  # a run, a Hugging Face directory, its name on the hub, or the URL of a server (http://host:8000/v1)
    name: str = ""  # in rows (field `teacher`) and messages; default the last part of `path`, or of a server's `model`
    weight: PositiveFloat = 1.0  # share of its divergence where a row names no teacher, relative to the others
    model: str = ""  # of a server: the name that it gives the model
    token_env: str | None = None  # of a server: the environment variable with its token; null = it wants none

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """Names a teacher that has no name."""
        if isinstance(data, dict) and isinstance(data.get("path"), str) and not data.get("name"):
            called = str(data.get("model") or "teacher") if data["path"].startswith(SCHEMES) else data["path"]
            return {**data, "name": os.path.basename(called.rstrip("/"))}
        return data

    @property
    def served(self) -> bool:
        """Tells whether it stands behind a server."""
        return self.path.startswith(SCHEMES)


class DistillConfig(Section):
    """Configures distillation on given rows, or on the student's own samples (GKD, arXiv 2306.13649)."""

    teacher: list[TeacherConfig] = Field([])  # a path, or a list of {path, name, weight}; must be set
    on_policy: bool = False  # the student samples answers to the prompts, and the teacher judges each token
    divergence: Literal["forward", "reverse", "jsd"] | None = None  # None = forward on given rows, reverse on_policy
    beta: float = Field(0.5, gt=0.0, lt=1.0)  # jsd: the mixture is (1 - beta) student + beta teacher
    top_k: int = Field(64, ge=0)  # tokens in the divergence at a position, all others counting as one; 0 = every token
    temperature: PositiveFloat = 1.0  # of student and teacher in the divergence; on_policy it is rollout.temperature
    estimate: Literal["vocabulary", "sampled"] = "vocabulary"  # sampled: on_policy, by the sampled token alone
    prompts_per_step: PositiveInt = 32  # on_policy: prompts sampled a step, which makes one update
    teachers_wait: bool = False  # teachers lie in host memory but while they score
    server_threads: Count = 8  # requests that a rank has under way at a server at once
    server_deadline_s: DeadlineS = 120.0  # until a server has answered all that a step asks, or the run ends

    @field_validator("teacher", mode="before")
    @classmethod
    def _one_teacher(cls, teacher: Any) -> Any:
        """Returns a teacher that stands alone as a list of one."""
        alone = {"path": teacher} if isinstance(teacher, str) else teacher
        return [alone] if isinstance(alone, dict) else alone

    @property
    def kind(self) -> str:
        """Returns the divergence in use."""
        return self.divergence or ("reverse" if self.on_policy else "forward")


def step_size(config: Config) -> StepSize:
    """Returns how much a step on the student's samples takes."""
    return sampled(config, config.distill.prompts_per_step, 1)


def passes(config: Config) -> Passes:
    """Returns how often what a step trains on is scored: the likeliest tokens are asked for first, of the student or of
    the teachers, and a single teacher says all at once."""
    d = config.distill
    seqs = rows_of(config, d.prompts_per_step) if d.on_policy else config.train.global_batch_seqs
    proposed = d.estimate == "vocabulary" and d.top_k > 0
    own = proposed and d.kind == "reverse"
    return Passes(seqs, policy=float(own), frozen=2.0 if proposed and not own and len(d.teacher) > 1 else 1.0)


def weights(config: Config) -> dict[str, str]:
    """Returns the directories of the teachers, by key."""
    return {f"distill.teacher.{each.name}": each.path for each in config.distill.teacher if not each.served}


def frozen_teachers(config: Config) -> tuple[str, ...]:
    """Returns the teachers whose weights a job holds."""
    return tuple(f"the frozen teacher {each.name}" for each in config.distill.teacher if not each.served)


def variant(config: Config) -> Mapping[str, Any]:
    """Returns what is different about a run on the student's own samples: rewards are only recorded."""
    if not config.distill.on_policy:
        return {}
    return {"step_size": step_size, "samples": True, "branches": True, "judged": False, "plots": SAMPLING_PLOTS}


def usable_teachers(config: Config) -> Iterator[str]:
    """Yields a line if there is no teacher, or two of one name, or one that has what is for servers alone."""
    teachers = config.distill.teacher
    if not teachers:
        yield "distill.teacher: must be set, a student learns from one; give the directory of a model or a run"
    names = [each.name for each in teachers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"distill.teacher: {twice[0]} is the name of two teachers; give one another `name`"
    for each in teachers:
        for key, value in (("model", each.model), ("token_env", each.token_env)):
            if value and not each.served:
                yield f"distill.teacher.{each.name}.{key}={value}: is for a server, path={each.path} is none; remove it"


def usable_servers(config: Config) -> Iterator[str]:
    """Yields what cannot work with a teacher behind a server."""
    d, r = config.distill, config.rollout
    for each in (each for each in d.teacher if each.served):
        key = f"distill.teacher.{each.name}"
        yield from reachable(key, each.path, each.model, each.token_env)
        if d.estimate != "sampled":
            yield (
                f"{key}={address(each.path)}: a server gives the log-prob of the token that stands there, not of the "
                "vocabulary; set distill.on_policy=true and distill.estimate=sampled, or give the directory of a model"
            )
        elif r.temperature != 1.0:
            yield (
                f"rollout.temperature={r.temperature:g}: must be 1 with {key}, a server gives log-probs at temperature "
                "1; set it to 1, or give the directory of a model"
            )
        if 2 * d.server_deadline_s >= config.engine.timeout_s:  # the start asks twice
            yield (
                f"distill.server_deadline_s={d.server_deadline_s:g}: must be below half of "
                f"engine.timeout_s={config.engine.timeout_s}, when other ranks give up; lower it, or raise timeout_s"
            )


def on_given_rows(config: Config) -> Iterator[str]:
    """Yields what is for a student that samples, where none does."""
    d = config.distill
    if d.on_policy:
        return
    if d.estimate == "sampled":
        yield (
            "distill.estimate=sampled: needs distill.on_policy=true, its tokens must be the student's own; set it, or "
            "estimate=vocabulary"
        )
    if config.rollout.placement == "separate":
        yield (
            "rollout.placement=separate: needs distill.on_policy=true, on given rows nothing is sampled; use colocated"
        )


def beta_of_jsd(config: Config) -> Iterator[str]:
    """Yields a line if the mixture of a divergence is set that has none."""
    if (kind := config.distill.kind) != "jsd":
        why = f"is of distill.divergence=jsd, not {kind}"
        yield from without_effect(config, "distill", ("beta",), why, "set distill.divergence=jsd")


def on_own_samples(config: Config) -> Iterator[str]:
    """Yields what does not go with samples of the student."""
    d, r = config.distill, config.rollout
    if not d.on_policy:
        return
    if d.temperature not in (1.0, r.temperature):
        yield (
            f"distill.temperature={d.temperature:g}: must be rollout.temperature={r.temperature:g} with "
            "distill.on_policy, the distribution that is sampled is the one that is trained; set "
            "rollout.temperature alone"
        )
    if d.estimate == "sampled" and d.kind != "reverse":
        yield (
            f"distill.divergence={d.kind}: not with distill.estimate=sampled, which estimates the reverse KL; remove "
            "one of them"
        )
    if r.max_staleness:
        yield (
            f"rollout.max_staleness={r.max_staleness}: must be 0 with distill.on_policy, whose loss does not correct "
            "for samples of older weights; set it to 0, with rollout.placement=colocated or separate"
        )
    if r.router_replay:
        yield (
            "rollout.router_replay=true: not with distill.on_policy, whose loss compares whole distributions and "
            "corrects nothing; set it to false"
        )
    if config.guard.spike != "off":
        yield (
            f"guard.spike={config.guard.spike}: must be off with distill.on_policy, after a rewind the same prompts "
            "would be sampled again; remove it"
        )


RECIPE = Recipe(
    name="distill",
    summary="learn from a teacher's distributions (starts under torchrun too)",
    main="llmtrain.recipes.distill:main",
    section=DistillConfig,
    rules=(usable_teachers, usable_servers, on_given_rows, beta_of_jsd, on_own_samples),
    same=(
        "distill.teacher.name",
        "distill.teacher.weight",
        "distill.teacher.model",
        "distill.on_policy",
        "distill.divergence",
        "distill.beta",
        "distill.top_k",
        "distill.temperature",
        "distill.estimate",
        "distill.prompts_per_step",
    ),
    starts_trained=True,
    passes=passes,
    other_models=frozen_teachers,
    weights=weights,
    variant=variant,
)
