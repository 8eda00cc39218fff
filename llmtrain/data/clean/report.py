"""Writes the report of cleaning: one HTML page that holds all it shows, and the same numbers as JSON."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmtrain.config.clean import CleanConfig, CollectConfig
from llmtrain.data.clean import report_plots as plots
from llmtrain.data.clean.dedup.curve import probability
from llmtrain.data.clean.report_counts import Phase, Row, read_phases
from llmtrain.data.clean.report_page import MORE_STYLE, PAGE
from llmtrain.data.clean.report_samples import Looked, as_mapping, look_at_dropped, look_at_kept, masked, visible
from llmtrain.observe.owned import replacing

COMMAND = "llmtrain data"
EXAMPLES = 5  # for each input, or step and reason
PAIRS = 10  # copies that are shown beside what stays
FOLDERS = {"cleaned": "before deduplication", "documents": "at the end"}
COUNTERS = {"replaced/": "Personal data replaced, by kind", "documents_with/": "Contaminated documents, by set"}


def write_report(
    root: str, settings: CleanConfig, inputs: Sequence[CollectConfig], tasks: Mapping[str, int] | None = None
) -> Path:
    """Writes `root/report/index.html` and `report.json` from what the finished tasks left; returns the page's path.

    `tasks` has the names of all phases in their order and their numbers of tasks, by which it is known what is still to
    be done. Memory does not grow with the corpus: counts are those of the tasks, texts are looked at in samples. Raises
    ValueError when `root/report` holds what this command did not write.
    """
    place = Path(root)
    names = [each.name for each in inputs]
    phases, faults = read_phases(place, names, tasks or {})
    kept = {folder: looked_at(place / folder, names) for folder in FOLDERS}
    dropped = look_at_dropped([*files(place / "dropped"), *files(place / "dedup" / "dropped")], EXAMPLES)
    dropped = masked(dropped, settings)
    pairs = pairs_of(place, dropped)
    numbers = numbers_of(place, settings, inputs, phases, faults, kept)
    numbers["unfinished"] = unfinished(phases, tasks or {})
    images = {name: base64.b64encode(png).decode() for name, png in drawn(phases, numbers, settings).items()}
    with replacing(place / "report", COMMAND) as out:
        page = rendered(numbers, images, kept, dropped, pairs, title=place.resolve().name)
        (out / "report.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        (out / "index.html").write_text(page, encoding="utf-8")
    return place / "report" / "index.html"


def files(folder: Path) -> list[Path]:
    """Returns the files of documents in a folder."""
    return sorted(folder.rglob("*.jsonl.zst"))


def looked_at(folder: Path, names: Sequence[str]) -> dict[str, Looked]:
    """Returns what was seen of the documents of each input in a folder; nothing for inputs without a file there."""
    found = {name: files(folder / name) for name in names}
    return {name: look_at_kept(paths, EXAMPLES) for name, paths in found.items() if paths}


def pairs_of(place: Path, dropped: Looked) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Returns examples of dropped copies, each with what stays where that is among the documents looked at."""
    copies = [e for sample in dropped.samples.values() for e in sample.kept if e.get("copy_of")][:PAIRS]
    if not copies:
        return []
    wanted = [copy["copy_of"] for copy in copies]
    found = look_at_kept(files(place / "documents"), 0, wanted).found
    return [(copy, found.get(copy["copy_of"])) for copy in copies]


def unfinished(phases: Iterable[Phase], tasks: Mapping[str, int]) -> list[str]:
    """Returns a line for each phase with tasks that are not done."""
    done = {phase.name: phase.done for phase in phases}
    shown = {name: done.get(name, 0) for name in tasks if name.startswith("clean-") or name in done}
    return [f"{name} {count:,} of {tasks[name]:,}" for name, count in shown.items() if count < tasks[name]]


def numbers_of(
    place: Path,
    settings: CleanConfig,
    inputs: Sequence[CollectConfig],
    phases: Sequence[Phase],
    faults: Sequence[str],
    kept: Mapping[str, Mapping[str, Looked]],
) -> dict[str, Any]:
    """Returns all numbers of the report, as they are written to report.json."""
    minhash = getattr(settings.dedup, "minhash", None)
    return {
        "faults": [visible(line, 500) for line in faults],
        "tasks": {phase.name: {"done": phase.done, "of": phase.tasks} for phase in phases},
        "steps": [record(row) for phase in phases for row in phase.rows],
        "counters": counters(phases),
        "looked_at": {folder: {n: seen(each) for n, each in looks.items()} for folder, looks in kept.items()},
        "classifier": classifier(place),
        "minhash": minhash and {s / 10: probability(s / 10, minhash.buckets, minhash.hashes) for s in range(1, 10)},
        "settings": settings.model_dump(mode="json"),
        "inputs": [each.model_dump(mode="json") for each in inputs],
    }


