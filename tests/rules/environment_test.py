"""The rules of `rollout.environment`: broken once, each says value, rule and remedy; kept, it is silent."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmtrain.config.load import ConfigError, load
from llmtrain.rules.check import violations

OWN = str(Path(__file__).parents[1] / "envs" / "own.py")


def lines(folder: Path, command: str, environment: str, *overrides: str) -> list[str]:
    """Returns the violations that speak of the environment."""
    path = folder / "x.yaml"
    path.write_text(
        f"model: {{init_from: {folder}}}\ntokenizer: {{path: {folder}}}\ndata: {{train: {__file__}}}\n"
        f"rollout: {{environment: {environment}}}\n"
    )
    found = violations(load(str(path), list(overrides)), 1, command)
    return [line for line in found if "environment" in line or line.startswith("rewards=")]


@pytest.mark.parametrize(
    ("command", "environment", "line"),
    [
        (
            "grpo",
            "{}",
            "rollout.environment: must name what the policy talks to; set one of tools, such as .calculator.",
        ),
        ("grpo", "{tools: [python], game: nim}", "rollout.environment.game=nim: not together with tools; remove one"),
        (
            "grpo",
            "{tools: [python], rewritten: new_row, keep_thinking: true}",
            "rollout.environment.rewritten=new_row: begins a row where the template drops a thought, .* remove one of",
        ),
        ("grpo", "{tools: [search]}", "rollout.environment.tools=search: needs a store; set .*search.store to one"),
        ("grpo", "{tools: [search], search: {store: gone}}", "rollout.environment.search.store=gone: does not exist"),
        (
            "grpo",
            "{tools: [python], search: {store: .}}",
            "rollout.environment.search: is read by the tool search",
        ),
        ("grpo", "{tools: [python], web: {hosts: [a.org]}}", "rollout.environment.web: is read by the tools fetch and"),
        ("grpo", "{tools: [fetch]}", "rollout.environment.web.hosts: must list what fetch may reach; set it"),
        (
            "grpo",
            "{tools: [web_search], web: {hosts: [a.org]}}",
            "rollout.environment.web.endpoint: must be set for",
        ),
        (
            "grpo",
            "{tools: [web_search], web: {hosts: ['*.b.org'], endpoint: 'https://a.org/s?q={query}'}}",
            "web.endpoint: a.org is not in rollout.environment.web.hosts, so .* add it there",
        ),
        (
            "grpo",
            "{tools: [web_search], web: {hosts: [a.org], endpoint: 'http://a.org:8080/s?q={query}'}}",
            "web.endpoint: a.org:8080 is not in rollout.environment.web.hosts",
        ),
        (
            "grpo",
            "{tools: [web_search], web: {hosts: [a.org], endpoint: 'http://a.org:99999/s?q={query}'}}",
            "web.endpoint=http://a.org:99999/.*: is no URL .*; correct it",
        ),
        (
            "grpo",
            "{tools: [fetch], web: {hosts: [a.org], k: 2}}",
            "rollout.environment.web.k=2: is read by the tool web_search alone; add it to .*tools, or remove it",
        ),
        ("grpo", "{tools: [python, python]}", "rollout.environment.tools: python stands there twice; remove one"),
        ("raft", "{game: nim, calls: plain}", "rollout.environment.calls=plain: is read with .*tools alone; remove it"),
        (
            "ppo",
            "{tools: [python], unsandboxed: true}",
            "unsandboxed=true: only an environment of your own may run out",
        ),
        (
            "grpo",
            "{tools: [python], args: {a: 1}}",
            "rollout.environment.args=.*: are those of rollout.environment.game, or",
        ),
        ("grpo", f"{{function: '{OWN}:Guess'}}", "say that you trust it with rollout.environment.unsandboxed=true"),
        (
            "grpo",
            "{function: 'no.py:A', unsandboxed: true}",
            "function=no.py:A: no.py is no file here; correct the path",
        ),
        ("grpo", "{mcp: [{name: f, command: [x]}]}", "mcp.f: is a program that .*environment.mcp.f.unsandboxed=true"),
        ("grpo", "{mcp: [{name: f, command: [x], unsandboxed: true}], game: nim}", "game=nim: not together with tools"),
        (
            "grpo",
            "{mcp: [{name: f, command: [x], unsandboxed: true}, {name: f, command: [y], unsandboxed: true}]}",
            "rollout.environment.mcp: f is the name of two servers; give one another",
        ),
        ("judge", "{tools: [python]}", "rollout.environment: not in judge, which compares single answers; remove it"),
        ("constitutional", "{tools: [python]}", "rollout.environment: not in constitutional, which compares single"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, command: str, environment: str, line: str) -> None:
    found = lines(tmp_path, command, environment)
    assert len(found) == 1 and re.search(line, found[0])


def test_what_can_work_is_not(tmp_path: Path) -> None:
    assert not lines(tmp_path, "grpo", "{game: nim, args: {note_moves: true}}", "rewards=[]")
    for command in ("grpo", "raft", "ppo", "eval", "sft"):
        assert not lines(tmp_path, command, "{tools: [calculator, python], calls: plain, results: user}")
        assert not lines(tmp_path, command, f"{{function: '{OWN}:Guess', unsandboxed: true, args: {{most: 3}}}}")


def test_an_endpoint_that_is_listed(tmp_path: Path) -> None:
    for host, endpoint in (
        ("a.org", "https://A.org/s"),
        ("'*.a.org'", "http://b.a.org"),
        ("'[::1]:81'", "http://[::1]:81"),
    ):
        web = f"{{hosts: [{host}], endpoint: '{endpoint}?q={{query}}'}}"
        assert not lines(tmp_path, "grpo", f"{{tools: [web_search], web: {web}}}", "rewards=[{name: math}]")


def test_other_keys_beside_an_environment(tmp_path: Path) -> None:
    (line,) = lines(tmp_path, "grpo", "{tools: [python]}", "grpo.overlong_buffer=9")
    assert re.search("grpo.overlong_buffer=9: measures one completion.*set it to 0", line)
    (line,) = lines(tmp_path, "eval", "{tools: [python]}", "eval.test_time={}")
    assert line == "rollout.environment: not with eval.test_time, which goes on with single answers; remove one of them"


def test_who_rewards(tmp_path: Path) -> None:
    """Tools reward nothing by themselves; a game or an environment of one's own does."""
    assert lines(tmp_path, "grpo", "{tools: [python]}", "rewards=[]")[0].startswith(
        "rewards=[]: must name at least one"
    )
    assert not lines(tmp_path, "grpo", "{game: nim}", "rewards=[]")
    own = f"{{function: '{OWN}:Guess', unsandboxed: true}}"
    assert not lines(tmp_path, "grpo", own, "rewards=[]")
    assert not lines(tmp_path, "eval", own, "rewards=[]")
    for environment, command in (("{tools: [python]}", "eval"), (own, "judge")):
        found = lines(tmp_path, command, environment, "rewards=[]")
        assert any(line.startswith("rewards=[]: must name at least one") for line in found)
    beside = ["eval.every_steps=2", f"data.held_out={OWN}"]
    for command, keys in (("eval", []), ("grpo", beside)):
        (line,) = lines(tmp_path, command, "{game: nim}", "rewards=[]", *keys)
        assert line.startswith("rollout.environment.game=nim: the policy plays all sides")


@pytest.mark.parametrize("value", ["{tools: [abacus]}", "{function: own.Guess}", "{max_turns: 0}", "{turns: 3}"])
def test_wrong_values(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout.environment"):
        lines(tmp_path, "grpo", value)
