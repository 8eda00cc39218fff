"""Checks the sections `judge` and `constitutional`. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator

from llmtrain.config.recipes import JUDGES
from llmtrain.rules.case import Case, Rules, command


def _samples_differ(case: Case) -> Iterator[str]:
    """What compares samples needs several."""
    r, pairs = case.config.rollout, case.config.constitutional.pairs_per_prompt
    least = 2 if case.command == "judge" else 2 * pairs
    if r.group_size < least:
        yield f"rollout.group_size={r.group_size}: must be at least {least}, samples are compared in pairs; raise it"


def _room(case: Case) -> Iterator[str]:
    j, c = case.config.judge, case.config.constitutional
    asked = {
        "judge.rubric_tokens": (case.command == "judge" and j.by == "rubric", j.rubric_tokens),
        "constitutional.critique_tokens": (case.command != "judge" and c.revisions > 0, c.critique_tokens),
        "constitutional.thought_tokens": (case.command != "judge" and c.label == "thought", c.thought_tokens),
    }
    for key, (used, tokens) in asked.items():
        if used and tokens >= case.config.train.seq_len:
            yield (
                f"{key}={tokens}: must be less than train.seq_len={case.config.train.seq_len}, which holds the "
                "question too; lower it or raise seq_len"
            )


def _judges(case: Case) -> Iterator[str]:
    j, rewards = case.config.judge, case.config.rewards
    if j.by == "model" and not any(reward.model for reward in rewards):
        yield "judge.by=model: needs a reward that is a model; add {model: DIRECTORY} to rewards, or change by"
    if j.by in ("majority", "greedy") and not any(reward.verifies for reward in rewards):
        yield f"judge.by={j.by}: needs a reward that reads answers; add one that is no model, such as {{name: math}}"
    if j.lowest >= j.highest:
        yield f"judge.lowest={j.lowest:g}: must be less than judge.highest={j.highest:g}; lower it"
    if j.by == "rubric" and j.rubric is not None and case.missing(j.rubric):
        yield f"judge.rubric={j.rubric}: does not exist; give a text file with {{prompt}} and {{completion}}"


def _constitution(case: Case) -> Iterator[str]:
    c = case.config.constitutional
    low, high = c.clamp
    if c.principles is None:
        yield "constitutional.principles: must be set; give a file such as configs/constitutional/principles.yaml"
    elif not case.planned and not os.path.isfile(c.principles):
        yield f"constitutional.principles={c.principles}: does not exist; give a YAML file with principles"
    if c.agreement is not None and case.missing(c.agreement):
        yield f"constitutional.agreement={c.agreement}: does not exist; give rows with chosen and rejected"
    if not (c.revisions or c.pairs_per_prompt or c.agreement):
        yield "constitutional.revisions=0: nothing to do, with pairs_per_prompt=0 and no agreement; raise one of them"
    if not 0 <= low <= 0.5 <= high <= 1:
        yield f"constitutional.clamp=[{low:g}, {high:g}]: must be two probabilities around 0.5; correct them"


JUDGING_RULES: Rules = (
    (command(*JUDGES), _samples_differ),
    (command(*JUDGES), _room),
    (command("judge"), _judges),
    (command("constitutional"), _constitution),
)