def record(row: Row) -> dict[str, Any]:
    """Returns the counts of a step, reasons in the order of their numbers."""
    dropped = sorted(row.dropped.items(), key=lambda item: (-item[1], item[0]))
    return {
        "input": row.source or plots.ALL,
        "phase": row.phase,
        "step": visible(row.step, 60),
        "documents_in": row.counts["documents_out"] + row.dropped.total() if row.reads else row.counts["documents_in"],
        "documents_out": row.counts["documents_out"],
        "bytes_in": row.counts.get("bytes_in"),
        "bytes_out": row.counts["bytes_out"],
        "files": row.counts.get("files"),
        "dropped": {visible(reason, 100): number for reason, number in dropped},
        "seconds": row.seconds,
        "mb_per_s": (row.counts["bytes_in"] or row.counts["bytes_out"]) / 1e6 / row.seconds if row.seconds else None,
    }


def counters(phases: Iterable[Phase]) -> dict[str, dict[str, float]]:
    """Returns what steps counted beside documents, by the table in which it is shown."""
    tables = {title: Counter[str]() for title in COUNTERS.values()}
    for row in (row for phase in phases for row in phase.rows):
        for prefix, title in COUNTERS.items():
            own = {label.removeprefix(prefix): n for label, n in row.others.items() if label.startswith(prefix)}
            tables[title].update({visible(label, 60): number for label, number in own.items()})
    return {title: dict(table.most_common()) for title, table in tables.items() if table}


def seen(looked: Looked) -> dict[str, Any]:
    """Returns what was seen in the documents of a folder, and how many of them were looked at."""
    return {
        "documents": looked.documents,
        "files": looked.files,
        "files_read": looked.files_read,
        "unreadable": looked.unreadable,
        "characters": {2 ** (b - 1) if b else 0: n for b, n in sorted(looked.lengths.items())},
        "languages": dict(looked.languages.most_common()),
        "pii": dict(looked.pii.most_common()),
    }


