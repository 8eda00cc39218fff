"""Reads what every step of the finished tasks read, kept and dropped, and checks that it adds up.

datatrove saves the counts of a task as `logs/PHASE/stats/RANK.json`, a list of its pipeline's blocks, and marks it as
done with `logs/PHASE/completions/RANK`. One such file is held at a time, so memory does not grow with the tasks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

COUNTED = ("documents_in", "documents_out", "bytes_in", "bytes_out", "files")
CLEAN = "clean-"  # begins the name of an input's phase


@dataclass
class Row:
    """Holds the counts of a step over the finished tasks of a phase. A reader has nothing that comes in.

    Example: Row("clean-web", "web", "quality", Counter(documents_in=9, documents_out=8), Counter(too_short=1))
    """

    phase: str
    source: str | None  # the input; None = all inputs together
    step: str
    counts: Counter[str] = field(default_factory=Counter)  # of COUNTED
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    others: Counter[str] = field(default_factory=Counter)  # what else the step counted
    seconds: float = 0.0  # spent in the step, by the clock

    @property
    def reads(self) -> bool:
        """Says whether this is a reader."""
        return "documents_in" not in self.counts

    @property
    def writes(self) -> bool:
        """Says whether this is a writer of datatrove."""
        return not self.counts and "total" in self.others


@dataclass
class Phase:
    """Holds the rows of a phase in the order of its pipeline, and how many of its tasks are done."""

    name: str
    source: str | None
    rows: list[Row]
    done: int
    tasks: int | None  # None = not known

    @property
    def finished(self) -> bool:
        """Says whether all tasks are done."""
        return self.tasks is None or self.done >= self.tasks


@dataclass
class Fault:
    """Holds in how many tasks the same thing does not add up, and by how much in all."""

    tasks: int = 0
    difference: int = 0
    first: str = ""


class Faults(dict[tuple[str, str], Fault]):
    """Collects faults by phase and what is wrong; any number of tasks takes the room of one."""

    def add(self, phase: str, what: str, difference: int, task: str) -> None:
        """Notes a fault of a task."""
        fault = self.setdefault((phase, what), Fault(first=task))
        fault.tasks, fault.difference = fault.tasks + 1, fault.difference + abs(difference)

    def texts(self) -> list[str]:
        """Returns a line for each fault."""
        return [
            f"{phase}: {what}" + (f": {fault.difference:,} unaccounted for" if fault.difference else "")
            + f" (tasks: {fault.tasks:,}, the first {fault.first})"
            for (phase, what), fault in self.items()
        ]  # fmt: skip


def read_phases(root: Path, names: Sequence[str], tasks: Mapping[str, int]) -> tuple[list[Phase], list[str]]:
    """Returns the phases under `root/logs` that count documents, and a line for everything that does not add up.

    A phase PART-NAME belongs to the input NAME; each of them reads what the one before it kept, `clean-NAME` first.
    Others are over all inputs and come last. `tasks` has all phases in their order with their numbers of tasks; where
    it is empty, phases stand in the order of the documents that came in, and count as finished. A phase that is not in
    `tasks`, or cleans another input, is left out with a line.
    """
    faults, lines, read = Faults(), [], []
    for place in sorted(path.parent for path in (root / "logs").glob("*/completions")):
        source = place.name.partition("-")[2]
        if place.name in tasks or (not tasks and (source in names or not place.name.startswith(CLEAN))):
            read.append(read_phase(place, source if source in names else None, tasks.get(place.name), faults))
        else:
            lines.append(f"{place.name}: is no phase of this configuration; its counts are left out")
    order = {name: place for place, name in enumerate(tasks)}
    read = [phase for phase in read if phase.rows]
    read.sort(key=lambda p: (order.get(p.name, 0), -p.rows[0].counts["documents_in"]))
    read.sort(key=lambda p: (names.index(p.source) if p.source else len(names), not p.name.startswith(CLEAN)))
    return read, lines + faults.texts() + list(faults_between(read, names))


def read_phase(place: Path, source: str | None, tasks: int | None, faults: Faults) -> Phase:
    """Returns the counts of the tasks of a phase that are marked as done."""
    rows: dict[tuple[int, str], Row] = {}
    done = sorted(path.name for path in (place / "completions").glob("*"))
    for task in done:
        try:
            blocks = json.loads((place / "stats" / f"{task}.json").read_text(encoding="utf-8"))
            add_task(rows, [as_row(block, place.name, source) for block in blocks], faults, task)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            faults.add(place.name, f"counts cannot be read ({type(error).__name__})", 0, task)
    ordered = [rows[key] for key in sorted(rows)]
    return Phase(place.name, source, ordered, len(done), tasks)


def as_row(block: Mapping[str, Any], phase: str, source: str | None) -> Row:
    """Returns the counts of a block of one task."""
    row = Row(phase, source, str(block["name"]).rpartition(": ")[2])
    row.seconds = float(total(block["time_stats"]))
    for label, value in block["stats"].items():
        if label in COUNTED:
            row.counts[label] = total(value)
        elif label.startswith("dropped/"):
            row.dropped[label.removeprefix("dropped/")] = total(value)
        else:
            row.others[label] = total(value)
    return row


def total(value: Any) -> float:
    """Returns the sum of a datatrove metric, which is a number where all of its values are one, else an object."""
    return value["total"] if isinstance(value, Mapping) else value


def add_task(rows: dict[tuple[int, str], Row], task: Sequence[Row], faults: Faults, name: str) -> None:
    """Adds the counts of a task's blocks to those of the phase; blocks that count no documents only have to agree."""
    for phase, what, difference in faults_within(task):
        faults.add(phase, what, difference, name)
    for place, row in enumerate(task):
        if row.counts:
            held = rows.setdefault((place, row.step), Row(row.phase, row.source, row.step))
            for counter in ("counts", "dropped", "others"):
                getattr(held, counter).update(getattr(row, counter))
            held.seconds += row.seconds


