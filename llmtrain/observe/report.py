"""Writes the report of a run: plots and one HTML page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape as glob_escape
from glob import glob
from pathlib import Path
from statistics import fmean, median
from typing import Any

from llmtrain.config.recipes import RECIPES, Panel
from llmtrain.observe.beside import evaluation_panels, start_levels
from llmtrain.observe.costs import Cost, total_cost
from llmtrain.observe.experts import EXPERTS, expert_records
from llmtrain.observe.metrics import read_lines, read_metrics
from llmtrain.observe.owned import adopt, replacing
from llmtrain.observe.page import PAGE
from llmtrain.observe.passes import passes_image, task_tables, text_tables
from llmtrain.observe.plots import TRAINING, plot_bars, plot_curves, plot_lines, plot_spent

COMMAND = "llmtrain report"
JUDGED = ("judge.json", "constitutional.json")
SHOWN = 3  # samples from the start of a stage, and as many from its end


@dataclass
class StageRecord:
    """Holds what one stage wrote: metrics.jsonl, evaluations.jsonl, samples.jsonl, eval.json, what judged, config.yaml.

    Example: StageRecord("sft", [{"step": 1, "loss": 2.0}], [{"step": 0, "loss": 2.1}], [], None, {}, [], "seed: 0")
    """

    name: str
    metrics: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    judged: dict[str, Any]  # measures of judge.json or constitutional.json
    transcripts: list[dict[str, Any]]
    config: str | None


def write_report(run_dir: str) -> str:
    """Writes `<run_dir>/report/index.html` and its PNG plots; returns the path of the page.

    `run_dir` is one stage (it has metrics.jsonl or eval.json), or holds one directory for each stage; these are shown
    in the order of `stages.json` (a list of names), or without it in alphabetical order. Raises ValueError if nothing
    was recorded there.
    """
    from jinja2 import Environment  # comes with torch

    stages, directory = read_stages(run_dir), os.path.join(run_dir, "report")
    _adopt_earlier(Path(directory))
    with replacing(directory, COMMAND, None) as out:
        add_costs(run_dir, stages)
        evaluated = evaluations(stages)
        page = (
            Environment(autoescape=True)
            .from_string(PAGE)
            .render(
                title=os.path.basename(os.path.abspath(run_dir)),
                made_by=COMMAND,
                cleaning=_cleaning_pages(run_dir),
                evaluations=_evaluation_rows(evaluated),
                evaluation_image=_evaluation_image(str(out), evaluated),
                tasks=task_tables(evaluated),
                texts=text_tables(evaluated),
                passes_image=passes_image(str(out), evaluated),
                samples_image=_samples_image(str(out), stages),
                spent_images=_spent_images(str(out), evaluated),
                trained=[_training_row(s) for s in stages if s.metrics],
                curves={s.name: _curves(str(out), s) for s in stages if s.metrics},
                samples={s.name: _pick(s.samples) for s in stages if s.samples},
                judged={s.name: _measures(s.judged) for s in stages if s.judged},
                transcripts={s.name: _pick(s.transcripts) for s in stages if s.transcripts},
                configs={s.name: s.config for s in stages if s.config},
            )
        )
        (out / "index.html").write_text(page, encoding="utf-8")
    return os.path.join(directory, "index.html")


def _cleaning_pages(run_dir: str) -> list[str]:
    """Returns the pages on what was cleaned in the run's data directory, relative to the page of the run."""
    pages = glob(os.path.join(glob_escape(run_dir), "data", "**", "report", "index.html"), recursive=True)
    return [os.path.relpath(page, os.path.join(run_dir, "report")) for page in sorted(pages)]


def _adopt_earlier(directory: Path) -> None:
    """Marks a report of an earlier version as ours."""
    page = directory / "index.html"
    if page.is_file() and " · llmtrain report</title>" in page.read_text(encoding="utf-8", errors="replace"):
        adopt(directory, COMMAND, ("index.html", *(path.name for path in directory.glob("*.png"))))


def read_stages(run_dir: str) -> list[StageRecord]:
    """Returns the stages of a run directory that recorded something, in order. Raises ValueError if there is none."""
    if _recorded(run_dir):
        return _read_with_evaluations(os.path.basename(os.path.abspath(run_dir)), run_dir)
    listed = os.path.join(run_dir, "stages.json")
    if not os.path.isdir(run_dir):
        raise ValueError(f"{run_dir}: no such run directory; give one that a stage wrote, like runs/quickstart")
    names = json.loads(_read(listed)) if os.path.exists(listed) else sorted(os.listdir(run_dir))
    recorded = [name for name in names if _recorded(os.path.join(run_dir, name))]
    stages = [stage for name in recorded for stage in _read_with_evaluations(name, os.path.join(run_dir, name))]
    if not stages:
        raise ValueError(
            f"{run_dir}: nothing to report: no metrics.jsonl, eval.json or judge.json here or one level below"
        )
    return stages


