"""Offers a calculator as a tool: exact arithmetic with numbers and + - * / // % ** ( )."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from llmtrain.envs.toolbox import Tool, ToolFault

MOST_CHARACTERS = 500  # of an expression
MOST_BITS = 4096  # of a numerator or denominator on the way: 1233 digits
MOST_EXPONENT = 1000  # of a number such as 1e9, either way
MOST_DEPTH = 50  # of brackets and signs
DIGITS = 12  # after which a fraction without an end is rounded

BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
WRITTEN = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**", ",": None, "=": None})


def calculate(arguments: Mapping[str, Any]) -> str:
    """Returns the value of an expression. Raises ToolFault for one that is no arithmetic, or whose numbers grow too
    large. `^` is a power; commas within numbers and a `=` at the end are overlooked. Example: "12,000 * 3 =" -> "36000"
    """
    text = arguments["expression"].strip().rstrip("= ").translate(WRITTEN)
    if len(text) > MOST_CHARACTERS:
        raise ToolFault(f"the expression is longer than {MOST_CHARACTERS} characters")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ToolFault(f"{text[:60]!r} is no arithmetic") from None
    return shown(value(tree.body, MOST_DEPTH, text))


def value(node: ast.expr, depth: int, text: str) -> Fraction:
    """Returns the exact value of a part of an expression."""
    if depth == 0:
        raise ToolFault("the expression has too many brackets")
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return exact(node, number, text)
        case ast.UnaryOp(op=op, operand=of) if type(op) in SIGNS:
            return SIGNS[type(op)](value(of, depth - 1, text))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY or isinstance(op, ast.Pow):
            return bounded(combined(op, value(left, depth - 1, text), value(right, depth - 1, text)))
    raise ToolFault("there may only be numbers and + - * / // % ** ( )")


def exact(node: ast.Constant, number: float, text: str) -> Fraction:
    """Returns a number as it is written: 0.1 is a tenth."""
    if isinstance(number, int):
        return bounded(Fraction(number))
    written = ast.get_source_segment(text, node).replace("_", "").lower()
    if abs(int(written.partition("e")[2] or 0)) > MOST_EXPONENT:
        raise ToolFault("the numbers grow too large")
    return bounded(Fraction(written))


def combined(op: ast.operator, a: Fraction, b: Fraction) -> Fraction:
    """Returns the value of an operation."""
    try:
        return power(a, b) if isinstance(op, ast.Pow) else BINARY[type(op)](a, b)
    except ZeroDivisionError:
        raise ToolFault("division by zero") from None


def power(a: Fraction, b: Fraction) -> Fraction:
    """Returns a ** b for a whole b. Its size is known before it is computed."""
    if b.denominator != 1:
        raise ToolFault("an exponent must be a whole number")
    if abs(a) != 1 and a and abs(b) * bits(a) > 2 * MOST_BITS:
        raise ToolFault("the numbers grow too large")
    return a ** (int(b) % 2 if abs(a) == 1 else int(b))


def bits(number: Fraction) -> int:
    """Returns the bits of the larger of numerator and denominator."""
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def bounded(number: Fraction) -> Fraction:
    """Returns the number. Raises ToolFault for one that is too large to go on with."""
    if bits(number) > MOST_BITS:
        raise ToolFault("the numbers grow too large")
    return number


def shown(number: Fraction) -> str:
    """Returns a number as a decimal, rounded to 12 digits behind the point."""
    if number.denominator == 1:
        return str(number.numerator)
    scaled = round(number * 10**DIGITS)  # half to even
    whole, rest = divmod(abs(scaled), 10**DIGITS)
    return f"{'-' if scaled < 0 else ''}{whole}.{rest:0{DIGITS}d}".rstrip("0").rstrip(".")


CALCULATOR = Tool(
    "calculator",
    "Computes an arithmetic expression exactly.",
    {"expression": {"type": "string", "description": "numbers and + - * / // % ** ( ), as in (12 + 3) * 4"}},
    calculate,
)
