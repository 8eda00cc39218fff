"""Task files: what is read, and what is refused with file, line and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.cli import main
from llmtrain.config.load import dump, load
from llmtrain.config.tasks import EvalTask, built_in_tasks, names_in, read_task

GOOD = """\
description: sums
data: {path: sums.jsonl}
prompt: "{{question}}"
few_shot: 1
examples: [{question: "1+1", answer: "2"}]
"""


def faults_of(tmp_path: Path, text: str, **keys: object) -> list[str]:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_task(EvalTask(file=str(tmp_path / "my.yaml"), **keys), "eval.tasks.0")
    return [line.replace(str(tmp_path) + "/", "") for line in str(caught.value).splitlines()]


def test_an_entry_is_laid_over_its_file(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(GOOD)
    task = read_task(EvalTask(file=str(tmp_path / "my.yaml"), few_shot=0, limit=3), "eval.tasks.0")
    assert (task.few_shot, task.limit, task.prompt, task.label) == (0, 3, "{{question}}", "my")
    assert task.data is not None and task.data.place == "sums.jsonl" and task.max_new_tokens == 512


def test_marks_of_reasoning_can_be_written_anywhere(small: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(GOOD + 'thoughts: [["<a>", "</a>"]]\n')
    assert read_task(EvalTask(file=str(tmp_path / "my.yaml")), "eval.tasks.0").thoughts == [["<a>", "</a>"]]
    entry = load(str(small), [f'eval.tasks=[{{file: {tmp_path}/my.yaml, thoughts: [["(", ")"]]}}]']).eval.tasks[0]
    assert read_task(entry, "eval.tasks.0").thoughts == [["(", ")"]]
    for marks in ('["<a>"]', '["", "</a>"]'):  # an empty one stands everywhere: no completion would have an answer
        assert faults_of(tmp_path, GOOD + f"thoughts: [{marks}]\n")[0].startswith("my.yaml:6: thoughts.0")


def test_all_built_in_files_are_whole() -> None:
    assert set(built_in_tasks()) >= {"gsm8k", "math500", "aime24", "aime25", "amc", "humaneval", "mgsm", "chain_sum"}
    places = {name: read_task(EvalTask(task=name), "").data for name in built_in_tasks()}
    assert places["gsm8k"].place == "openai/gsm8k:main:test" and places["mgsm"].place == "juletxara/mgsm:en:test"
    german = read_task(EvalTask(task="mgsm", language="de"), "")
    assert german.data.place == "juletxara/mgsm:de:test"
    assert len(read_task(EvalTask(task="gsm8k"), "").examples) == 8


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = 'prompts: "{{q}}"\nkind: generat\ndata: {path: a.jsonl, lines: 3}\nfew_shot: -1\nprompt: "{{q"\n'
    found = faults_of(tmp_path, text)
    assert [line.split(": ")[0] for line in found] == [f"my.yaml:{n}" for n in (3, 2, 5, 4, 1)]
    assert "did you mean prompt?" in found[4] and "must be one of 'generate' or 'options'" in found[1]
    assert "unknown key" in found[0] and "no valid Jinja" in found[2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"few_shot": 2}, "eval.tasks.0: few_shot=2: there are only 1 examples; lower it, or write more"),
        ({"thinking": "zero_shot"}, "eval.tasks.0: thinking=zero_shot: the prompt has no {{think}}"),
        ({"thinking": "worked", "few_shot": 0}, "thinking=worked: worked examples are shown with few_shot of 1"),
        ({"greedy": False}, "samples=0: nothing is generated with greedy: false"),
        ({"extract": "regex"}, "pattern: extract=regex needs a pattern"),
        ({"pattern": "x"}, "pattern: extract=reward reads no pattern"),
        ({"score": "code", "extract": "code"}, "program: score=code needs a program"),
        ({"score": "exact"}, "extract=reward: score=exact has no reading of its own"),
        ({"kind": "options", "samples": 4}, "samples=4: kind=options generates nothing"),
        ({"kind": "options", "extract": "letter"}, "extract=letter: kind=options generates nothing, and so does not"),
        ({"kind": "options", "choices": ["yes"]}, "choices: has one option"),
        ({"kind": "options", "option": "x"}, "option: has neither {{choice}} nor {{letter}}"),
        ({"system": "be brief"}, "system: only a chat has a system's turn"),
        (
            {"data": {"path": "a", "repo": "b/c"}},
            "data: must have one of path, repo and generator, and has path and repo",
        ),
        ({"data": {"repo": "b/c"}}, "data.repo=b/c: needs a split"),
        ({"data": {"path": "{language}.jsonl"}}, "data: has {language}, and no language is given"),
        ({"examples_from": {"path": "a"}}, "examples_from: and examples are given too"),
        ({"name": "a b"}, "name='a b': must be of letters"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path: Path, change: dict, told: str) -> None:
    found = faults_of(tmp_path, GOOD, **change)
    assert any(told in line for line in found), found


def test_unknown_tasks_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval.tasks.0: task 'gsm9k': .* did you mean gsm8k\?"):
        read_task(EvalTask(task="gsm9k"), "eval.tasks.0")
    with pytest.raises(ValueError, match=r"give one of them"):
        read_task(EvalTask(task="gsm8k", file="a.yaml"), "eval.tasks.0")
    with pytest.raises(ValueError, match=r"gone.yaml: cannot be read"):
        read_task(EvalTask(file="gone.yaml"), "eval.tasks.0")
    assert faults_of(tmp_path, GOOD + "task: gsm8k\n")[0].startswith("my.yaml:6: task: a task file names no other")
    assert "prompt: is missing" in faults_of(tmp_path, "data: {path: a.jsonl}\n")[0]


def test_entries_are_written_as_they_were(small: Path) -> None:
    """A default written out would replace what the file says."""
    given = "eval.tasks=[gsm8k, {file: my.yaml, data: {path: a.jsonl}, limit: 100}]"
    config = load(str(small), [given])
    small.with_name("again.yaml").write_text(dump(config))
    again = load(str(small.with_name("again.yaml")), [])
    assert again.eval == config.eval and again.eval.tasks[0].model_fields_set == {"task"}
    assert "max_new_tokens: 512" not in dump(config)


def test_wrong_entries_in_a_document(small: Path, capsys: pytest.CaptureFixture) -> None:
    small.write_text(small.read_text() + "eval:\n  text: false\n  tasks:\n    - {task: gsm8k, few_shots: 2}\n")
    assert main(["eval", str(small)]) == 2
    line = capsys.readouterr().err.strip()
    assert line.endswith("eval.tasks.0.few_shots: unknown key, did you mean eval.tasks.0.few_shot?")
    assert ":18: " in line


def test_data_that_is_not_here(small: Path, capsys: pytest.CaptureFixture) -> None:
    tasks = "[gsm8k, {task: gsm8k, data: {path: gone.jsonl}}, {task: chain_sum, few_shot: 300}]"
    assert main(["eval", str(small), "eval.text=false", "eval.problems=0", f"eval.tasks={tasks}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "eval.tasks.0.data.repo=openai/gsm8k: is on the hub, and eval.hub is false" in lines[1]
    assert "eval.tasks.1.data.path=gone.jsonl: does not exist" in lines[2]
    assert "eval.tasks: two are called 'gsm8k'" in lines[3]
    assert lines[0].startswith("model.init_from: must be set")


def test_an_evaluation_of_nothing_is_refused(small: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["eval", str(small), "model.init_from=x", "eval.text=false", "eval.problems=0"]) == 2
    assert "nothing is measured; name one" in capsys.readouterr().err


def test_names_of_a_template() -> None:
    assert names_in("{{question}} {% if think %}{{ think | upper }}{% endif %}") == {"question", "think"}
