"""Checks rollout.router_replay. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.arch.families import family_of
from llmtrain.rules.case import Case, Rules, plans

KEY = "rollout.router_replay=true"


def _replay(case: Case) -> Iterator[str]:
    if not case.config.rollout.router_replay or case.model is None:
        return
    if case.model.moe is None:
        yield f"{KEY}: needs experts, and the model has none; set it to false or choose a model with model.moe"
    elif family_of(case.model.family).parts:
        yield f"{KEY}: not with model.family={case.model.family}, whose layers are its own code; set it to false"
    r = case.config.rollout
    if r.generator != "native":
        yield f"{KEY}: not with rollout.generator={r.generator}, which tells no experts; use native, or set it to false"
    if r.placement == "ahead":
        yield f"{KEY}: not with rollout.placement=ahead, whose experts are those of older weights; set it to false"
    if r.environment is not None:
        yield f"{KEY}: not with rollout.environment, which keeps of a turn its tokens alone; set it to false"


REPLAY_RULES: Rules = ((plans, _replay),)
