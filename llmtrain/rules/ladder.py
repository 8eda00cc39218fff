"""Checks the section `ladder`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from llmtrain.rules.case import Case, Rules, command

APART = 1.05  # budgets closer than this factor are one for the laws


def _lists(case: Case) -> Iterator[str]:
    ladder = case.config.ladder
    if not ladder.sizes:
        yield "ladder.sizes: must name at least one size; give {num_layers, hidden_size, ...} or {params}"
    if not ladder.budgets:
        yield "ladder.budgets: must name at least one budget; give {flops: 1.0e12}"
    flops = sorted(budget.flops for budget in ladder.budgets)
    for low, high in itertools.pairwise(flops):
        if high < low * APART:
            yield f"ladder.budgets: {low:g} and {high:g} are within 5 %, which is one for the laws; remove one"


def _rates(case: Case) -> Iterator[str]:
    rule, model, o = case.config.ladder.lr, case.config.model, case.config.optim
    if rule.by == "mup" and model.mup is None:
        yield (
            "ladder.lr.by=mup: needs the width whose lr was tuned; set model.mup={base_hidden: ...}, or state another "
            "rule in ladder.lr.by"
        )
    if rule.by != "mup" and model.mup is not None:
        yield f"ladder.lr.by={rule.by}: not with model.mup, which scales the lr by width too; remove one of them"
    if rule.by == "power" and (rule.coefficient is None or rule.exponent is None):
        yield "ladder.lr.by=power: needs ladder.lr.coefficient and ladder.lr.exponent; set both"
    if rule.by != "power" and (rule.coefficient is not None or rule.exponent is not None):
        yield f"ladder.lr.by={rule.by}: coefficient and exponent are for by=power; remove them"
    if o.schedule == "constant":
        yield (
            "optim.schedule=constant: each run of a ladder must end at a low lr, else their losses do not compare; "
            "take cosine, linear or wsd"
        )


def _batch(case: Case) -> Iterator[str]:
    rule, train = case.config.ladder.batch, case.config.train
    if (rule.coefficient is None) != (rule.exponent is None):
        yield "ladder.batch: coefficient and exponent belong together; set both or none"
    for name in ("batch_ramp", "seq_ramp"):
        if getattr(train, name):
            yield f"train.{name}: must be empty in a ladder, whose runs end at their own tokens; remove it"
    if train.epochs is not None:
        yield f"train.epochs={train.epochs:g}: not in a ladder, whose budgets give the steps; remove it"


def _shape(case: Case) -> Iterator[str]:
    model = case.config.model
    if model.init_from is not None:
        yield f"model.init_from={model.init_from}: gives one shape, and a ladder trains several anew; remove it"
    if model.mtp_layers:
        yield f"model.mtp_layers={model.mtp_layers}: 6 N D does not count them; set model.mtp_layers=0"


def _data(case: Case) -> Iterator[str]:
    data = case.config.data
    if not data.sources and data.path is None:
        yield "data.sources: must name text to train on; give sources, or shards in data.path with tokenizer.path"


def _executor(case: Case) -> Iterator[str]:
    ladder = case.config.ladder
    if ladder.slurm and ladder.executor != "slurm":
        yield f"ladder.slurm: only with ladder.executor=slurm, not {ladder.executor}; remove it, or set executor"
    for name in ("array", "output", "job-name", "wait", "signal"):
        if name in ladder.slurm:
            yield f"ladder.slurm.{name}={ladder.slurm[name]}: is set by the ladder; remove it"


LADDER_RULES: Rules = tuple((command("ladder"), rule) for rule in (_lists, _rates, _batch, _shape, _data, _executor))