def faults_within(task: Sequence[Row]) -> Iterator[tuple[str, str, int]]:
    """Yields what does not add up in a task: within a step, from a step to the next, and to a writer."""
    before: Row | None = None
    for row in task:
        if before is not None and row.counts and not row.reads:
            yield from differences(before, row)
        lost = row.counts["documents_in"] - row.counts["documents_out"] - row.dropped.total()
        if row.counts and not row.reads and lost:
            yield row.phase, f"documents into `{row.step}` are not those kept and dropped", lost
        if before is not None and row.writes and (lost := before.counts["documents_out"] - row.others["total"]):
            yield row.phase, f"documents out of `{before.step}` are not those written", lost
        before = row if row.counts else before


def differences(before: Row, after: Row) -> Iterator[tuple[str, str, int]]:
    """Yields what differs between what left a step and what came into the next one."""
    for what in ("documents", "bytes"):
        if lost := before.counts[f"{what}_out"] - after.counts[f"{what}_in"]:
            yield after.phase, f"{what} out of `{before.step}` are not those into `{after.step}`", lost


def faults_between(phases: Sequence[Phase], names: Sequence[str]) -> Iterator[str]:
    """Yields a line wherever a phase got other documents than those before it kept. A phase that goes on has got fewer;
    more than a whole one kept is a fault at any time."""
    last = {name: [p for p in phases if p.source == name] for name in names}
    for own in last.values():
        for before, after in pairwise(own):
            yield from fault_between([before], after)
    before = [own[-1] for own in last.values() if own]
    for place, after in enumerate([phase for phase in phases if phase.source is None]):
        if place or len(before) == len(names):
            yield from fault_between(before, after)
        before = [after]


def fault_between(before: Sequence[Phase], after: Phase) -> Iterator[str]:
    """Yields a line where what phases kept is not what came into the next one."""
    lost = sum(phase.rows[-1].counts["documents_out"] for phase in before) - after.rows[0].counts["documents_in"]
    if all(phase.finished for phase in before) and (lost < 0 or (lost > 0 and after.finished)):
        names = ", ".join(phase.name for phase in before)
        yield f"{after.name}: documents out of {names} are not those into it: {abs(lost):,} unaccounted for"
