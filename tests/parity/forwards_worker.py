"""Counts what scoring and new weights send on each layout, beside what the formula says. Runs on several ranks with a
JSON list of layouts, whose "what" is: score (the trained model), frozen, sync.

Prints one JSON line a layout and rank where the two differ, and one a layout with rank 0's items.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

from layouts_worker import settings_of
from traffic_worker import (
    ROWS,
    WARM_STEPS,
    batches_of,
    build,
    initial,
    larger_halves,
    main,
    shape_of,
    shorten_reuse,
    watch_pairs,
)

from llmtrain.engine.build import Role, build_frozen
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import parameter_shapes
from llmtrain.parallel.context import local_batches
from llmtrain.parallel.mesh import Mesh
from llmtrain.scaling.communication import Item, RankStep, Step
from llmtrain.scaling.forwards import frozen_rank, scoring, weight_sync
from llmtrain.types import IGNORE
from tests.parallel.traffic import Traffic


def count(layout: dict, mesh: Mesh) -> tuple[dict, dict, list[Item]]:
    """Returns (counted, by formula, items) of this rank; the first two by axis and kind."""
    parallel, settings = settings_of(layout)
    model, frozen = shape_of(layout), layout["what"] == "frozen"
    microbatches, denominator = batches_of(layout, mesh)
    if frozen:
        shapes = parameter_shapes(model)
        role = Role("reference", model, parallel, settings, partial(initial, shapes, model))
        scorer = build_frozen(role, mesh)
    else:
        if "reuse" in layout:
            shorten_reuse(layout["reuse"])
        scorer = build(layout, model, mesh)
        for _ in range(WARM_STEPS):  # as in a run, where what was gathered is freed by an update
            scorer.score(microbatches)
            scorer.train_step(microbatches, token_loss, denominator)
    pairs = watch_pairs()
    with Traffic(mesh) as traffic:
        if layout["what"] == "sync":
            for _ in scorer.full_weights():
                pass
        else:
            scorer.score(microbatches)
    trained = sum(int((b.labels != IGNORE).sum()) for b in local_batches(microbatches, mesh))
    rows = larger_halves(pairs, mesh)
    step = Step(len(microbatches), ROWS, microbatches[0].input_ids.size(1), trained, 1, pairs=rows)
    rank = RankStep(model, parallel, settings, step, mesh.coords["pp"])
    items = weight_sync(rank) if layout["what"] == "sync" else scoring(frozen_rank(rank) if frozen else rank)
    groups = mesh.groups | (
        {"shard": mesh.groups["grad"], "expert_shard": mesh.groups["expert_grad"]} if frozen else {}
    )
    expected: dict[str, int] = defaultdict(int)
    for axis, kind, _, size in items:
        group = groups.get(axis)
        expected[f"{axis if group is None else traffic.axes[group.group_name]} {kind}"] += size
    return {" ".join(key): size for key, size in traffic.bytes.items()}, expected, items


if __name__ == "__main__":
    main(count)
