"""Checks the detector of mathematics on a labelled set: formulas of several forms, and what looks like them."""

import json
import time

import pytest

pytest.importorskip("datatrove")

from datatrove.data import Document

from llmtrain.config.clean.content import MathConfig
from llmtrain.config.clean.web import WordsConfig
from llmtrain.data.clean.math import make, math_score
from tests.shared_data import shared_data

MATH = [
    r"Let $f: X \to Y$ be a map and $x \in X$. Then $f(x) \in Y$, so the image of $f$ is a subset of $Y$.",
    r"The sum is \[ \sum_{k=1}^{n} k = \frac{n(n+1)}{2}, \] as one shows by induction on the number of terms.",
    r"\begin{align} a &= b + c \\ d &= e \end{align} follows at once from the definition of the product.",
    "<p>The roots are <math><mi>x</mi><mo>=</mo><mn>2</mn></math> and its negative.</p>",
    "Solve 2x + 3 = 7 for x. We subtract 3 from both sides: 2x = 4, so x = 4 / 2 = 2.",
    "We have ∀ε > 0 ∃δ > 0 such that |x − a| < δ ⇒ |f(x) − f(a)| < ε, which is continuity at a.",
    "Theorem. Every bounded sequence has a convergent subsequence. Proof. By the lemma on nested intervals.",
    "The area is πr² and the circumference 2πr, so their ratio is r/2 ≈ 1.5 for a circle with r = 3.",
    "If a quadratic polynomial has integer coefficients and its determinant is a square, both roots are rational.",
    "12 + 7 = 19, 19 - 4 = 15, 15 * 2 = 30 and 30 / 5 = 6. The answer is 6.",
    r"By Euler, $e^{i\pi} + 1 = 0$. This is a special case of $e^{ix} = \cos x + i \sin x$.",
    "The eigenvalues of a symmetric matrix are real, and its eigenvectors can be chosen perpendicular.",
    "f(x) = x^2 - 4x + 3 has its least value at x = 2, where the derivative 2x - 4 is zero.",
    r"Show that $n^2 \equiv 1 \pmod 8$ for every odd integer $n$.",
]
OTHER = [
    "The jacket costs $40, the shoes $120 and the hat $15, all in all about $175 before tax in most shops.",
    "He paid $5 for coffee and $3.50 for a bun; later she paid $20 for both of them at the bar.",
    r'path = "C:\alpha\beta\gamma"; pattern = re.compile("\\d+\\.\\s*\\w+"); print("\\theta\n\to\new")',
    'for i in range(10):\n    total += i * 2\n    x = total - 1\nprint(f"{x}: {total}")\nself.a_value = b_value + c',
    "In 2019 the town had 12,400 inhabitants, 3,100 of them younger than 18, and 14 schools with 220 teachers.",
    "The match ended 3-2 after the visitors had led 2-0; on 2024-05-06 they play again, from 18:30 to 20:15.",
    "Call us: +49 30 1234567 or write to the office, 10/12 Main Street, open 9-17, closed on 24/12.",
    "Ο Αλέξανδρος ήταν βασιλιάς της Μακεδονίας και ένας από τους πιο γνωστούς στρατηγούς της αρχαιότητας.",
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: rough winds do shake.",
    r"\documentclass{letter}\begin{document}\textbf{Dear Sir},\newline I write to you about \emph{your} letter.",
    "The band released its first album in 1987; the matrix of its vinyl is rare, and how much it costs varies.",
    "x = foo.bar(baz)\nif x == y and a <= b:\n    return {'key': value, 'other': [1, 2, 3]}\n# TODO: fix the log",
    "echo $HOME $PATH && export X=$Y; cp $SRC/*.txt $DST # copies files; see $1 and $2 in the manual",
    "Fill in $name$ and $street$, then print the $letter$ and post it.",
    "Add 2 cups of flour, 1/2 cup of sugar and 3 eggs; bake at 180 °C for 35-40 minutes; serves 4 to 6 people.",
    "",
    "\0 \U0001f600 \ud800 \u202e",
]


def test_the_labelled_set() -> None:
    found = {text for text in [*MATH, *OTHER] if math_score(text, 0.05) >= 0.5}
    missed, wrong = [text for text in MATH if text not in found], [text for text in OTHER if text in found]
    print(f"missed {len(missed)} of {len(MATH)}, wrong {len(wrong)} of {len(OTHER)}")
    assert not missed and not wrong


def test_the_score_is_the_formula() -> None:
    # one formula of 2 points and 9 words: 2 / (2 + 0.05 * 9 + 1)
    assert math_score("a b c d e f g $x=y$", 0.05) == pytest.approx(2 / (2 + 0.05 * 9 + 1))
    assert math_score("a b c d e f g $x=y$", 1.0) == pytest.approx(2 / 12)
    assert math_score("one 2 three 4", 0.05) == 0.0 == math_score("", 0.05)  # numbers alone are none


def test_the_score_is_kept_and_only_drops() -> None:
    for settings, text, expected in (
        (MathConfig(), OTHER[0], None),
        (MathConfig(only=True), OTHER[0], "no_math"),
        (MathConfig(only=True), MATH[0], None),
        (MathConfig(only=True, threshold=0.99), MATH[0], "no_math"),
    ):
        document = Document(text=text, id="0", metadata={})
        assert make(settings, WordsConfig())(document) == expected
        assert document.metadata["math"] == round(math_score(text, 0.05), 4)


def test_real_texts() -> None:
    import pydoc_data.topics as topics

    rows = [json.loads(line) for line in shared_data("gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()]
    play = shared_data("tinyshakespeare/input.txt").read_text(encoding="utf-8")
    texts = {
        "questions with answers": [f"{row['question']}\n{row['answer']}" for row in rows],
        "questions": [row["question"] for row in rows],
        "topics": list(topics.topics.values()),
        "plays": [play[i : i + 2000] for i in range(0, len(play), 2000)],
    }
    shares = {name: sum(math_score(text, 0.05) >= 0.5 for text in own) / len(own) for name, own in texts.items()}
    print(shares)
    assert shares["questions with answers"] > 0.9 and shares["topics"] < 0.05 and shares["plays"] == 0.0


def test_hostile_text_takes_linear_time() -> None:
    for unit in (
        "a",
        "$",
        "$a",
        "\\(",
        "\\[",
        "\\frac",
        "1+",
        "1 + 1 = ",
        "how many ",
        "x^",
        "∑",
        "0",
        "a_1",
        "<math ",
        "\n",
    ):
        start = time.process_time()
        math_score(unit * (50_000 // len(unit)), 0.05)
        assert time.process_time() - start < 1.0, unit
    assert math_score("word " * 200_000, 0.05) == 0.0
