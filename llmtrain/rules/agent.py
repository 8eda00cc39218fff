"""Checks the section `rollout.agent`. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

from llmtrain.config.agent import AgentConfig
from llmtrain.config.recipes import JUDGES
from llmtrain.rules.case import Case, Rules, here, samples

KEY = "rollout.agent"
OF_SERVER = ("starlette", "uvicorn")


def _there(case: Case) -> bool:
    """Holds where there is an agent."""
    return case.config.rollout.agent is not None


def _settings(case: Case) -> AgentConfig:
    assert case.config.rollout.agent is not None
    return case.config.rollout.agent


def _one_program(case: Case) -> Iterator[str]:
    a = _settings(case)
    if a.function is None and not a.command:
        yield f"{KEY}: must name a program; set function, such as my_agent.py:run, or command"
    if a.function is not None and a.command:
        yield f"{KEY}.command={a.command}: not together with function; remove one of them"


def _program_here(case: Case) -> Iterator[str]:
    a = _settings(case)
    if a.file is not None and not os.path.isfile(a.file):
        yield f"{KEY}.function={a.function}: {a.file} is no file here; correct the path"
    if case.config.rollout.replay is not None:  # nothing of it runs; what its file holds is compared with the record's
        return
    if a.command and shutil.which(a.command[0]) is None:
        yield f"{KEY}.command={a.command}: {a.command[0]} is no program here; correct the path"
    if a.function is not None and a.python is not None and shutil.which(a.python) is None:
        yield f"{KEY}.python={a.python}: does not exist; correct it (launch/verifiers.sh makes .venv-verifiers)"


def _function_alone(case: Case) -> Iterator[str]:
    a = _settings(case)
    for name in ("args", "python") if a.function is None else ():
        if (value := getattr(a, name)) is not None:
            yield f"{KEY}.{name}={value}: is read with function alone; remove it"


def _server(case: Case) -> Iterator[str]:
    if case.config.rollout.replay is None and (missing := [name for name in OF_SERVER if find_spec(name) is None]):
        yield f"{KEY}: needs {' and '.join(missing)}, not installed; pip install -e '.[serve]' -c constraints.txt"


def _trains(case: Case) -> Iterator[str]:
    recipe = case.recipe
    if case.command in ("eval", *JUDGES) or (recipe is not None and recipe.samples and not recipe.judged):
        yield f"{KEY}: not in {case.command}, which rewards no samples to train on them; remove it"


def _alone(case: Case) -> Iterator[str]:
    if case.config.rollout.router_replay:
        yield f"rollout.router_replay=true: not with {KEY}, whose server records no experts; remove one of them"
    if case.config.rollout.environment is not None:
        yield f"{KEY}: not together with rollout.environment: a program has its own; remove one of them"
    evaluation = case.config.eval
    if evaluation.every_steps and evaluation.problems and case.config.data.held_out is not None:
        yield (
            f"eval.problems={evaluation.problems}: measures single answers, and with {KEY} a row is no prompt; remove "
            "data.held_out, and set eval.every_steps=0 where it would measure no text either (data.path)"
        )


def _in_workers(case: Case) -> Iterator[str]:
    r, a = case.config.rollout, _settings(case)
    if r.placement != "ahead" or r.replay is not None:
        return
    if r.inflight == "restart":
        yield f"rollout.inflight=restart: not with {KEY}, whose runs may have done something; set finish, or continue"
    runs = r.prompts_at_once * r.group_size
    rounds = math.ceil(runs / a.processes)
    most_s = rounds * a.deadline_s
    if most_s >= r.deadline_s:
        yield (
            f"{KEY}.deadline_s={a.deadline_s:g}: a worker is given {runs} runs at once, which {a.processes} processes "
            f"play in {rounds} rounds, {most_s:g} s at most; after rollout.deadline_s={r.deadline_s:g} it is killed; "
            f"set rollout.deadline_s above {most_s:g}, or lower this one"
        )


AGENT_RULES: Rules = (
    (_there, _one_program),
    (_there, _function_alone),
    (here(_there), _program_here),
    (here(_there), _server),
    (_there, _trains),
    (_there, _alone),
    (lambda case: _there(case) and samples(case), _in_workers),
)
