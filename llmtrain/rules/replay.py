"""Checks rollout.router_replay. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.arch.families import family_of
from llmtrain.config.machine import has_gpu
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
    if r.generator == "vllm":
        yield from _served(case)
    if r.max_staleness:
        yield (
            f"{KEY}: not with rollout.max_staleness={r.max_staleness}, experts of older weights are not what rounding "
            "chose; set it to false, or max_staleness=0"
        )
    if r.environment is not None:
        yield f"{KEY}: not with rollout.environment, whose own tokens no generator has chosen for; set it to false"


def _served(case: Case) -> Iterator[str]:
    """Checks what a server can record, see `rollout/inside_vllm/llmtrain_experts.py`."""
    if not case.planned and has_gpu():
        yield f"{KEY}: not with rollout.generator=vllm and a GPU, where it was never tried; use native, or false"
    if case.model is not None and case.model.sliding_window is not None:
        yield (
            f"{KEY}: not with rollout.generator=vllm and model.sliding_window={case.model.sliding_window}, as a server "
            "keeps the experts of a token as long as its keys and values; use native, or false"
        )


REPLAY_RULES: Rules = ((samples, _replay),)