def classifier(place: Path) -> dict[str, Any]:
    """Returns the measures of the quality classifier, as AUC and kept share, that lie beside it; {} without one."""
    measured = {}
    for path in sorted((place / "classifier").glob("*.json")):
        notes = as_mapping(json.loads(path.read_text(encoding="utf-8")))
        measured |= dict(leaves(notes.get("measured", notes)))
    return measured


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields all numbers in an object, with the path to each. Example: {"kept": {"good": 0.9}} -> ("kept.good", 0.9)"""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, Mapping | list):
        for part, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(inner, f"{name}.{part}" if name else str(part))


def drawn(phases: Sequence[Phase], numbers: Mapping[str, Any], settings: CleanConfig) -> dict[str, bytes]:
    """Returns the plots that there is something for."""
    images = {}
    for what in ("documents", "bytes"):
        read, columns = flow(phases, numbers["steps"], what)
        if sum(read.values()):
            images[what] = plots.sankey(f"{what.capitalize()} from inputs through steps", read, columns)
    histograms = {FOLDERS[folder]: summed(looks, "characters") for folder, looks in numbers["looked_at"].items()}
    histograms = {name: {int(low).bit_length(): n for low, n in h.items()} for name, h in histograms.items() if h}
    if histograms:
        images["lengths"] = plots.lengths(histograms)
        images["languages"] = plots.languages(summed(last(numbers["looked_at"]), "languages"))
    if numbers["minhash"]:
        images["curve"] = plots.curve(settings.dedup.minhash.buckets, settings.dedup.minhash.hashes)
    return images


def summed(looks: Mapping[str, Any], what: str) -> Counter:
    """Returns a histogram over all inputs."""
    return sum((Counter(each[what]) for each in looks.values()), Counter())


def last(looks: Mapping[str, Any]) -> Any:
    """Returns the last folder that has something: documents at the end, else those before deduplication."""
    return next((looks[folder] for folder in reversed(FOLDERS) if looks.get(folder)), {})


def flow(
    phases: Sequence[Phase], steps: Sequence[Mapping[str, Any]], what: str
) -> tuple[dict[str, float], list[tuple[str, dict[str, tuple[float, float]]]]]:
    """Returns what was read by input, and for each step what came in and what went on by input."""
    read: dict[str, float] = {}
    lanes: dict[str, dict[str, tuple[float, float]]] = {}
    for each in steps:
        went = each[f"{what}_out"]
        came = each[f"{what}_in"] if each[f"{what}_in"] is not None else went
        if each["input"] != plots.ALL or not any(phase.source for phase in phases):
            read.setdefault(each["input"], came)
        lanes.setdefault(each["step"], {})[each["input"]] = (came, went)
    columns = merged([[row.step for phase in own for row in phase.rows] for own in by_source(phases)])
    return read, [(visible(step, 60), lanes[visible(step, 60)]) for step in columns]


def by_source(phases: Sequence[Phase]) -> list[list[Phase]]:
    """Returns the phases of each input, then those over all."""
    sources = dict.fromkeys(phase.source for phase in phases)
    return [[phase for phase in phases if phase.source == source] for source in sources]


def merged(orders: Iterable[Sequence[str]]) -> list[str]:
    """Returns all names in an order that keeps each of the orders, where they agree.

    Example: [["a", "c"], ["a", "b", "c", "d"]] -> ["a", "b", "c", "d"]
    """
    names: list[str] = []
    for order in orders:
        at = 0
        for name in order:
            if name not in names:
                names.insert(at, name)
            at = names.index(name) + 1
    return names


def rendered(
    numbers: Mapping[str, Any],
    images: Mapping[str, str],
    kept: Mapping[str, Mapping[str, Looked]],
    dropped: Looked,
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any] | None]],
    title: str,
) -> str:
    """Returns the page."""
    from jinja2 import Environment

    copies = {id(copy) for copy, _ in pairs}
    shown = {key: [e for e in s.kept if id(e) not in copies] for key, s in sorted(dropped.samples.items())}
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title=visible(title, 200),
            made_by=COMMAND,
            more_style=MORE_STYLE,
            images=images,
            faults=numbers["faults"],
            unfinished=numbers["unfinished"],
            steps=[step_line(each) for each in numbers["steps"]],
            totals=total_lines(numbers["steps"]),
            tables=tables_of(numbers),
            scopes=list(scopes(numbers["looked_at"])),
            pairs=pairs,
            dropped={key: examples for key, examples in shown.items() if examples},
            kept={name: looked.samples[()].kept for name, looked in last(kept).items() if looked.samples},
            settings=visible(yaml.safe_dump(numbers["settings"], sort_keys=False, allow_unicode=True), 100_000),
            inputs=visible(yaml.safe_dump(numbers["inputs"], sort_keys=False, allow_unicode=True), 100_000),
        )
    )


def step_line(each: Mapping[str, Any]) -> dict[str, str]:
    """Returns the row of a step in the table."""
    came, went = each["documents_in"], each["documents_out"]
    return {
        "input": visible(each["input"], 60),
        "step": each["step"],
        "documents in": f"{came:,}",
        "out": f"{went:,}",
        "kept": f"{went / came:.1%}" if came else "–",
        "MB in": number(each["bytes_in"] and each["bytes_in"] / 1e6, 3),
        "MB out": number(each["bytes_out"] / 1e6, 3),
        "s": number(each["seconds"], 2),
        "MB/s": number(each["mb_per_s"], 2),
        "dropped, by reason": ", ".join(f"{reason} {n:,}" for reason, n in each["dropped"].items()) or "–",
    }


def number(value: float | None, digits: int) -> str:
    """Returns a number for the page."""
    return "–" if value is None else f"{value:,.{digits}f}"


def total_lines(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns for each input what its first step read and its last one kept."""
    lines = []
    for source in dict.fromkeys(each["input"] for each in steps):
        own = [each for each in steps if each["input"] == source]
        came, went = own[0]["documents_in"], own[-1]["documents_out"]
        lines.append(
            {
                "input": visible(source, 60),
                "files": number(own[0]["files"], 0),
                "documents read": f"{came:,}",
                "kept": f"{went:,}",
                "share": f"{went / came:.1%}" if came else "–",
                "MB kept": number(own[-1]["bytes_out"] / 1e6, 3),
            }
        )
    return lines


def tables_of(numbers: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Returns further tables by their titles."""
    tables = {**numbers["counters"]}
    if personal := summed(last(numbers["looked_at"]), "pii"):
        tables["Placeholders of personal data in the documents looked at, by kind"] = dict(personal.most_common())
    shown = {title: [{"": name, "number": f"{n:,}"} for name, n in table.items()] for title, table in tables.items()}
    if numbers["classifier"]:
        shown["Quality classifier"] = [
            {"measure": visible(name, 60), "value": f"{value:,.6g}"} for name, value in numbers["classifier"].items()
        ]
    return shown


def scopes(looked: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Yields which documents lengths, languages and examples are of."""
    for folder, looks in looked.items():
        for name, each in looks.items():
            line = f"{visible(name, 60)}, {FOLDERS[folder]}: {each['documents']:,} documents looked at, from the "
            line += f"starts of {each['files_read']:,} of {each['files']:,} files"
            yield line + (f"; {each['unreadable']:,} rows or files could not be read" if each["unreadable"] else "")
