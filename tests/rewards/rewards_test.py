from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from llmtrain.rewards import extract_answer, math, math_worker, reward_fn

ENTRY = {"question": "54 + 77 =", "answer": "131", "metadata": {}}
EXAMPLE = {"source": "chain_sum", "entry": ENTRY, "answer": "131"}


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (" 4+7=11 write 1 carry 1; 5+7+1=13; answer 131", "131", 1.0),
        (" answer 7; no, answer 131\n", "131", 1.0),
        (" answer 131, or so", "131, or so", 0.0),  # reasoning-gym gives part marks
        (" answer 13", "13", 0.0),
        (" answer ", None, 0.0),
        (" 131", None, 0.0),
    ],
)
def test_reasoning(completion: str, answer: str | None, reward: float) -> None:
    assert extract_answer("reasoning_gym", completion) == answer
    assert reward_fn("reasoning_gym")(completion, EXAMPLE) == reward


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [("42.", "42", 1.0), ("is 42 or 7", "42", 1.0), ("7 42", "7", 0.0), ("x", None, 0.0)],
)
def test_first_integer(completion: str, answer: str | None, reward: float) -> None:
    assert extract_answer("first_integer", completion) == answer
    assert reward_fn("first_integer")(completion, {"answer": "42"}) == reward


@pytest.mark.parametrize(
    ("gold", "completion", "answer", "reward"),
    [
        ("72", "48 + 24\nso 72.", "72", 1.0),
        ("a + b #### 1,200", "it is \\boxed{1200}", "1200", 1.0),
        ("\\frac{1}{2}", "of 12, 7 go: \\boxed{0.5}", "1/2", 1.0),
        ("x^2-1", "\\boxed{(x-1)(x+1)}", "(x - 1)*(x + 1)", 1.0),
        ("7", "7 then\n8", "8", 0.0),
        ("8", "the final answer is 7. Wait,\n8", "8", 1.0),
        ("8", "\\boxed{7}\nno, \\boxed{8}", "8", 1.0),
        ("7", "", None, 0.0),
    ],
)
def test_math(gold: str, completion: str, answer: str | None, reward: float) -> None:
    assert extract_answer("math", completion) == answer
    assert reward_fn("math")(completion, {"answer": gold}) == reward


def test_math_works_in_a_thread() -> None:
    results: list[float] = []
    thread = threading.Thread(target=lambda: results.append(reward_fn("math")("72", {"answer": "72"})))
    thread.start()
    thread.join()
    assert results == [1.0]


def test_math_survives_an_answer_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reward_fn("math")("1", {"answer": "1"}) == 1.0
    monkeypatch.setattr(math, "DEADLINE_S", 0.5)
    begin = time.monotonic()
    assert reward_fn("math")("\\boxed{9^{9^{9^9}}}", {"answer": "72"}) == 0.0
    assert time.monotonic() - begin < 20  # math-verify alone would never end
    monkeypatch.undo()
    assert reward_fn("math")("72", {"answer": "72"}) == 1.0


def test_math_survives_a_dead_worker() -> None:
    math.worker().kill()
    math.worker().wait()
    assert reward_fn("math")("72", {"answer": "72"}) == 1.0


def test_math_without_its_library_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    math.stop()
    with pytest.raises(RuntimeError, match="pip install math-verify"):
        math.worker()
    monkeypatch.undo()
    assert math_worker.READY == "ready\n"
    assert reward_fn("math")("72", {"answer": "72"}) == 1.0
