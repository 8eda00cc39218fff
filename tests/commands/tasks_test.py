"""`llmtrain eval CONFIG --show` prints what the model would get; it needs no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.cli import main, usage
from tests.shared_data import shared_data

SHAPE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
SHAPE |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """Returns a directory with the shape of a model, and no weights."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path / "model"


def arguments(small: Path, shape: Path, tasks: str) -> list[str]:
    document = small.read_text().replace(small.read_text().partition("model:\n")[2].partition("\n")[0], "")
    small.write_text(document.replace("model:\n", f"model: {{init_from: {shape}}}\n"))
    run_dir = f"run_dir={small.parent}/run"
    return ["eval", str(small), run_dir, "eval.text=false", "eval.problems=0", f"eval.tasks={tasks}", "--show"]


def test_gsm8k_as_the_model_gets_it(small: Path, shape: Path, capsys: pytest.CaptureFixture) -> None:
    path = shared_data("gsm8k/test.jsonl")
    tasks = f"[{{task: gsm8k, data: {{path: {path}}}, limit: 100}}]"
    assert main(arguments(small, shape, tasks)) == 0
    text = capsys.readouterr().out
    assert text.startswith("== gsm8k: 100 problems, generate, few_shot 8, thinking worked, plain text\n")
    assert "\nQuestion: A shelf has 4 rows with 12 books each." in text and text.count("#### 39\n\nQuestion: ") == 2
    assert "How much in dollars does she make every day at the farmers' market?\nAnswer:\n-- answer: Janet" in text
    assert "problem 1 (" in text and f"{path}:2)" in text and "problem 2 (" not in text
    assert not (small.parent / "run").exists()


def test_without_tasks_there_is_nothing_to_show(small: Path, shape: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*arguments(small, shape, "[]"), "eval.text=true"]) == 2
    assert capsys.readouterr().err == (
        "eval.tasks: is empty, so --show has no prompts to show; name tasks, such as [gsm8k]\n"
    )
    assert "llmtrain eval CONFIG.yaml --show" in usage()


def test_rows_without_what_the_task_reads(small: Path, shape: Path, capsys: pytest.CaptureFixture) -> None:
    (small.parent / "rows.jsonl").write_text('{"frage": "1+1?"}\n{"frage": "2+2?"}\n')
    tasks = f"[{{task: gsm8k, data: {{path: {small.parent}/rows.jsonl}}}}]"
    assert main(arguments(small, shape, tasks)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[1].startswith(f"{small.parent}/rows.jsonl:2: task gsm8k: ")
    assert "reads question; found" in lines[0] and "frage" in lines[0]


def test_answers_that_cannot_be_scored_come_before_weights(
    small: Path, shape: Path, capsys: pytest.CaptureFixture
) -> None:
    """Those of the second task too: the first one may take hours."""
    (small.parent / "rows.jsonl").write_text('{"question": "1+1?", "answer": [2]}\n')
    own = f"{{name: own, data: {{path: {small.parent}/rows.jsonl}}, prompt: x, score: exact, extract: whole}}"
    assert main(arguments(small, shape, f"[gcd, {own}]")[:-1]) == 2
    assert f"{small.parent}/rows.jsonl:1: task own: the answer [2] is no number or text" in capsys.readouterr().err
