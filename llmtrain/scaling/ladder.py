"""Computes the runs of a ladder: which size spends which budget, and what follows of tokens, steps and rates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.document import merge
from llmtrain.config.ladder import LadderBudgetConfig, LadderConfig, LadderSizeConfig
from llmtrain.config.recipes import RECIPES, config_class, run_config_class
from llmtrain.config.schema import Config, ModelConfig, RunConfig
from llmtrain.scaling.shapes import counted, shape_of

TRAIN, EVAL = "train", "eval"  # stages of a run
SHAPE = ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True)
class Size:
    """Holds one size of a ladder."""

    name: str
    shape: dict[str, int]  # fields laid over the section model
    params: int  # as ladder.params counts
    params_all: int
    lr: float


@dataclass(frozen=True)
class Member:
    """Holds one run of a ladder. Example: 2e11 FLOPs, N = 50,000 and 2,048 tokens a step make 326 steps, 667,648 tokens
    and 2.0029e11 FLOPs."""

    id: str  # <budget>-<size>
    size: Size
    budget_flops: float
    global_batch_seqs: int
    steps: int
    tokens: int
    flops: float  # 6 x params x tokens: of whole steps, so not quite the budget
    warmup_steps: int


def members(config: Config) -> list[Member]:
    """Returns the runs of a ladder by budget and size, the smallest first. Raises ValueError, one line a fault, for
    sizes without a shape or a rate, and budgets too small for a size."""
    ladder, faults = config.ladder, list[str]()
    sizes = {size.name: size for size in _sizes(config, faults)}
    if not faults:
        faults += _unknown(ladder, sizes)
    if faults:
        raise ValueError("\n".join(faults))
    found = [
        _member(config, sizes[name], budget)
        for budget in sorted(ladder.budgets, key=lambda each: each.flops)
        for name in sorted(budget.sizes or sizes, key=lambda each: sizes[each].params)
    ]
    faults = [_too_short(each, ladder) for each in found if each.steps < ladder.min_steps]
    if faults:
        raise ValueError("\n".join(faults))
    return found


def document(config: Config, member: Member) -> RunConfig:
    """Returns the document of a run: pretraining to the end of its own schedule, then `eval` of its held-out loss."""
    o, directory = config.optim, member_dir(config, member)
    recipe = next(name for name, each in RECIPES.items() if each.packs_text)
    own = {
        "name": member.id,
        "run_dir": directory,
        "model": member.size.shape,
        "optim": {
            "lr": member.size.lr,
            "min_lr": o.min_lr * member.size.lr / o.lr,
            "warmup_steps": member.warmup_steps,
        },
        "train": {"steps": member.steps, "global_batch_seqs": member.global_batch_seqs},
        "data": {"path": data_dir(config)},
        "tokenizer": {"path": tokenizer_dir(config)},
        "stages": [
            {"name": TRAIN, "command": recipe, "ranks": config.ladder.ranks},
            {
                "name": EVAL,
                "command": "eval",
                "set": {"model": {"init_from": f"{{run}}/{TRAIN}"}, "eval": {"text": True, "problems": 0}},
            },
        ],
    }
    return _validated(run_config_class(), merge(_shared(config), own))


def data_document(config: Config) -> Config:
    """Returns the document that makes the data of all runs."""
    own = {"run_dir": os.path.join(config.directory, "prepared"), "data": {"path": data_dir(config)}}
    own |= {"tokenizer": {"path": tokenizer_dir(config)}}
    return _validated(config_class(), merge(_shared(config), own))


def _shared(config: Config) -> dict[str, Any]:
    """Returns what all runs have in common, as the user wrote it."""
    return config.model_dump(mode="json", exclude_unset=True, exclude={"ladder", "scaling"})


def _validated(schema: type[Config], data: dict[str, Any]) -> Any:
    return schema.model_validate_json(json.dumps(data), strict=True)


def member_dir(config: Config, member: Member) -> str:
    """Returns the directory of a run."""
    return os.path.join(config.directory, "runs", member.id)


def data_dir(config: Config) -> str:
    """Returns the directory of the token shards that all runs read."""
    return config.data.path or os.path.join(config.directory, "data")


def tokenizer_dir(config: Config) -> str:
    """Returns the directory of the tokenizer of all runs."""
    return config.tokenizer.path or os.path.join(config.directory, "tokenizer")


def _sizes(config: Config, faults: list[str]) -> Iterator[Size]:
    """Yields the sizes; notes what is wrong with them."""
    seen = set[str]()
    for i, entry in enumerate(config.ladder.sizes):
        at = f"ladder.sizes.{entry.name or i}"
        try:
            size = _size(config, entry)
        except ValueError as error:
            faults += [f"{at}: {line}" for line in str(error).splitlines()]
            continue
        if size.name in seen:
            faults.append(f"{at}: {size.name} is there twice; give one another `name`")
        seen.add(size.name)
        yield size


def _size(config: Config, entry: LadderSizeConfig) -> Size:
    ladder, written = config.ladder, {name: getattr(entry, name) for name in SHAPE if getattr(entry, name) is not None}
    if entry.params is not None and written:
        raise ValueError(f"params={entry.params:g}: gives the whole shape; remove it, or {', '.join(written)}")
    if entry.params is None and not written:
        raise ValueError("has no shape; give params, or num_layers, hidden_size and what follows from them")
    try:
        shape = written or shape_of(entry.params or 0.0, config.model, ladder.aspect, ladder.params)
    except ValueError as error:
        raise ValueError(f"params={entry.params:g}: {error}") from None
    model = resolve_model(_laid_over(config.model, shape))
    params = counted(model, ladder.params)
    name = entry.name or f"{model.num_layers}x{model.hidden_size}"
    return Size(name, shape, params, counted(model, "all"), _lr(config, entry, params))


def _laid_over(model: ModelConfig, shape: dict[str, int]) -> ModelConfig:
    return ModelConfig.model_validate(merge(model.model_dump(exclude_unset=True), shape))


def _lr(config: Config, entry: LadderSizeConfig, params: int) -> float:
    rule = config.ladder.lr
    if rule.by == "power":
        assert rule.coefficient is not None and rule.exponent is not None  # rules/ladder.py
        return rule.coefficient * params**rule.exponent
    if rule.by == "sizes":
        if entry.lr is None:
            raise ValueError("lr: must be set with ladder.lr.by=sizes; give this size's learning rate")
        return entry.lr
    if entry.lr is not None:
        raise ValueError(f"lr={entry.lr:g}: only with ladder.lr.by=sizes; remove it, or set lr.by")
    return config.optim.lr


def _unknown(ladder: LadderConfig, sizes: dict[str, Size]) -> Iterator[str]:
    """Yields what is wrong with the sizes that budgets name."""
    for i, budget in enumerate(ladder.budgets):
        names = budget.sizes if budget.sizes is not None else list(sizes)
        for name in names:
            if name not in sizes:
                yield f"ladder.budgets.{i}.sizes: {name}: is no size; choose of {', '.join(sizes)}"
        if len(set(names)) < len(names) or not names:
            yield f"ladder.budgets.{i}.sizes={names}: must name each size once, and at least one; correct it"


def _member(config: Config, size: Size, budget: LadderBudgetConfig) -> Member:
    seqs = batch_seqs(config, budget.flops)
    step_tokens = seqs * config.train.seq_len
    steps = max(1, round(budget.flops / (6 * size.params * step_tokens)))
    tokens = steps * step_tokens
    warmup = min(steps - 1, max(1, round(config.ladder.warmup_share * steps))) if config.ladder.warmup_share else 0
    name = f"{budget_name(budget.flops)}-{size.name}"
    return Member(name, size, budget.flops, seqs, steps, tokens, 6.0 * size.params * tokens, warmup)


def batch_seqs(config: Config, flops: float) -> int:
    """Returns the rows of a step at a budget: whole microbatches on all data-parallel ranks."""
    rule, train, p = config.ladder.batch, config.train, config.parallel
    if rule.coefficient is None or rule.exponent is None:
        return train.global_batch_seqs
    unit = train.micro_batch_seqs * max(1, config.ladder.ranks // (p.pp * p.tp * p.cp))
    return unit * max(1, round(rule.coefficient * flops**rule.exponent / (train.seq_len * unit)))


def budget_name(flops: float) -> str:
    """Returns a budget as a part of a name. Example: budget_name(2e11) -> '2e11'"""
    return f"{flops:.3g}".replace("+", "")


def _too_short(member: Member, ladder: LadderConfig) -> str:
    return (
        f"ladder.budgets: {member.id} is {member.steps} steps of {member.tokens // member.steps:,} tokens: must be at "
        f"least ladder.min_steps={ladder.min_steps}; raise the budget, take the size out of it, or make steps smaller"
    )


def seconds_of(member: Member, done: Sequence[tuple[int, float]], flops_per_s: float | None) -> float | None:
    """Returns the estimated time of a run: at a speed that is given, or that of the finished run of the nearest size.
    `done` holds (params, FLOPs a second); None where nothing is known."""
    if flops_per_s is None:
        if not done:
            return None
        flops_per_s = min(done, key=lambda each: abs(each[0] / member.size.params - 1))[1]
    return member.flops / flops_per_s