def _recorded(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in ("metrics.jsonl", "eval.json", *JUDGED))


def _read_with_evaluations(name: str, path: str) -> list[StageRecord]:
    """Returns what a stage wrote, and each evaluation in its eval/ as a stage of its own."""
    below = sorted(found for found in glob(os.path.join(glob_escape(path), "eval", "*")) if _recorded(found))
    return [_read_stage(name, path), *(_read_stage(f"{name}: {os.path.basename(p)}", p) for p in below)]


def _read_stage(name: str, path: str) -> StageRecord:
    def find(file: str, read: Callable[[str], Any], missing: Any) -> Any:
        found = os.path.join(path, file)
        return read(found) if os.path.exists(found) else missing

    return StageRecord(
        name,
        metrics=find("metrics.jsonl", read_metrics, []),
        held_out=find("evaluations.jsonl", read_metrics, []),
        samples=find("samples.jsonl", read_lines, []),
        evaluation=find("eval.json", read_object, None),
        judged={name: value for file in JUDGED for name, value in find(file, read_object, {}).items()},
        transcripts=find("transcripts.jsonl", read_lines, []),
        config=find("config.yaml", _read, None),
    )


def read_object(path: str) -> dict[str, Any]:
    """Returns the object in a JSON file."""
    return json.loads(_read(path))


