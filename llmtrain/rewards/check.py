"""Checks before a run starts whether every row has what its rewards need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmtrain.rewards.scorer import OF_PACKAGE, Scorer, scorer_of
from llmtrain.sandbox.pool import Call

if TYPE_CHECKING:
    from llmtrain.config.schema import RewardConfig

SHOWN = 20


def check_rows(rewards: Sequence[RewardConfig], rows: Sequence[dict[str, Any]], places: Sequence[str]) -> None:
    """Starts the rewards' workers. Raises ValueError that lists the rows, by their places, which cannot be rewarded.

    Also raises ValueError for a function of the user's that cannot be loaded, RuntimeError without a sandbox.
    """
    faults = [line for reward in rewards for line in row_faults(reward, rows, places)]
    if faults:
        more = [f"... and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        told = f"{len(faults)} of {len(rows)} rows cannot be rewarded; docs/rewards.md says what each reward needs"
        raise ValueError("\n".join([*faults[:SHOWN], *more, told]))


def row_faults(reward: RewardConfig, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> Iterator[str]:
    """Yields a line for each row that one reward cannot score."""
    scorer = scorer_of(reward)
    if reward.function is not None or not reward.verifies:
        scorer.start()
    if reward.function is not None:
        return
    fault = OF_PACKAGE[reward.name].fault if reward.verifies else scorer.fault
    unknown = start(reward, scorer, rows) if reward.verifies else set()
    for row, place in zip(rows, places, strict=True):
        found = fault(row)
        if found is None and row.get("source") in unknown:
            found = f"field 'source' is {row['source']!r:.60}, which reasoning-gym has no scorer for; mend it"
        if found is not None:
            yield f"{place}: reward {reward.name}: {found}"


def start(reward: RewardConfig, scorer: Scorer, rows: Sequence[dict[str, Any]]) -> set[Any]:
    """Starts the workers of a reward of this package; returns which sources of the rows have no scorer."""
    if reward.name != "reasoning_gym":
        scorer.start()
        return set()
    sources = sorted({row["source"] for row in rows if isinstance(row.get("source"), str)})
    scorer.start([sources])
    (reply,) = scorer.pool.run([Call("without_scorer", (sources,), 60.0)])
    return set(reply.value or ())
