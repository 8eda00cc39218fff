"""The rules of `rollout.agent`: broken once, each says value, rule and remedy; kept, it is silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.load import ConfigError, load
from llmtrain.rules import agent
from llmtrain.rules.check import violations

OWN = str(Path(__file__).parents[1] / "envs" / "agent_failing.py")
GOOD = f"{{function: '{OWN}:fails'}}"
AHEAD = ("rollout.placement=ahead", "rollout.workers=1", "rollout.max_staleness=1", "rollout.verify=off")


def lines(folder: Path, command: str, settings: str, *overrides: str) -> list[str]:
    """Returns the violations that speak of the agent."""
    path = folder / "x.yaml"
    path.write_text(
        f"model: {{init_from: {folder}}}\ntokenizer: {{path: {folder}}}\ndata: {{train: {__file__}}}\nrewards: []\n"
        f"rollout: {{agent: {settings}}}\n"
    )
    found = violations(load(str(path), list(overrides)), 1, command)
    return [line for line in found if "agent" in line or line.startswith("rewards=")]


@pytest.mark.parametrize(
    ("command", "settings", "overrides", "line"),
    [
        ("grpo", "{}", (), "rollout.agent: must name a program; set function, such as my_agent.py:run, or command"),
        ("grpo", f"{{function: '{OWN}:fails', command: [bash]}}", (), "rollout.agent.command=['bash']: not together"),
        ("raft", "{function: 'no.py:run'}", (), "rollout.agent.function=no.py:run: no.py is no file here; correct"),
        ("ppo", "{command: [no-such-program]}", (), "rollout.agent.command=['no-such-program']: no-such-program is no"),
        ("grpo", "{command: [bash], args: {}}", (), "rollout.agent.args={}: is read with function alone; remove it"),
        ("grpo", "{command: [bash], python: x}", (), "rollout.agent.python=x: is read with function alone; remove it"),
        ("grpo", f"{GOOD[:-1]}, python: no/py}}", (), "rollout.agent.python=no/py: does not exist; correct it (launch"),
        ("judge", GOOD, ("rewards=[{name: math}]",), "rollout.agent: not in judge, which rewards no samples to train"),
        (
            "distill",
            GOOD,
            ("distill.on_policy=true",),
            "rollout.agent: not in distill, which rewards no samples to train on them; remove it",
        ),
        ("grpo", GOOD, ("rollout.environment={game: nim}",), "rollout.agent: not together with rollout.environment"),
        (
            "grpo",
            f"{GOOD[:-1]}, deadline_s: 200}}",
            (*AHEAD, "rollout.group_size=20"),
            "rollout.agent.deadline_s=200: a worker is given 20 runs at once, which 8 processes play in 3 rounds, 600 "
            "s at most; after rollout.deadline_s=600 it is killed; set rollout.deadline_s above 600, or lower this one",
        ),
        (
            "raft",
            GOOD,
            (*AHEAD, "rollout.inflight=restart"),
            "rollout.inflight=restart: not with rollout.agent, whose runs may have done something; set finish, or c",
        ),
        (
            "grpo",
            GOOD,
            ("rollout.router_replay=true",),
            "rollout.router_replay=true: not with rollout.agent, whose",
        ),
        ("grpo", GOOD, ("eval.every_steps=1", f"data.held_out={OWN}"), "eval.problems=256: measures single answers"),
        ("grpo", GOOD, ("grpo.overlong_buffer=9",), "grpo.overlong_buffer=9: measures one completion, and rollout.ag"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, command: str, settings: str, overrides: tuple[str, ...], line: str
) -> None:
    found = lines(tmp_path, command, settings, *overrides)
    assert any(each.startswith(line) for each in found), found


def test_remedies_of_an_evaluation_lead_somewhere(tmp_path: Path) -> None:
    """The first line names data.held_out; without it, no line names it again."""
    path = tmp_path / "y.yaml"
    path.write_text(
        f"model: {{init_from: {tmp_path}}}\ntokenizer: {{path: {tmp_path}}}\ndata: {{train: {__file__}}}\n"
        f"rewards: []\nrollout: {{agent: {GOOD}}}\n"
    )

    def of_eval(*overrides: str) -> list[str]:
        return [line for line in violations(load(str(path), list(overrides)), 1, "grpo") if line.startswith("eval.")]

    (line,) = of_eval("eval.every_steps=1", f"data.held_out={OWN}")
    assert "remove data.held_out, and set eval.every_steps=0 where it would measure no text" in line
    (line,) = of_eval("eval.every_steps=1")
    assert line.endswith("has nothing to measure; set data.path for the held-out text there (eval.text), or 0")
    assert of_eval("eval.every_steps=1", f"data.path={tmp_path}") == of_eval("eval.every_steps=0") == []


def test_what_can_work_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("grpo", "ppo", "raft", "sft", "plan"):
        assert lines(tmp_path, command, GOOD) == []
    assert lines(tmp_path, "grpo", "{command: [bash, -c, 'exit 0']}") == []
    assert lines(tmp_path, "grpo", GOOD, "rollout.generator=vllm") == []
    assert lines(tmp_path, "grpo", GOOD, *AHEAD, "rollout.record=true") == []
    assert lines(tmp_path, "ppo", f"{GOOD[:-1]}, deadline_s: 199}}", *AHEAD, "rollout.group_size=20") == []
    assert lines(tmp_path, "grpo", GOOD, "data.curriculum={max_pass_rate: 0.9}") == []
    monkeypatch.setattr(agent, "find_spec", lambda name: None)
    expected = "rollout.agent: needs starlette and uvicorn, not installed; pip install -e '.[serve]' -c constraints.txt"
    assert lines(tmp_path, "grpo", GOOD) == [expected]
    python = f"{GOOD[:-1]}, python: no/py, deadline_s: 9999}}"
    assert lines(tmp_path, "grpo", python, *AHEAD, f"rollout.replay={tmp_path}") == []  # it runs nothing of it


def test_a_function_has_a_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.agent.function: value 'run': must be file.py:function or"):
        lines(tmp_path, "grpo", "{function: run}")