def _measures(judged: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns one table row for each measure of a judge."""
    shown = {name: "–" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in judged.items()}
    return [{"measure": name.replace("_", " "), "value": value} for name, value in shown.items()]


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def add_costs(run_dir: str, stages: Iterable[StageRecord]) -> None:
    """Adds to each evaluation of a finished stage of a run the `samples` and `cpu_s` of the stages that what it
    measured was made from."""
    recorded = {stage.name: stage for stage in stages}
    known = {}
    for path in glob(os.path.join(glob_escape(run_dir), "*", "done.json")):
        name, done = os.path.basename(os.path.dirname(path)), read_object(path)
        sampled = _sampled(recorded[name]) if name in recorded else 0
        if "made_from" in done:  # an earlier version did not write it
            known[name] = Cost(sampled, done["cpu_s"], done["made_from"])
    for name, stage in recorded.items():
        if stage.evaluation is not None and name in known and (cost := total_cost(name, known)):
            stage.evaluation |= {"samples": cost[0], "cpu_s": cost[1]}


def _sampled(stage: StageRecord) -> int:
    """Returns how many completions a stage sampled, to train on or to judge them."""
    counts = [record["samples"] for record in stage.metrics if record.get("samples") is not None]
    return (counts[-1] if counts else 0) + stage.judged.get("completions", stage.judged.get("samples", 0))


def evaluations(stages: Iterable[StageRecord]) -> dict[str, dict[str, Any]]:
    """Returns the evaluations by their label, or by the name of the stage where the label is taken."""
    evaluated: dict[str, dict[str, Any]] = {}
    for stage in stages:
        if stage.evaluation is not None:
            label = stage.evaluation["label"]
            evaluated[stage.name if label in evaluated else label] = stage.evaluation
    return evaluated


def _evaluation_rows(evaluated: Mapping[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Returns one table row for each evaluation; all rows have the columns that any of them needs."""
    digits = dict.fromkeys(_problem_measures(evaluated), 3) | {"entropy": 3, "perplexity": 2, "bits_per_byte": 3}
    digits |= {"problems": 0, "weight_step": 0, "samples": 0, "cpu_s": 0}
    used = [name for name in digits if any(e.get(name) is not None for e in evaluated.values())]
    return [
        {"model": label} | {name.replace("_", " "): _number(e.get(name), digits[name]) for name in used}
        for label, e in evaluated.items()
    ]


def _problem_measures(evaluated: Mapping[str, dict[str, Any]]) -> list[str]:
    """Returns those of greedy, pass@1, pass@8, maj@8 that were measured, in this order."""
    names = {name for e in evaluated.values() for name, value in e.items() if value is not None}
    sampled = [name for name in names if name.startswith(("pass@", "maj@"))]
    sampled.sort(key=lambda name: (name.startswith("maj@"), int(name.split("@")[1])))
    return ["greedy"] * ("greedy" in names) + sampled


def _evaluation_image(out: str, evaluated: Mapping[str, dict[str, Any]]) -> dict[str, str] | None:
    """Draws the measures as bars, all models side by side; returns None if there is nothing to draw."""
    panels = []
    for title, measures, digits in (
        ("Share of held-out problems solved", _problem_measures(evaluated), 2),
        ("Held-out text", ["perplexity"], 1),
    ):
        rows = {label: {m: e[m] for m in measures if e.get(m) is not None} for label, e in evaluated.items()}
        if any(rows.values()):
            panels.append((title, {label: row for label, row in rows.items() if row}, digits))
    if not panels:
        return None
    plot_bars(os.path.join(out, "evaluation.png"), panels)
    return {"file": "evaluation.png", "alt": ", ".join(title for title, *_ in panels)}


def _spent_images(out: str, evaluated: Mapping[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Draws accuracy against the tokens spent on a problem, a plot for each model whose test time was measured."""
    images = []
    for number, (label, evaluation) in enumerate(evaluated.items()):
        if measured := evaluation.get("test_time"):
            lines = {
                name: [(point["tokens"], point["accuracy"], *point["interval"]) for point in points]
                for name, points in measured.items()
            }
            title = f"{label}: share of problems solved, with intervals of 95 % over problems"
            file = f"test_time-{number}.png"
            plot_spent(os.path.join(out, file), title, "tokens spent on a problem", lines)
            images.append({"file": file, "alt": title})
    return images


def _samples_image(out: str, stages: Iterable[StageRecord]) -> dict[str, str] | None:
    """Draws the rewards of all stages that sampled against their samples; returns None where fewer than two did."""
    curves = {stage.name: points for stage in stages if (points := reward_curve(stage))}
    if len(curves) < 2:
        return None
    title = "Mean reward of the samples of a step"
    plot_lines(os.path.join(out, "samples.png"), title, "samples so far", curves)
    return {"file": "samples.png", "alt": title}


def reward_curve(stage: StageRecord) -> list[tuple[float, float]]:
    """Returns the points (samples so far, mean reward of a step) of a stage; none if it did not sample."""
    points = ((record.get("samples"), record.get("reward_mean")) for record in stage.metrics)
    return [(samples, reward) for samples, reward in points if samples and reward is not None]


def _curves(out: str, stage: StageRecord) -> list[dict[str, str]]:
    records = stage.metrics + [{"step": e["step"], "held_out_loss": e["loss"]} for e in stage.held_out]
    plots: list[tuple[str, tuple[Panel, ...], list[dict[str, Any]]]] = [(f"{stage.name}.png", TRAINING, records)]
    own = {suffix: panels for recipe in RECIPES.values() for suffix, panels in recipe.plots.items()}
    plots = [(f"{stage.name}-{suffix}.png", panels, records) for suffix, panels in own.items()] + plots
    plots.append((f"{stage.name}-eval.png", evaluation_panels(stage.metrics), stage.metrics))
    plots.append((f"{stage.name}-experts.png", EXPERTS, expert_records(stage.metrics)))
    levels = start_levels(stage.metrics)
    return [
        {"file": file, "alt": f"{stage.name}: " + ", ".join(title for title, _ in panels)}
        for file, panels, shown in plots
        if plot_curves(os.path.join(out, file), panels, shown, levels)
    ]


def _training_row(stage: StageRecord) -> dict[str, str]:
    def values(key: str) -> list[float]:
        return [record[key] for record in stage.metrics if record.get(key) is not None]

    speed, memory = values("tokens_per_s"), values("peak_bytes")
    return {
        "stage": stage.name,
        "steps": _number(stage.metrics[-1]["step"], 0),
        "loss": _change(values("loss")),
        "held-out loss": _change([e["loss"] for e in stage.held_out]),
        "reward": _change(values("reward_mean")),
        "tokens/s": _number(median(speed) if speed else None, 0),
        "time": _duration(sum(values("step_s"))),
        "peak memory": f"{max(memory) / 2**30:.2f} GiB" if memory else "–",
    }


def _change(values: Sequence[float]) -> str:
    if not values:
        return "–"
    tenth = max(1, len(values) // 10)
    return f"{fmean(values[:tenth]):.3g} → {fmean(values[-tenth:]):.3g}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _pick(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return samples if len(samples) <= 2 * SHOWN else samples[:SHOWN] + samples[-SHOWN:]
