"""Generates sums and differences, bare or worked by columns; every eighth expression is held out."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

LINES = 40  # in a document
DIGITS = ((1, 1), (1, 2), (2, 2), (2, 2), (2, 2))  # fewest and most digits of a term in a bare line


def is_held_out(expression: str) -> bool:
    """Returns whether an expression is held out: one in eight, chosen by its crc32, the same for every seed."""
    return zlib.crc32(expression.encode()) % 8 == 0


def show(terms: list[int], operators: list[str]) -> str:
    """Returns the expression as text. Example: show([54, 77], ["+"]) == "54 + 77"."""
    return str(terms[0]) + "".join(f" {o} {x}" for o, x in zip(operators, terms[1:], strict=True))


def value(terms: list[int], operators: list[str]) -> int:
    """Returns the result of an expression. Example: value([54, 77], ["-"]) == -23."""
    return terms[0] + sum(x if o == "+" else -x for o, x in zip(operators, terms[1:], strict=True))


def slipped(number: int, error_rate: float, rng: random.Random) -> int:
    """Returns `number`, or with probability `error_rate` one that is off by 1 or 2."""
    return number + rng.choice((-2, -1, 1, 2)) if rng.random() < error_rate else number


def worked_sum(terms: list[int], error_rate: float, rng: random.Random) -> str:
    """Returns the written addition of `terms`, column by column.

    Example: 54 + 77 gives " 4+7=11 write 1 carry 1; 5+7+1=13; answer 131".
    """
    text, carry, result, columns = "", 0, 0, max(len(str(x)) for x in terms)
    for k in range(columns):
        digits = [x // 10**k % 10 for x in terms] + [carry] * (k > 0)
        total = max(0, slipped(sum(digits), error_rate, rng))
        carry, digit = divmod(total, 10) if k < columns - 1 else (0, total)
        result += digit * 10**k
        text += f" {'+'.join(map(str, digits))}={total}"
        text += f" write {digit} carry {carry};" if k < columns - 1 else ";"
    return f"{text} answer {result}"


def worked_difference(first: int, second: int, error_rate: float, rng: random.Random) -> str:
    """Returns the written subtraction, column by column; "flip" swaps the terms of a negative result.

    Example: 54 - 77 gives " flip; 7-4=3 write 3 borrow 0; 7-5-0=2; answer -23".
    """
    text, borrow, result = " flip;" if first < second else "", 0, 0
    large, small = max(first, second), min(first, second)
    columns = len(str(large))
    for k in range(columns):
        a, b = large // 10**k % 10, small // 10**k % 10
        total = slipped(a - b - borrow, error_rate, rng)
        text += f" {a}-{b}" + (f"-{borrow}" if k else "") + f"={total}"
        borrow = int(total < 0)
        result += total % 10 * 10**k
        text += f" write {total % 10} borrow {borrow};" if k < columns - 1 else ";"
    return f"{text} answer {'-' if first < second and result else ''}{result}"


def worked(terms: list[int], operator: str, error_rate: float, rng: random.Random) -> str:
    """Returns a sum of `terms`, or a difference of two, worked by columns from the lowest digit.

    With probability `error_rate` a column's result is off by 1 or 2, and the calculation continues with the wrong
    digit.
    """
    if operator == "+":
        return worked_sum(terms, error_rate, rng)
    return worked_difference(terms[0], terms[1], error_rate, rng)


def has_held_out(terms: list[int], operators: list[str]) -> bool:
    """Returns whether the expression, or a part of it, is held out."""
    ends = [(i, j) for i in range(len(operators)) for j in range(i + 1, len(operators) + 1)]
    return any(is_held_out(show(terms[i : j + 1], operators[i:j])) for i, j in ends)


def draw(rng: random.Random, num_terms: int, digits: tuple[int, int]) -> tuple[list[int], list[str]]:
    """Returns random terms and operators that contain no held-out expression."""
    while True:
        terms = [rng.randint(10 ** (digits[0] - 1), 10 ** digits[1] - 1) for _ in range(num_terms)]
        operators = [rng.choice("+-") for _ in range(num_terms - 1)]
        if not has_held_out(terms, operators):
            return terms, operators


def line(rng: random.Random, worked_share: float) -> str:
    """Returns one line, worked (of two terms) or bare (of two or three).

    Examples: "54 + 77: 4+7=11 write 1 carry 1; 5+7+1=13; answer 131" and "5 + 61 = 66".
    """
    if rng.random() < worked_share:
        terms, operators = draw(rng, 2, (2, 2))
        return f"{show(terms, operators)}:{worked(terms, operators[0], 0.0, rng)}\n"
    terms, operators = draw(rng, rng.choice((2, 2, 2, 3)), rng.choice(DIGITS))
    return f"{show(terms, operators)} = {value(terms, operators)}\n"


def arithmetic_documents(count: int, worked_share: float, rng: random.Random) -> Iterator[str]:
    """Yields `count` documents of 40 lines."""
    for _ in range(count):
        yield "".join(line(rng, worked_share) for _ in range(LINES))
