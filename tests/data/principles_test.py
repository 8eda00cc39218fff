"""Principles and preferences: what is read, and what is refused with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from llmtrain.data.preferences import Preference, dialogue, preference, read_preferences
from llmtrain.data.principles import FIELDS, drawn, read_principles

ROOT = Path(__file__).parents[2]
OURS = ROOT / "configs" / "constitutional" / "principles.yaml"


def test_our_principles() -> None:
    found = read_principles(str(OURS))
    assert len(found) >= 12
    for name in FIELDS:
        assert len({getattr(principle, name) for principle in found}) == len(found)
    assert all("Which of the two answers" in principle.question for principle in found)
    draws = [drawn(found, 0, f"principle/{i}").name for i in range(300)]
    assert set(draws) == {principle.name for principle in found}
    assert draws == [drawn(found, 0, f"principle/{i}").name for i in range(300)]
    assert draws != [drawn(found, 1, f"principle/{i}").name for i in range(300)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "must be a list of principles, each with name, critique, revision, question"),
        ("[]", "must be a list of principles"),
        ("[", "is no YAML"),
        ("- x", "principle 1: must have name, critique, revision, question"),
        ("- {name: a, critique: b, revision: c}", "principle 1: question: must be a text; write it"),
        ("- {name: a, critique: b, revision: c, question: 3}", "principle 1: question: must be a text"),
        ("- {name: a, critique: b, revision: c, question: d, weight: 1}", "principle 1: unknown key 'weight'"),
        ("- {name: a, critique: b, revision: c, question: d}\n" * 2, "principle 2: name 'a' comes twice; rename one"),
    ],
)
def test_faults_of_principles(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError) as told:
        read_principles(str(tmp_path / "p.yaml"))
    assert str(told.value).startswith(f"{tmp_path}/p.yaml: ") and message in str(told.value)


BEFORE = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: and?\n\nAssistant:"
TURNS = [("user", "hi"), ("assistant", "yo"), ("user", "and?")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


def test_preferences_of_every_shape(tmp_path: Path) -> None:
    assert dialogue(f"{BEFORE} so\n\nit is") == [*MESSAGES, {"role": "assistant", "content": "so\n\nit is"}]
    assert preference({"chosen": f"{BEFORE} a", "rejected": f"{BEFORE} b"}) == Preference(MESSAGES, "a", "b")
    plain = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert preference(plain) == Preference([{"role": "user", "content": "p"}], "a", "b")
    assert preference({**plain, "prefill": "so "}) == Preference([{"role": "user", "content": "p"}], "so a", "so b")
    turns = {name: [*MESSAGES, {"role": "assistant", "content": name[0]}] for name in ("chosen", "rejected")}
    assert preference(turns) == Preference(MESSAGES, "c", "r")
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in (plain, turns))))
    assert len(read_preferences(str(path))) == 2
    path.write_bytes(gzip.compress(b'{"prompt": "p"}\n{"chosen": "a", "rejected": "b"}\n'))
    with pytest.raises(ValueError) as told:
        read_preferences(str(path))
    lines = str(told.value).splitlines()
    assert lines[0].endswith(":1: must have `chosen` and `rejected`; add them")
    assert "the row has no `prompt`, and its texts do not begin with a turn `Human:`" in lines[1]
