"""Checks the section `scaling`."""

from __future__ import annotations

import os
from collections.abc import Iterator

from llmtrain.rules.case import Case, Rules, command


def _points(case: Case) -> Iterator[str]:
    points = case.config.scaling.points
    if points is None:
        yield "scaling.points: must be set; give a CSV file of params, tokens and loss, or of flops and reward"
    elif not os.path.isfile(points):
        yield f"scaling.points={points}: is no file; give a CSV file"


def _methods(case: Case) -> Iterator[str]:
    method = case.config.scaling.method
    if len(set(method)) < len(method):
        yield f"scaling.method={method}: has a method twice; remove one"


SCALING_RULES: Rules = ((command("scaling"), _points), (command("scaling"), _methods))
