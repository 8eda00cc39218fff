"""Prints the layouts that a search finds, the best first, and why each is as fast as it is."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from llmtrain.config.schema import Config
from llmtrain.rules.check import PLANNED_RULES, SHAPE_RULES, planned_violations
from llmtrain.scaling.describe import Stage, each_stage
from llmtrain.scaling.plan import Plan, ahead_workers, plan
from llmtrain.scaling.search import NEAREST, Document, Found, Layout, document_of, heaviest_turn, plan_of, search
from llmtrain.scaling.speed import largest_part, mfu, parts_of, room_bytes
from llmtrain.scaling.turnlines import step_mfu
from llmtrain.scaling.turntime import Job, step_of_turns

SHOWN = 10
WIDTH = 164  # columns of the table; a narrower terminal folds its lines
AXES = ("tp", "pp", "cp", "ep", "dp_shard", "dp_replicate")


def main(config: Config) -> None:
    """Prints a table for each stage of a document that trains. Raises ValueError, behind the last one, with a line for
    each stage that no layout fits."""
    each_stage(config, title, tell)


def title(stage: Stage) -> str:
    """Returns the name of a stage, and of one that trains on how many GPUs."""
    if stage.recipe is None:
        return stage.title()
    return f"{stage.title()}, {stage.ranks + ahead_workers(stage.config, stage.recipe):,} GPUs"


def tell(stage: Stage) -> None:
    """Prints the table of a stage. Raises ValueError when no layout fits."""
    console, staged = Console(width=max(WIDTH, Console().width)), stage.config
    if stage.recipe is None:
        console.print("  trains nothing, and has no layout to search")
        return
    document = document_of(staged, stage.recipe, stage.ranks, stage.earlier)
    rules = [rule for rule in PLANNED_RULES if rule not in SHAPE_RULES]
    if broken := planned_violations(staged, document.model, stage.ranks, stage.command, stage.earlier, rules):
        raise ValueError("\n".join(broken))
    found = search(document)
    if not found.best:
        raise ValueError(nothing_fits(found, document))
    console.print(table(found.best[:SHOWN], document))
    for line in (*summary(found, staged), f"the first: {overrides(found.best[0].config, staged)}"):
        console.print(line, highlight=False, soft_wrap=True)


def table(layouts: list[Layout], document: Document) -> Table:
    """Returns the layouts as rows, with what `llmtrain plan` says of each."""
    samples = document.recipe.samples
    names = [*AXES, "schedule", "states", "remat", "rows", *(["sampling on"] if samples else [])]
    found = Table(*names, "GB", "step s", "MFU", "bound by", box=None)
    for layout in layouts:
        config, p = layout.config, plan(layout.config, document.ranks, document.recipe, document.earlier)
        sizes = [str(getattr(config.parallel, axis)) for axis in AXES]
        kept = [schedule(config), states(config), config.engine.remat, str(config.train.micro_batch_seqs)]
        kept += [f"{p.rollout_ranks} ranks" if p.rollout_ranks else "all ranks"] if samples else []
        share, why = reasons(document, layout, p)
        found.add_row(*sizes, *kept, f"{layout.memory_bytes / 1e9:.1f}", f"{layout.seconds:.3g}", f"{share:.1%}", why)
    return found


def reasons(document: Document, layout: Layout, p: Plan) -> tuple[float, str]:
    """Returns the MFU of a step, and what it spends most time on: its turns, or what there is beside products; with how
    much memory is left."""
    config, left = layout.config, f"{room_bytes(layout.config, document.hardware, layout.memory_bytes) / 1e9:.1f}"
    if document.turned:
        step = step_of_turns(Job(config, document.recipe, document.model, document.models, p))
        share, spent = step_mfu(config, p, step), step.seconds
    else:
        assert p.time is not None
        share = mfu(p, config)
        spent = {name.removesuffix("_s"): value for name, value in vars(p.time).items() if name != "products_s"}
    most = sorted(spent.items(), key=lambda entry: -entry[1])[:2]
    shares = ", ".join(f"{name} {value / layout.seconds:.0%}" for name, value in most)
    return share, f"{shares}; {left} GB left"


def schedule(config: Config) -> str:
    """Returns the schedule in short: "–" without a pipeline, "1f1b", or "interleaved 4" with 4 stages a rank."""
    p = config.parallel
    if p.pp == 1:
        return "–"
    return p.schedule if p.virtual_stages == 1 else f"{p.schedule.partition('_')[0]} {p.virtual_stages}"


def states(config: Config) -> str:
    """Returns how states are sharded, in short."""
    e = config.engine
    return f"ZeRO {e.zero_stage}" if e.backend == "deepspeed" else "FSDP2" + ("" if e.reshard else ", kept")


def summary(found: Found, document: Config) -> list[str]:
    """Returns how many layouts there were, and the fastest of those that miss the memory by least."""
    lines = [f"{len(found.best):,} fit; {found.tried:,} were tried, {found.refused:,} of them refused by a rule"]
    if found.misfit is not None:
        size = found.misfit.memory_bytes / 1e9
        lines.append(f"the fastest of the {NEAREST} that fail to fit by least: {size:.1f} GB, ")
        lines[-1] += f"{found.misfit.seconds:.3g} s a step: {overrides(found.misfit.config, document)}"
    return lines


def overrides(config: Config, document: Config | None = None) -> str:
    """Returns the layout as arguments of a command, for a `document` whose own `stage_layers` would not fit it."""
    p, e = config.parallel, config.engine
    keys = {f"parallel.{axis}": getattr(p, axis) for axis in AXES}
    keys |= {"parallel.schedule": p.schedule, "parallel.virtual_stages": p.virtual_stages}
    own = (
        {"engine.zero_stage": e.zero_stage} if e.backend == "deepspeed" else {"engine.reshard": str(e.reshard).lower()}
    )
    keys |= {**own, "engine.remat": e.remat, "train.micro_batch_seqs": config.train.micro_batch_seqs}
    if document is not None and document.parallel.stage_layers is not None:
        keys["parallel.stage_layers"] = "null"
    if document is not None and document.rollout != config.rollout:
        keys |= {"rollout.placement": config.rollout.placement, "rollout.workers": config.rollout.workers}
    return " ".join(f"{key}={value}" for key, value in keys.items())


def nothing_fits(found: Found, document: Document) -> str:
    """Returns the lines of the rules that refuse every layout, or one that says what the smallest of them needs."""
    if found.smallest is None and found.rules:
        return "\n".join(found.rules)
    if found.smallest is None:
        return (
            f"--search: the rules refuse every layout of {document.ranks} GPUs, whose number must divide into axes and "
            "whose batch into microbatches; change plan.gpus or train.global_batch_seqs"
        )
    smallest = found.smallest.config
    part, size = largest_part(heaviest_turn(document, smallest) or parts_of(plan_of(document, smallest)))
    return (
        f"--search: no layout of {document.ranks} GPUs fits {document.hardware.memory_gb:g} GB less plan.reserve_gb; "
        f"the smallest needs {found.smallest.memory_bytes / 1e9:.3g} GB, most of it {part}, {size:.3g} GB; use more "
        "GPUs, other plan.hardware, or engine.offload"
    )
