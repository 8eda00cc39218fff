"""Checks adapters (`model.lora`). Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.arch.adapters import target_names
from llmtrain.config.recipes import JUDGES
from llmtrain.rules.case import Case, Rules, command, plans, trains

OUTER = ("embed", "position_embed", "head", "lm_head")


def _base(case: Case) -> Iterator[str]:
    if case.config.model.lora is not None and case.config.model.init_from is None:
        yield (
            "model.lora: must have model.init_from, adapters are trained beside weights that are there; give their "
            "directory, or remove model.lora to train all weights"
        )


def _targets(case: Case) -> Iterator[str]:
    m = case.model
    if m is None or m.lora is None:
        return
    targets, known = m.lora.targets, target_names(m)
    choice = f"choose from {', '.join(known)}"
    if not targets:
        yield f"model.lora.targets=[]: must name a projection; {choice}"
    for name in dict.fromkeys(targets):
        if targets.count(name) > 1:
            yield f"model.lora.targets: {name} is named twice; remove one"
        if name in OUTER:
            yield f"model.lora.targets: {name} must not be one, embeddings and head have no adapters; {choice}"
        elif m.moe is not None and name in ("gate", "up", "down") and name not in known:
            yield f"model.lora.targets: {name} must not be one, experts are one tensor without adapters; {choice}"
        elif name == "router":
            yield f"model.lora.targets: {name} must not be one, who goes where stays as it was trained; {choice}"
        elif name not in known:
            yield f"model.lora.targets: {name} must be a projection of this model; {choice}"


def _balance(case: Case) -> Iterator[str]:
    m = case.model
    if m is not None and m.lora is not None and m.moe is not None and "bias" in m.moe.balance:
        yield (
            f"model.moe.balance={m.moe.balance}: must be none or aux with model.lora, biases stay with the weights as "
            "they are; set model.moe.balance=none"
        )


def _optimizer(case: Case) -> Iterator[str]:
    if case.config.model.lora is not None and case.config.optim.name == "muon":
        yield (
            "optim.name=muon: must be adamw with model.lora, Muon's orthogonal updates are meant for whole matrices, "
            "not for their factors; use adamw"
        )


def _after_training(case: Case) -> Iterator[str]:
    if case.config.model.lora is not None and not case.own_run:  # else `commands.weights` compares it with the run's
        yield (
            f"model.lora: is for training, {case.command} merges the adapters that the run in model.init_from has; "
            "remove it"
        )


def _peft(case: Case) -> Iterator[str]:
    if case.config.export.adapter and case.config.model.init_from is None:
        yield "model.init_from: must be set with export.adapter, which takes adapters from a run; give its directory"


LORA_RULES: Rules = (
    (trains, _base),
    (plans, _targets),
    (plans, _balance),
    (plans, _optimizer),
    (command("eval", "export", *JUDGES), _after_training),
    (command("export"), _peft),
)
