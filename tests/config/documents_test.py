"""Every document under configs/ loads, passes its checks on the ranks it is for, can be planned, and dumps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmtrain.config.check import planned_stages, violations
from llmtrain.config.load import dump, load
from llmtrain.config.schema import Config, RunConfig
from llmtrain.scaling.plan import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted((ROOT / "configs").rglob("*.yaml"))
# The folder says which command a document is for; elsewhere a comment such as `# llmtrain data ...` does.
COMMANDS = ("data", "pretrain", "sft", "grpo", "eval")
MADE_FIRST = re.compile(r"does not exist; |has neither config.json .* nor config.yaml")  # by other commands


def command_of(path: Path) -> str:
    return path.parent.name if path.parent.name in COMMANDS else "plan"


def ranks_of(config: Config) -> int:
    p, rollout = config.parallel, config.rollout
    workers = rollout.workers if rollout.placement == "separate" else 0
    return p.pp * p.dp_replicate * max(1, p.dp_shard) * p.cp * p.tp + workers


def faults(path: Path) -> list[str]:
    config = load(str(path), [])
    if isinstance(config, RunConfig):
        stages = planned_stages(config)
        return [v for s, c, earlier in stages for v in violations(c, s.ranks, s.command, config.directory, earlier)]
    return violations(config, ranks_of(config), command_of(path))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_document_is_right(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [fault for fault in faults(path) if not MADE_FIRST.search(fault)] == []
    config = load(str(path), [])
    (tmp_path / "dump.yaml").write_text(dump(config))
    assert load(str(tmp_path / "dump.yaml"), []) == config
    main(config)
    assert capsys.readouterr().out


def test_there_are_documents() -> None:
    assert DOCUMENTS
