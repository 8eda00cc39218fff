from __future__ import annotations

import pytest

from llmtrain.eval.tasks.answers import code_in, extractor, until_stop, without_thoughts

THINK = [("<think>", "</think>")]


@pytest.mark.parametrize(
    ("completion", "prompt", "left"),
    [
        ("<think>3? no</think>4", "", "4"),
        ("3? no</think>\n4", "Q<think>\n", "\n4"),
        ("<think>one</think>1<think>two</think>2", "", "2"),
        ("4 <think>but is it", "", "4 "),
        ("<think>never ends \\boxed{3}", "", ""),
        ("never ends \\boxed{3}", "Q<think>\n", ""),
        ("a <b> c", "", "a <b> c"),
        ("", "", ""),
    ],
)
def test_reasoning_is_left_out(completion: str, prompt: str, left: str) -> None:
    assert without_thoughts(completion, THINK, prompt) == left
    assert without_thoughts(completion, [], prompt) == completion


def test_other_marks() -> None:
    marks = [*THINK, ("[[", "]]")]
    assert without_thoughts("[[a]]<think>b</think>c", marks) == "c"


def test_stop_texts_are_left_out() -> None:
    assert (
        until_stop("4\nQ: 5\nB", ["B", "\nQ:"]) == "4" and until_stop("4", ["Q"]) == "4" and until_stop("4", []) == "4"
    )


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [
        ("boxed", "\\boxed{1} or rather \\boxed{\\frac{1}{2}}.", "\\boxed{\\frac{1}{2}}"),
        ("boxed", "it is 4", None),
        ("hashes", "#### 3\nno\n####  1,234 \nEnd", "1,234"),
        ("hashes", "#### Step 2", None),
        ("letter", "The answer is (B).", "B"),
        ("letter", "Not (A), I take (C) as it fits best", "C"),
        ("letter", "b", "B"),
        ("letter", "Bananas are yellow", None),
        ("number", "5 + 1,234 is 1,239. Done", "1239"),
        ("number", "from −5 to 1.5e3", "1.5e3"),
        ("number", "none", None),
        ("whole", "  x y \n", "x y"),
        ("whole", " \n", None),
        ("reward", "#### 4", "#### 4"),
    ],
)
def test_rules(rule: str, text: str, answer: str | None) -> None:
    assert extractor(rule, None, 5.0)(text) == answer


def test_regular_expressions() -> None:
    def read(pattern: str, text: str) -> str | None:
        return extractor("regex", pattern, 5.0)(text)

    assert read(r"so (\w+)", "so x, so y!") == "y"
    assert read(r"\d\d", "12 34 5") == "34"
    assert read(r"\d\d", "no") is None and read(r"(a)|b", "b") is None


def test_a_pattern_that_backtracks_has_a_deadline() -> None:
    with pytest.raises(TimeoutError):
        extractor("regex", r"(?:a|aa)+$", 0.05)("a" * 60 + "b")


def test_code() -> None:
    assert code_in("Here:\n```python\ndef f():\n    return 1\n```\nand\n```\nx = 2\n```\n") == "x = 2\n"
    assert code_in("```py\nx = 1\n") == "x = 1\n"  # cut off
    assert code_in("    return 1\n") == "    return 1\n"
