"""Lets a worker tell its test something, while other ranks write to the same file."""

from __future__ import annotations

import json
import sys


def print_json(value: object) -> None:
    """Prints a line of JSON in one write, begun on a new line: ranks may write without a buffer, so that `print` is two
    writes, between which the words of another rank may come."""
    sys.stdout.write(f"\n{json.dumps(value)}\n")
    sys.stdout.flush()
