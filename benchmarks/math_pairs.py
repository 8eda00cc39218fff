"""Counts on how many pairs of texts in math-verify's own tests the reward `math` agrees with them, and math-verify
called with its defaults.

    git clone https://github.com/huggingface/Math-Verify; python -m benchmarks.math_pairs Math-Verify/tests

The tests are read, not run: every `parametrize` whose first names are gold, pred and what is expected.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from math_verify import parse, verify

from llmtrain.rewards import math

Pair = tuple[str, str, bool]


def pairs_in(source: str) -> Iterator[Pair]:
    """Yields (gold, answer, whether they are equal) of the tests in a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "parametrize" and len(node.args) == 2:
            names = [name.strip() for name in ast.unparse(node.args[0]).strip("'\"").split(",")]
            for row in node.args[1].elts if names[:2] == ["gold", "pred"] else ():
                with suppress(ValueError, AttributeError):  # values that are no texts
                    gold, answer, equal = (ast.literal_eval(each) for each in row.elts[:3])
                    if isinstance(gold, str) and isinstance(answer, str):
                        yield gold, answer, bool(equal)


def agreeing(pairs: list[Pair], equal: Callable[[str, str], bool]) -> int:
    """Returns on how many pairs a comparison says what is expected; one that raises says that they differ."""
    count = 0
    for gold, answer, expected in pairs:
        said = False
        with suppress(Exception):
            said = equal(gold, answer)
        count += said == expected
    return count


def main() -> None:
    """Prints the two counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path)
    files = sorted(parser.parse_args().tests.glob("test_*.py"))
    pairs = [pair for path in files for pair in pairs_in(path.read_text(encoding="utf-8"))]
    ours = agreeing(pairs, lambda gold, answer: math.score(answer, {"answer": gold}) == 1.0)
    plain = agreeing(pairs, lambda gold, answer: bool(verify(parse(gold), parse(answer))))
    print(f"of {len(pairs)} pairs the reward `math` agrees with {ours}, math-verify with its defaults with {plain}")


if __name__ == "__main__":
    main()
