from __future__ import annotations

import random
import re

import pytest

from llmtrain.data.arithmetic import arithmetic_documents, draw, is_held_out, show, value, worked

RNG = random.Random(0)


@pytest.mark.parametrize(
    ("first", "operator", "second", "text"),
    [
        (54, "+", 77, " 4+7=11 write 1 carry 1; 5+7+1=13; answer 131"),
        (42, "-", 25, " 2-5=-3 write 7 borrow 1; 4-2-1=1; answer 17"),
        (25, "-", 42, " flip; 2-5=-3 write 7 borrow 1; 4-2-1=1; answer -17"),
        (30, "-", 30, " 0-0=0 write 0 borrow 0; 3-3-0=0; answer 0"),
    ],
)
def test_the_worked_form(first: int, operator: str, second: int, text: str) -> None:
    assert worked([first, second], operator, 0.0, RNG) == text


@pytest.mark.parametrize("operator", "+-")
def test_worked_without_errors_ends_in_the_value(operator: str) -> None:
    for _ in range(500):
        terms = [RNG.randint(1, 12345), RNG.randint(1, 12345)]
        assert worked(terms, operator, 0.0, RNG).endswith(f"; answer {value(terms, [operator])}")


def test_errors_come_at_the_given_rate_and_are_carried_on() -> None:
    rng, right, trials = random.Random(1), 0, 4000
    for _ in range(trials):
        text = worked([rng.randint(10, 99), rng.randint(10, 99)], "+", 0.15, rng)
        low, high, result = map(int, re.findall(r"(?:=|answer )(\d+)", text))
        assert result == high * 10 + low % 10
        terms = re.fullmatch(r" (\d)\+(\d)=(\d+) .* (\d)\+(\d)\+(\d)=(\d+); answer \d+", text).groups()
        a, b, low_text, c, d, carry, high_text = map(int, terms)
        assert carry == low_text // 10
        right += low_text == a + b and high_text == c + d + carry
    assert right / trials == pytest.approx(0.85**2, abs=0.03)


def test_no_held_out_expression_appears_anywhere() -> None:
    text = "".join(arithmetic_documents(100, 0.5, random.Random(2)))
    pairs = re.findall(r"(?=(?<!\d)(\d+ [+-] \d+)(?!\d))", text)
    assert len(pairs) > 3000
    assert not [pair for pair in pairs if is_held_out(pair)]
    wholes = [re.split(r" =|:", line)[0] for line in text.splitlines()]
    assert not [whole for whole in wholes if is_held_out(whole)]


def test_about_an_eighth_is_held_out() -> None:
    pairs = [show([a, b], [o]) for a in range(10, 100) for b in range(10, 100) for o in "+-"]
    assert sum(map(is_held_out, pairs)) / len(pairs) == pytest.approx(1 / 8, abs=0.01)


def test_bare_lines_are_right_and_the_share_of_worked_ones_is_kept() -> None:
    lines = "".join(arithmetic_documents(50, 0.8, random.Random(3))).splitlines()
    bare = [line.split(" = ") for line in lines if " = " in line]
    assert len(bare) / len(lines) == pytest.approx(0.2, abs=0.03)
    assert all(eval(expression) == int(result) for expression, result in bare)


def test_draw_gives_the_asked_digits() -> None:
    terms, operators = draw(RNG, 3, (2, 2))
    assert len(operators) == 2
    assert all(10 <= x <= 99 for x in terms)
