"""Implements `llmtrain ladder`: trains sizes at budgets of compute, and fits scaling laws to their held-out losses."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from llmtrain.commands import run, scaling
from llmtrain.commands.ladder_jobs import Task, run_local, run_slurm
from llmtrain.config.load import dump
from llmtrain.config.schema import Config
from llmtrain.data.mix import Mix, MixSettings
from llmtrain.data.shards import MANIFEST
from llmtrain.observe.files import write_whole
from llmtrain.observe.locks import locked
from llmtrain.observe.log import make_run_dir
from llmtrain.rules.check import planned_stages, violations
from llmtrain.scaling.ladder import (
    EVAL,
    TRAIN,
    Member,
    data_dir,
    data_document,
    document,
    member_dir,
    members,
    seconds_of,
)
from llmtrain.trainer.batches import mix_settings

RESULTS = "results.csv"
COLUMNS = ("id", "params", "tokens", "flops", "loss", "bits_per_byte", "params_all", "steps", "lr", "seconds")
WIDTH = 110  # characters of the table where there is no terminal
EXECUTORS = {"local": run_local, "slurm": run_slurm}


def main(config: Config) -> int:
    """Prepares the data, runs what is not done, and writes results.csv, from which `llmtrain scaling` fits and plots.

    Returns 0, or 1 when runs failed, which are named with their logs: the same command redoes them and goes on with
    interrupted ones. Raises ValueError, before anything starts, for runs that cannot work.
    """
    found = checked(config)
    make_run_dir(config.directory)
    with locked(config.directory, patience_s=run.GRACE_S + 10) as held:
        if status := prepared(config, held):
            return status
        refuse_repeats(config, found)
        for member in found:
            write_document(config, member)
        show(config, found)
        missing = missing_of(config, found)
        tasks = [task_of(config, member) for member in missing]
        say(f"{len(found) - len(tasks)} of {len(found)} runs are done, {len(tasks)} to run")
        if tasks:
            EXECUTORS[config.ladder.executor](tasks, config.ladder, config.name)
        missing = missing_of(config, missing)
        write_results(config, [member for member in found if member not in missing])
    return told_missing([task_of(config, member) for member in missing], found) if missing else fitted(config)


def dry_run(config: Config) -> None:
    """Prints the runs of a ladder and writes nothing. Epochs are told where the shards are there, times where there is
    a speed. Raises ValueError as `main` does."""
    found = checked(config)
    if os.path.exists(os.path.join(data_dir(config), MANIFEST)):
        refuse_repeats(config, found)
    show(config, found)


def checked(config: Config) -> list[Member]:
    """Returns the runs. Raises ValueError with what is wrong with their documents, each fault with the first run that
    has it."""
    found, faults = members(config), dict[str, str]()
    for member in found:
        for stage, staged, earlier in planned_stages(document(config, member)):
            for line in violations(staged, stage.ranks, stage.command, config.directory, earlier):
                faults.setdefault(line, member.id)
    if faults:
        raise ValueError("\n".join(f"ladder, run {name}: {line}" for line, name in faults.items()))
    return found


def prepared(config: Config, held: int) -> int:
    """Makes the data of all runs where sources are given, in a process of its own; returns its exit status."""
    if not config.data.sources:
        return 0
    staged = data_document(config)
    make_run_dir(staged.directory)
    path = os.path.join(staged.directory, "config.yaml")
    write_whole(path, dump(staged))
    return run.run_child([sys.executable, "-m", "llmtrain", "data", path], run.child_environment(1), held)


def write_document(config: Config, member: Member) -> None:
    """Writes the document of a run into its directory."""
    made = document(config, member)
    make_run_dir(made.directory)
    write_whole(task_of(config, member).document, dump(made))


def task_of(config: Config, member: Member) -> Task:
    """Returns what starts a run."""
    return Task(member.id, member_dir(config, member))


def missing_of(config: Config, found: Sequence[Member]) -> list[Member]:
    """Returns the runs of which not all stages have finished with these settings and this data."""
    return [each for each in found if not all(map(run.is_done, run.planned_runs(document(config, each))))]


def epochs_of(config: Config, found: Sequence[Member]) -> dict[str, float] | None:
    """Returns by run how often it sees the source that it sees most; None where the shards are not there yet."""
    path = os.path.join(data_dir(config), MANIFEST)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        sources = json.load(file)["sources"]
    tokens = {name: splits["train"]["tokens"] for name, splits in sources.items()}
    rows = {name: max(1, (count - 1) // config.train.seq_len) for name, count in tokens.items()}
    return {member.id: _most_epochs(config, rows, tokens, member) for member in found}


def _most_epochs(config: Config, rows: dict[str, int], tokens: dict[str, int], member: Member) -> float:
    train, samples = document(config, member).train, member.steps * member.global_batch_seqs
    in_blocks = MixSettings({source.name: source.weight for source in config.data.sources} or None)
    try:
        mix = Mix(rows, mix_settings(config.data, train, samples) or in_blocks, tokens)
    except ValueError as error:
        raise ValueError(f"ladder, run {member.id}: {error}") from None
    return max(count / rows[name] for name, count in zip(mix.names, mix.counts(samples), strict=True))


def refuse_repeats(config: Config, found: Sequence[Member]) -> None:
    """Warns of runs that see text more than once. Raises ValueError for those beyond ladder.max_epochs."""
    most, ladder = epochs_of(config, found) or {}, config.ladder
    faults = [
        f"ladder.max_epochs={ladder.max_epochs:g}: {name} sees a source {epochs:.1f} times; give more text, take the "
        "size out of the budget, or raise it"
        for name, epochs in most.items()
        if epochs > ladder.max_epochs
    ]
    if faults:
        raise ValueError("\n".join(faults))
    if repeated := {name: epochs for name, epochs in most.items() if epochs > 1}:
        worst = max(repeated, key=lambda name: repeated[name])
        say(f"warning: runs that see text more than once: {len(repeated)}; most {worst}, {repeated[worst]:.1f} times")


def show(config: Config, found: Sequence[Member]) -> None:
    """Prints the table of the runs."""
    epochs, speeds = epochs_of(config, found) or {}, _speeds(config, found)
    titles = ("run", "params", "tokens", "a param", "batch", "steps", "lr", "epochs", "time")
    table, total = Table(title=f"{len(found)} runs, N = {config.ladder.params} parameters"), 0.0
    for title in titles:
        table.add_column(title, overflow="fold")
    for member in found:
        seconds = seconds_of(member, speeds, config.ladder.flops_per_s)
        total += 0.0 if stage_seconds(config, member) else seconds or 0.0
        table.add_row(
            *(member.id, f"{member.size.params:,}", f"{member.tokens:,}", f"{member.tokens / member.size.params:.1f}"),
            *(str(member.global_batch_seqs), f"{member.steps:,}", f"{member.size.lr:.3g}"),
            *(f"{epochs[member.id]:.2f}" if epochs else "", "" if seconds is None else _clock(seconds)),
        )
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(table)
    if total:
        say(f"about {_clock(total)} to train what is left, one after the other; starts and evaluations come on top")


def _speeds(config: Config, found: Sequence[Member]) -> list[tuple[int, float]]:
    """Returns (params, FLOPs a second) of the runs that have trained."""
    took = [(member, stage_seconds(config, member)) for member in found]
    return [(member.size.params, member.flops / seconds) for member, seconds in took if seconds]


def stage_seconds(config: Config, member: Member) -> float | None:
    """Returns the seconds that the last attempt at training took, None where the run has not trained to its end."""
    path = os.path.join(member_dir(config, member), TRAIN, "done.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)["seconds"]


def _clock(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def write_results(config: Config, done: Sequence[Member]) -> None:
    """Writes results.csv, one finished run a line; `loss` is the held-out loss that `eval` measures at the end."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for member in done:
        with open(os.path.join(member_dir(config, member), EVAL, "eval.json"), encoding="utf-8") as file:
            scores = json.load(file)
        size, seconds = member.size, stage_seconds(config, member)
        numbers = (size.params, member.tokens, member.flops, scores["loss"], scores["bits_per_byte"])
        rows.writerow([member.id, *numbers, size.params_all, member.steps, size.lr, seconds])
    write_whole(os.path.join(config.directory, RESULTS), text.getvalue())


def told_missing(missing: Sequence[Task], found: Sequence[Member]) -> int:
    """Names the runs that are not done, with their logs; returns the exit status."""
    for task in missing:
        say(f"{task.id}: not done; its log is {task.log}")
    say(f"{len(missing)} of {len(found)} runs are not done: no laws are fitted; the same command goes on with them")
    return 1


def fitted(config: Config) -> int:
    """Fits and plots as `llmtrain scaling` does, into the folder scaling."""
    points = config.scaling.model_copy(update={"points": os.path.join(config.directory, RESULTS), "fields": {}})
    scaling.main(config.model_copy(update={"scaling": points, "run_dir": os.path.join(config.directory, "scaling")}))
    return 0


def say(line: str) -> None:
    """Prints one line at once."""
    print(line, flush=True)
