"""The tool search: what a policy reads of a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.cli import main
from llmtrain.config.environment import EnvironmentConfig
from llmtrain.envs.build import environment_maker

pytest.importorskip("bm25s", reason="the extra `search` installs it")


@pytest.fixture
def store(tmp_path: Path) -> str:
    rows = [
        {"text": "Oslo is in Norway.", "id": "oslo"},
        {"text": "Oslo has trams; Bergen has more rain.", "metadata": {"url": "https://a.org/bergen"}, "id": "bergen"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents = f"[{{path: {tmp_path}/rows.jsonl, id_field: id}}]"
    (tmp_path / "index.yaml").write_text(f"run_dir: {tmp_path}\nindex: {{documents: {documents}}}\n")
    assert main(["index", str(tmp_path / "index.yaml")]) == 0
    return str(tmp_path / "store")


def test_an_episode_that_searches(store: str) -> None:
    section = {"tools": ["search"], "search": {"store": store, "k": 2}, "calls": "plain", "results": "user"}
    environment = environment_maker(EnvironmentConfig.model_validate(section))()
    environment.start({"prompt": "Where is Oslo?"})
    both = "[1] oslo\nOslo is in Norway.\n\n[2] https://a.org/bergen\nOslo has trams; Bergen has more rain."
    assert environment.step("search: oslo").messages == [{"role": "user", "content": both}]
    assert environment.step("search: rain").messages[0]["content"].startswith("[1] https://a.org/bergen\n")
    nothing = [environment.step(f"search:{words}").messages[0]["content"] for words in ("", " ?", " zebra", " \ud800")]
    assert nothing == ["nothing was found; try other words"] * 4
    assert environment.step(f"search: {'oslo ' * 100_000}").messages[0]["content"] == both  # a question is cut
    assert environment.step("Norway").done


def test_a_store_that_is_none(tmp_path: Path) -> None:
    section = {"tools": ["search"], "search": {"store": str(tmp_path)}}
    with pytest.raises(ValueError, match="is no store; make one with `llmtrain index`"):
        environment_maker(EnvironmentConfig.model_validate(section))
