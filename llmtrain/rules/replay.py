"""Checks rollout.router_replay. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.arch.families import family_of
from llmtrain.rules.case import Case, Rules, samples

KEY = "rollout.router_replay=true"


def _replay(case: Case) -> Iterator[str]:
    r, m = case.config.rollout, case.model
    if not r.router_replay:
        return
    if m is not None and m.moe is None:
        yield f"{KEY}: needs experts, and the model has none; set it to false or choose a model with model.moe"
    elif m is not None and family_of(m.family).parts:
        yield f"{KEY}: not with model.family={m.family}, whose layers are its own code; set it to false"
    if r.generator != "native":
        yield f"{KEY}: not with rollout.generator={r.generator}, which records no experts; use native, or false"
    if r.max_staleness:
        yield (
            f"{KEY}: not with rollout.max_staleness={r.max_staleness}, experts of older weights are not what rounding "
            "chose; set it to false, or max_staleness=0"
        )
    if r.environment is not None:
        yield f"{KEY}: not with rollout.environment, whose own tokens no generator has chosen for; set it to false"


REPLAY_RULES: Rules = ((samples, _replay),)
