"""Checks the section `rollout.environment`. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator

from llmtrain.config.environment import EnvironmentConfig
from llmtrain.config.recipes import JUDGES
from llmtrain.rules.case import Case, Rules

KEY = "rollout.environment"
OF_TOOLS = ("calls", "results", "system", "result_characters", "deadline_s")  # read with `tools` alone


def _there(case: Case) -> bool:
    """Holds where there is an environment."""
    return case.config.rollout.environment is not None


def _settings(case: Case) -> EnvironmentConfig:
    assert case.config.rollout.environment is not None
    return case.config.rollout.environment


def _one_kind(case: Case) -> Iterator[str]:
    e = _settings(case)
    given = {"tools": e.tools or e.mcp, "game": e.game, "function": e.function}
    kinds = [name for name, value in given.items() if value]
    if not kinds:
        yield f"{KEY}: must name what the policy talks to; set one of tools, such as [calculator], game or function"
    if len(kinds) > 1:
        yield f"{KEY}.{kinds[1]}={getattr(e, kinds[1])}: not together with {kinds[0]}; remove one of them"
    if twice := sorted({name for name in e.tools if e.tools.count(name) > 1}):
        yield f"{KEY}.tools: {twice[0]} stands there twice; remove one"
    for name in OF_TOOLS if kinds and "tools" not in kinds else ():
        if getattr(e, name) != EnvironmentConfig.model_fields[name].default:
            yield f"{KEY}.{name}={getattr(e, name)}: is read with {KEY}.tools alone; remove it"


def _servers(case: Case) -> Iterator[str]:
    servers = _settings(case).mcp
    names = [server.name for server in servers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"{KEY}.mcp: {twice[0]} is the name of two servers; give one another"
    for server in servers:
        if not server.unsandboxed:
            yield (
                f"{KEY}.mcp.{server.name}: is a program that runs outside the sandbox, with all that you may do, on "
                f"arguments that a policy wrote; say that you trust it with {KEY}.mcp.{server.name}.unsandboxed=true"
            )


def _own_code(case: Case) -> Iterator[str]:
    e = _settings(case)
    if e.function is None:
        if e.unsandboxed:
            yield f"{KEY}.unsandboxed=true: only an environment of your own may run outside; remove it"
        if e.args:
            yield f"{KEY}.args={e.args}: are those of a class of your own, {KEY}.function; remove them"
        return
    if e.file is not None and not os.path.isfile(e.file):
        yield f"{KEY}.function={e.function}: {e.file} is no file here; correct the path"
    if not e.unsandboxed:
        yield (
            f"{KEY}.function={e.function}: it keeps state from turn to turn, so it runs outside the sandbox, with all "
            f"that you may do; say that you trust it with {KEY}.unsandboxed=true"
        )


def _single_answers(case: Case) -> Iterator[str]:
    yield f"{KEY}: not in {case.command}, which compares single answers; remove it"


def _test_time(case: Case) -> Iterator[str]:
    if case.config.eval.test_time is not None:
        yield f"{KEY}: not with eval.test_time, which goes on with single answers; remove one of them"


ENVIRONMENT_RULES: Rules = (
    (_there, _one_kind),
    (_there, _own_code),
    (_there, _servers),
    (lambda case: _there(case) and case.command in JUDGES, _single_answers),
    (lambda case: _there(case) and case.command == "eval", _test_time),
)
