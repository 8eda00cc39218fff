"""Answers each line [gold or null, answer] with {"value": text or null, "equal": bool}. Started by math.py."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

READY = "ready\n"


def answer_question(gold: str | None, answer: str) -> dict[str, Any]:
    """Returns the value that math-verify reads in `answer`, and whether it equals `gold`.

    An answer that math-verify cannot handle is unreadable: its value is None.
    """
    from math_verify import parse, verify

    try:
        found = parse(answer)
        equal = gold is not None and verify(parse(f"\\boxed{{{gold}}}"), found)
        return {"value": str(found[0]) if found else None, "equal": bool(equal)}
    except Exception:  # sympy raises many kinds of exceptions on text that a model wrote
        return {"value": None, "equal": False}


def main() -> None:
    import math_verify  # noqa: F401

    logging.disable(logging.ERROR)  # it reports every time limit that an answer runs into
    print(READY, end="", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer_question(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
