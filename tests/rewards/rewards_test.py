"""The rewards of the package: what they read, and what becomes of an answer that hangs, raises or runs code."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llmtrain.rewards import Score, Scorer, extract_answer, format, math, reasoning, reward_fn
from llmtrain.rewards.scorer import pool_of

ENTRY = {"question": "54 + 77 =", "answer": "131", "metadata": {}}
EXAMPLE = {"source": "chain_sum", "entry": ENTRY, "answer": "131"}


def scorer(name: str, deadline_s: float = 30.0) -> Scorer:
    return Scorer(name, pool_of(name, None, False), deadline_s)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (" 4+7=11 write 1 carry 1; 5+7+1=13; answer 131", "131", 1.0),
        (" answer 7; no, answer 131\n", "131", 1.0),
        (" answer 131, or so", "131, or so", 0.0),  # reasoning-gym gives part marks
        (" answer 13", "13", 0.0),
        (" answer ", None, 0.0),
        (" 131", None, 0.0),
        ("Answer: 131\n\nHope this helps!", "131", 1.0),
        ("**Answer:** 131", "131", 1.0),
        ("The final answer is 131", "131", 1.0),
        ("an answer in tags <answer>131</answer> of reasoning-gym", "131", 1.0),
        ("54 + 77 = 131\n#### 131\nThat is it.", "131", 1.0),
        ("so \\boxed{131}.", "131", 1.0),
    ],
)
def test_reasoning(completion: str, answer: str | None, reward: float) -> None:
    assert extract_answer("reasoning_gym", completion) == answer
    assert reward_fn("reasoning_gym")(completion, EXAMPLE) == reward


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("42.", "42", 1.0),
        ("is 42 or 7", "42", 1.0),
        ("7 42", "7", 0.0),
        ("x", None, 0.0),
        ("+42", "42", 1.0),
        ("42.0 km", "42", 1.0),
        ("42.5", None, 0.0),
        ("42/5", None, 0.0),
        ("42e3", None, 0.0),
        ("-42", "-42", 0.0),
        ("1,042", "1042", 0.0),
        ("4" * 2000, None, 0.0),
    ],
)
def test_first_integer(completion: str, answer: str | None, reward: float) -> None:
    assert extract_answer("first_integer", completion) == answer
    assert reward_fn("first_integer")(completion, {"answer": "42"}) == reward


@pytest.mark.parametrize("gold", ["1,234", 1234, 1234.0, " 1234", "+1234", "so 1,000+234 #### 1,234"])
def test_first_integer_reads_the_gold_as_people_write_it(gold: object) -> None:
    assert format.fault({"answer": gold}) is None
    assert format.score("1,234", {"answer": gold}) == format.score("1234.", {"answer": gold}) == 1.0


def test_first_integer_reads_a_unicode_minus() -> None:
    assert format.extract("so −5") == "-5" and format.fault({"answer": "−5"}) is None
    assert format.score("−5", {"answer": -5}) == format.score("-5", {"answer": "−5"}) == 1.0
    assert format.score("−5", {"answer": 5}) == format.score("5", {"answer": "−5"}) == 0.0


@pytest.mark.parametrize("gold", ["abc", "3/4", 5.5, "", None, True, [5], "5 or 6"])
def test_first_integer_refuses_other_golds(gold: object) -> None:
    assert "this reward reads integers alone" in format.fault({"answer": gold})
    assert "is missing" in format.fault({"question": "q"})


PAIRS = [  # (right answer, completion, what is read, reward)
    ("72", "48 + 24\nso 72.", "72", 1.0),
    ("a + b #### 1,200", "it is \\boxed{1200}", "1200", 1.0),
    ("\\frac{1}{2}", "of 12, 7 go: \\boxed{0.5}", "1/2", 1.0),
    ("x^2-1", "\\boxed{(x-1)(x+1)}", "(x - 1)*(x + 1)", 1.0),
    ("7", "7 then\n8", "8", 0.0),
    ("8", "the final answer is 7. Wait,\n8", "8", 1.0),
    ("8", "\\boxed{7}\nno, \\boxed{8}", "8", 1.0),
    ("7", "", None, 0.0),
    # where the answer stands
    ("42", "2+40\n#### 42\nThat confirms it.", "42", 1.0),
    ("2", "Answer: 2\n\nHope this helps!", "2", 1.0),
    ("2", "**Final answer:** 2\n\nI checked 3 times.", "2", 1.0),
    ("2", "## Answer\n\n2\n\nLet me know.", "2", 1.0),
    ("2", "The answer is 2.\nHope this helps!", "2", 1.0),
    ("2", "#### Step 1\nadd\n#### Step 2\nso 2", "2", 1.0),
    ("5", "#### 4\nno, wait\n#### 5", "5", 1.0),
    ("5", "Answer: 4\nAnswer: \\boxed{5}", "5", 1.0),
    ("9", "The answer\n\\[\n 9 \n\\]", "9", 1.0),
    ("5", "The final answer is $5$. I hope it is correct.\nQuestion 2: what is 3 + 3?", "5", 1.0),
    ("18", "in all $\\boxed{\\$18}$.", "18", 1.0),
    # numbers
    ("1,234", "Answer: 1234", "1234", 1.0),
    ("1234", "so 1,234 in all", "1234", 1.0),
    ("1000", "\\boxed{1\\,000}", "1000", 1.0),
    ("1000000", "\\boxed{1{,}000{,}000}", "1000000", 1.0),
    ("1234", "1 234", "1234", 1.0),
    ("-5", "−5", "-5", 1.0),
    ("1500", "1.5e3", "1500", 1.0),
    ("1e6", "1000000", "1000000", 1.0),
    ("3.5", "3 1/2", "7/2", 1.0),
    ("3\\frac{1}{2}", "3½", "7/2", 1.0),
    ("5.0", "5", "5", 1.0),
    ("5", "5.00", "5.00000000000000", 1.0),
    ("1/2", "\\frac12", "1/2", 1.0),
    ("0.333", "1/3", "1/3", 0.0),
    ("123", "1,234", "1234", 0.0),
    # units and percent
    ("5", "5 km", "5", 1.0),
    ("5 km", "Answer: 5", "5", 1.0),
    ("5", "\\boxed{5\\text{ km}}", "5", 1.0),
    ("90", "90°", "90", 1.0),
    ("18", "She makes $18.00 a day.", "18.0000000000000", 1.0),
    ("72", "\\$72", "72", 1.0),
    ("50%", "50", "50", 1.0),
    ("50", "50 percent", "50*(1/100)", 1.0),
    ("0.5", "50%", "50*(1/100)", 1.0),
    ("0.5", "5%", "5*(1/100)", 0.0),
    # several values
    ("2,3", "\\boxed{2}, \\boxed{3}", "{2, 3}", 1.0),
    ("\\{2,3\\}", "so \\boxed{3} and \\boxed{2}", "{2, 3}", 1.0),
    ("2,3", "$\\boxed{2}$ or $\\boxed{3}$", "{2, 3}", 1.0),
    ("-2,1", "\\[ \\boxed{-2} \\quad \\text{and} \\quad \\boxed{1} \\]", "{-2, 1}", 1.0),
    ("2,3", "\\boxed{2}", "2", 0.0),
    ("(1,2)", "Answer: (1, 2)", "Interval.open(1, 2)", 1.0),
    # words and formulas
    ("B", "Answer: B", "b", 1.0),
    ("(B)", "Answer: (B)", "b", 1.0),
    ("B", "\\boxed{C}", "c", 0.0),
    ("B", "The answer is (B).", "b", 1.0),
    ("B", "The answer is B.", "b", 1.0),
    ("A", "The answer is B.", "b", 0.0),
    ("72", "<answer>72</answer>", "72", 1.0),
    # nothing is left out
    ("10", "Answer: 10^{-3}", "10**(-3)", 0.0),
    ("0.001", "Answer: 10^{-3}", "10**(-3)", 1.0),
    ("2", "Answer: 2π", "2*pi", 0.0),
    ("2\\pi", "Answer: 2π", "2*pi", 1.0),
    ("2", "Answer: 2x", "2*x", 0.0),
    ("2x", "Answer: 2x", "2*x", 1.0),
    ("5", "Answer: 5!", "factorial(5)", 0.0),
    ("120", "#### 5!", "factorial(5)", 1.0),
    ("5", "Answer: 5²", "5**2", 0.0),
    ("25", "5²", "5**2", 1.0),
    ("3", "Answer: x > 3", "x > 3", 0.0),
    ("5", "Answer: x = 5 metres. Good luck!", "5", 1.0),
    ("72", "Answer: She has $72.00 left.", "72.0000000000000", 1.0),
    ("2\\sqrt{3}", "2√3", "2*sqrt(3)", 1.0),
    ("7", "2 + 5 = 7", "7", 1.0),
]


@pytest.mark.parametrize(("gold", "completion", "answer", "reward"), PAIRS)
def test_math(gold: str, completion: str, answer: str | None, reward: float) -> None:
    assert math.fault({"answer": gold}) is None
    assert extract_answer("math", completion) == answer
    assert reward_fn("math")(completion, {"answer": gold}) == reward


@pytest.mark.parametrize("text", ["Answer: (B) Paris", "B) Paris", "**B.** Paris", "<answer>b</answer>"])
def test_math_reads_the_letter_of_an_option(text: str) -> None:
    assert [math.score(text, {"answer": gold}) for gold in ("B", "(B)", "A")] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("text", ["5 million", "5 or more", "at least 5", "5 (mod 7)", "5 xy", "minus 5"])
def test_math_does_not_read_a_number_that_words_change(text: str) -> None:
    assert math.score(f"Answer: {text}", {"answer": "5"}) == 0.0


def test_math_counts_equal_answers_together() -> None:
    completions = ["\\boxed{0.5}", "1/2", "no", "7", "\\boxed{x^2-1}", "$(x-1)(x+1)$", "50%"]
    assert scorer("math").classes(completions) == [0, 0, 1, 2, 3, 3, 0]
    assert scorer("first_integer").classes(["1,000", "1000.", "no", "7"]) == [0, 0, None, 1]


def test_math_works_in_a_thread() -> None:
    results: list[float] = []
    thread = threading.Thread(target=lambda: results.append(reward_fn("math")("72", {"answer": "72"})))
    thread.start()
    thread.join()
    assert results == [1.0]


def test_an_answer_that_hangs_is_an_error() -> None:
    assert reward_fn("math")("1", {"answer": "1"}) == 1.0
    began = time.monotonic()
    hangs = "\\boxed{9^{9^{9^9}}}"
    late, fine, same = scorer("math", 0.5).score([(hangs, {"answer": "72"}), ("72", {"answer": "72"}), (hangs, {})])
    assert late == Score(0.0, "took longer than 0.5 s") and same.value == 0.0
    assert time.monotonic() - began < 20  # math-verify alone would never end
    assert fine == Score(1.0)


def test_an_answer_that_a_scorer_cannot_read_is_an_error() -> None:
    entry = {"question": "q", "answer": "2 × 3", "metadata": {"factors": [2, 3]}}
    row = {"source": "prime_factorization", "entry": entry}
    (score,) = scorer("reasoning_gym").score([(" answer x", row)])
    assert score.value == 0.0 and score.error.startswith("ValueError: invalid literal for int()")


COUNTDOWN = {
    "source": "countdown",
    "entry": {"question": "q", "answer": "2*3", "metadata": {"target": 6, "numbers": [2, 3]}},
}
BINARY = {"source": "binary_matrix", "entry": {"question": "q", "answer": "0 1\n1 0", "metadata": {}}}
CODE = [
    "__import__('os').system('touch $')",
    "exec(\"open('$', 'w')\")",
    "open('$', 'w')",
    "eval('open' + '(\"$\", \"w\")')",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    'f\'{open("$", "w")}\'',
]


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("row", [COUNTDOWN, BINARY], ids=lambda row: row["source"])
def test_code_in_an_answer_does_nothing(code: str, row: dict, tmp_path: Path) -> None:
    code = code.replace("$", str(tmp_path / "pwned"))
    assert not reasoning.harmless(code, row["source"])
    assert reward_fn("reasoning_gym")(f" answer {code}", row) == 0.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("countdown", "(3 + 4) * 5 - 6/2"),
        ("puzzle24", "8*3 - 0"),
        ("simple_integration", "x**2/2 + 3*x + C"),
        ("intermediate_integration", "-sin(x) + exp(2*x)*log(x) + C"),
        ("polynomial_multiplication", "x**2*y + 3*Z"),
        ("string_insertion", "['A', 'B', 'D']"),
        ("number_sorting", "['1.5', '-2.0']"),
        ("number_sorting", "[1.5, -2e3]"),
        ("n_queens", "[['Q', '_'], ['_', \"Q\"]]"),
        ("spiral_matrix", "[1, 2, 3]"),
        ("leg_counting", "__import__('os')"),  # compared as text
    ],
)
def test_what_people_answer_is_harmless(source: str, answer: str) -> None:
    assert reasoning.harmless(answer, source)


@pytest.mark.slow  # 105 generators
def test_every_generator_scores_its_own_answer_as_without_a_sandbox() -> None:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    names = sorted(DATASETS.keys() - {"composite"})
    scoring = scorer("reasoning_gym", 60.0)
    scoring.start([names])
    rows = [{"source": name, "entry": reasoning_gym.create_dataset(name, size=1, seed=1)[0]} for name in names]
    rows = json.loads(json.dumps(rows))
    scores = scoring.score([(f"<answer>{row['entry']['answer']}</answer>", row) for row in rows])
    expected = [
        float(reasoning.scorer(row["source"])(answer=str(row["entry"]["answer"]).strip(), entry=row["entry"]) == 1.0)
        for row in rows
    ]
    assert [score.error for score in scores] == [None] * len(rows)
    assert [score.value for score in scores] == expected


def test_a_batch_takes_no_seconds() -> None:
    rewarding = scorer("math")
    pairs = [(f"so {i} apples", {"answer": str(i)}) for i in range(64)]
    rewarding.score(pairs[:2])
    began = time.process_time()
    assert rewarding.score(pairs) == [Score(1.0)] * 64
    assert time.process_time() - began < 2  # of this process; the workers share the machine


def test_workers_and_rewards_need_no_torch() -> None:
    source = "import sys, llmtrain.rewards; print(sorted({'torch', 'pydantic', 'sympy'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert told == "[]\n"
