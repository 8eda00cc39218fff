"""Checks the section `rollout.environment`. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from urllib.parse import urlsplit

from llmtrain.config.environment import ALL_SIDES, EnvironmentConfig
from llmtrain.config.recipes import JUDGES
from llmtrain.config.retrieval import PORTS, WebConfig, allows
from llmtrain.rules.case import Case, Rules, evaluates_problems
from llmtrain.rules.index import store_faults

KEY = "rollout.environment"
OF_SEARCH = ("endpoint", "token_env", "results", "fields", "k")  # of web: read by web_search alone
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


def _search(case: Case) -> Iterator[str]:
    e = _settings(case)
    if "search" not in e.tools:
        if e.search is not None:
            yield f"{KEY}.search: is read by the tool search alone; add it to {KEY}.tools, or remove the section"
        return
    if e.search is None:
        yield f"{KEY}.tools=search: needs a store; set {KEY}.search.store to one that `llmtrain index` made"
        return
    yield from store_faults(case, f"{KEY}.search", e.search)


def _web(case: Case) -> Iterator[str]:
    e = _settings(case)
    using = [name for name in ("fetch", "web_search") if name in e.tools]
    if not using:
        if e.web is not None:
            yield f"{KEY}.web: is read by the tools fetch and web_search alone; name one, or remove the section"
        return
    if e.web is None or not e.web.hosts:
        yield f"{KEY}.web.hosts: must list what {' and '.join(using)} may reach; set it, such as [en.wikipedia.org]"
    for name in OF_SEARCH if e.web is not None and "web_search" not in using else ():
        if (value := getattr(e.web, name)) != getattr(WebConfig(), name):
            yield f"{KEY}.web.{name}={value}: is read by the tool web_search alone; add it to {KEY}.tools, or remove it"
    if "fetch" in using and not case.planned and (find_spec("trafilatura") is None or find_spec("datatrove") is None):
        yield f"{KEY}.tools=fetch: reads pages with the extra `data`; pip install 'llmtrain[data]' -c constraints.txt"
    if "web_search" in using and (e.web is None or e.web.endpoint is None):
        yield f"{KEY}.web.endpoint: must be set for web_search; give a URL that answers JSON, with {{query}} in it"
    elif "web_search" in using and e.web.hosts:
        yield from _endpoint(e.web)


def _endpoint(web: WebConfig) -> Iterator[str]:
    """Yields a line where the list of hosts does not allow the search engine itself."""
    parts = urlsplit(web.endpoint or "")
    host = (parts.hostname or "").rstrip(".")
    if "{" in host:  # the question names the host, so each call tells
        return
    try:
        port, ascii_ = parts.port or PORTS[parts.scheme], host if host.isascii() else host.encode("idna").decode()
    except ValueError as error:
        yield f"{KEY}.web.endpoint={web.endpoint}: is no URL ({error}); correct it"
        return
    if not allows(web.hosts, ascii_, port):
        named = host if parts.port is None else f"{host}:{port}"
        yield f"{KEY}.web.endpoint: {named} is not in {KEY}.web.hosts, so no search could be asked; add it there"


def _own_code(case: Case) -> Iterator[str]:
    e = _settings(case)
    if e.function is None:
        if e.unsandboxed:
            yield f"{KEY}.unsandboxed=true: only an environment of your own may run outside; remove it"
        if e.args and e.game is None:
            yield f"{KEY}.args={e.args}: are those of {KEY}.game, or of a class of your own; remove them"
        return
    if e.file is not None and not case.planned and not os.path.isfile(e.file):
        yield f"{KEY}.function={e.function}: {e.file} is no file here; correct the path"
    if not e.unsandboxed:
        yield (
            f"{KEY}.function={e.function}: it keeps state from turn to turn, so it runs outside the sandbox, with all "
            f"that you may do; say that you trust it with {KEY}.unsandboxed=true"
        )


def _rewritten(case: Case) -> Iterator[str]:
    e = _settings(case)
    if e.rewritten == "new_row" and e.keep_thinking:
        yield (
            f"{KEY}.rewritten=new_row: begins a row where the template drops a thought, and keep_thinking=true keeps "
            "it in the row that there is; remove one of them"
        )


def _single_answers(case: Case) -> Iterator[str]:
    yield f"{KEY}: not in {case.command}, which compares single answers; remove it"


def _test_time(case: Case) -> Iterator[str]:
    if case.config.eval.test_time is not None:
        yield f"{KEY}: not with eval.test_time, which goes on with single answers; remove one of them"


def _one_winner(case: Case) -> Iterator[str]:
    if (game := _settings(case).game) is not None:
        yield f"{KEY}.game={game}: {ALL_SIDES}"


ENVIRONMENT_RULES: Rules = (
    (_there, _one_kind),
    (_there, _search),
    (_there, _web),
    (_there, _own_code),
    (_there, _servers),
    (_there, _rewritten),
    (lambda case: _there(case) and case.command in JUDGES, _single_answers),
    (lambda case: _there(case) and case.command == "eval", _test_time),
    (lambda case: _there(case) and evaluates_problems(case), _one_winner),
)
