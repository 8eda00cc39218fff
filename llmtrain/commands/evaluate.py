"""Implements `llmtrain eval`: perplexity on held-out text, held-out problems, tasks, on one rank or several."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.source import load_decoder
from llmtrain.commands.tasks import judges_of, prepared, task_scores
from llmtrain.commands.testtime import accuracy_by_tokens
from llmtrain.commands.weights import of_own_run
from llmtrain.config.lm_eval import LmEvalConfig
from llmtrain.config.load import dump
from llmtrain.config.schema import Config
from llmtrain.data.ends import end_ids
from llmtrain.data.packing import TextRows
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.engine.precision import compute_dtype
from llmtrain.eval.perplexity import perplexity
from llmtrain.eval.ranks import IDLE_S, agreed, lead, sharing
from llmtrain.model.decoder import Decoder
from llmtrain.observe.evaluations import COMMAND, FILES, place_in_run
from llmtrain.observe.locks import locked, making
from llmtrain.observe.log import as_line, log, make_run_dir
from llmtrain.observe.owned import adopt, filling, is_run, replacing
from llmtrain.parallel.device import rank_device
from llmtrain.parallel.mesh import Mesh, init_mesh, shutdown
from llmtrain.rollout.generator import Generator
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.stop import Decode
from llmtrain.rollout.vllm import VllmGenerator
from llmtrain.trainer.batches import text_rows
from llmtrain.trainer.completions import stop_text
from llmtrain.trainer.environments import answering
from llmtrain.trainer.evaluating import by_source, posed, read_problems, sharded_text
from llmtrain.trainer.evaluating import problem_scores as sampled_scores
from llmtrain.trainer.job import open_tokenizer, resolved, tokenizer_dir

ROWS_A_BATCH = 16
T = TypeVar("T")
Scored = tuple[dict[str, Any], list[dict[str, Any]]]
"""Holds measures by name, and a record of each completion."""


def main(config: Config) -> None:
    """Writes eval.json, samples.jsonl and config.yaml: into the run directory, or where that holds a run which trains
    (or evaluations that lie apart) into its eval/<label>/. Under torchrun the ranks share the work, and rank 0
    writes."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    mesh = init_mesh(config.parallel, None, config.engine.timeout_s) if several else None
    with ExitStack() as stack:
        meant, directory = opened(config, mesh, stack)
        result, samples = measured(meant, mesh)
        if directory is not None:
            (directory / "config.yaml").write_text(dump(resolved(meant)), encoding="utf-8")
            (directory / "eval.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
            if samples:
                write_samples(directory, config.eval.label, samples)
    tell(result)
    shutdown()


def tell(result: dict[str, Any]) -> None:
    """Logs the measures: those of the whole in one line, then a line for each source of text and each task."""
    log(as_line({name: value for name, value in result.items() if not isinstance(value, dict)}))
    harness = result.get("lm_eval", {}).get("tasks", {})
    for name, measures in {**result.get("text", {}), **result.get("tasks", {}), **harness}.items():
        log(f"{name}: {with_intervals(measures)}")


def together(mesh: Mesh | None, action: Callable[[], T]) -> T:
    """Returns what `action` makes on this rank. Where it fails on one rank, all end (a collective)."""
    return action() if mesh is None else agreed(mesh, action)


def opened(config: Config, mesh: Mesh | None, stack: ExitStack) -> tuple[Config, Path | None]:
    """Returns the configuration with the weights that it means, and the directory to write into, on other ranks than 0
    None (a collective); `stack` ends it."""

    def meant() -> Config:
        make_run_dir(config.directory)
        return of_own_run(config)

    found, writes = together(mesh, meant), mesh is None or mesh.rank == 0
    return found, together(mesh, lambda: stack.enter_context(results(config)) if writes else None)


@contextmanager
def results(config: Config) -> Iterator[Path]:
    """Yields a directory to write into, whose files go to their place when the block ends well."""
    if is_run(config.directory) or os.path.isdir(os.path.join(config.directory, "eval")):
        target = place_in_run(config.directory, config.eval.label)
        with making(target), replacing(target, COMMAND, config.model.init_from) as directory:
            yield directory
        return
    with locked(config.directory):
        adopt_earlier(Path(config.directory))
        with filling(config.directory, COMMAND, FILES) as directory:
            yield directory


def adopt_earlier(directory: Path) -> None:
    """Marks what an evaluation of an earlier version wrote as ours."""
    with suppress(OSError, ValueError):
        if "label" in json.loads((directory / "eval.json").read_text(encoding="utf-8")):
            adopt(directory, COMMAND, FILES)


def measured(config: Config, mesh: Mesh | None) -> Scored:
    """Returns all measures, and all completions; of those that are sampled on rank 0 alone (a collective)."""
    asked, harness, tokenizer = config.eval, harness_of(config.eval.lm_eval), open_tokenizer(config)
    tasks = together(mesh, lambda: prepared(config, tokenizer))  # their rows may be faulty: before weights are loaded
    judges = together(mesh, lambda: judges_of(tasks) if mesh is None or mesh.rank == 0 else [])
    result: dict[str, Any] = {"label": asked.label}
    samples: list[dict[str, Any]] = []
    if asked.text and mesh is not None:
        result |= sharded_text(config, tokenizer, mesh)
    model = whole_model(config, mesh) if mesh is None or asked.problems or tasks else None
    if asked.text and mesh is None:
        result |= text_scores(config, model, tokenizer)
    if asked.problems:
        scores, samples = problem_scores(config, model, tokenizer, mesh)
        result |= scores
    if tasks:
        work = partial(task_scores, config, tasks, judges, model, tokenizer)
        result["tasks"], records = led(config, model, tokenizer, mesh, None, work)
        samples += records
    if harness is not None:  # in one process, see the rules
        ends = end_ids(tokenizer, (config.model.init_from, tokenizer_dir(config)))
        result["lm_eval"] = harness(model, tokenizer, ends)
    return result, samples


def harness_of(section: LmEvalConfig) -> Callable[[Decoder, Tokenizer, Sequence[int]], dict[str, object]] | None:
    """Returns what runs the tasks of the lm-evaluation-harness, None where none is named. Raises ValueError for a name
    that it does not know, before a model is loaded."""
    if not section.tasks:
        return None
    from llmtrain.eval.lm_eval import scores_of, tasks_of  # the library is an extra

    return partial(scores_of, section, tasks_of(section))


def with_intervals(measures: dict[str, Any]) -> str:
    """Returns measures as one line, each with its interval. Example: {"acc": 0.5, "interval": {"acc": [0.4, 0.6]}} ->
    "acc 0.5 (0.4 to 0.6)"."""
    ends = measures.get("interval", {})
    shown = {name: value for name, value in measures.items() if name != "interval"}
    told = {name: f"{value:.4g}" if isinstance(value, int | float) else str(value) for name, value in shown.items()}
    told |= {name: f"{told[name]} ({low:.4g} to {high:.4g})" for name, (low, high) in ends.items()}
    return as_line(told)


def whole_model(config: Config, mesh: Mesh | None) -> Decoder:
    """Returns the model, whole on each rank, on its device (a collective)."""
    device, dtype = rank_device(), compute_dtype(config.engine.precision)
    load = partial(load_decoder, config.model.init_from, resolve_model(config.model), dtype)
    return together(mesh, lambda: load().to(device).eval())


def text_scores(config: Config, model: Decoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns loss, perplexity and bits a byte on the first `eval.text_seqs` held-out rows, and by source."""
    rows = text_rows(config, "held_out", tokenizer)
    return by_source(rows, lambda part: rows_perplexity(model, part, config.eval.text_seqs, tokenizer))


def rows_perplexity(model: Decoder, rows: TextRows, most: int, tokenizer: Tokenizer) -> dict[str, float]:
    """Returns loss, perplexity and bits a byte on the first rows, `most` at most."""
    numbers = range(min(most, len(rows)))
    batches = (rows.batch(numbers[i : i + ROWS_A_BATCH]) for i in range(0, len(numbers), ROWS_A_BATCH))
    return perplexity(model, batches, rows.bytes_per_token(most, tokenizer.decode))


def problem_scores(config: Config, model: Decoder, tokenizer: Tokenizer, mesh: Mesh | None) -> Scored:
    """Returns what is measured on the first `eval.problems` held-out problems, and all completions; nothing on other
    ranks than 0 (a collective)."""
    most_tokens = min(config.train.seq_len, model.config.max_positions)

    def work(generator: Generator) -> Scored:
        rows = read_problems(config, tokenizer)
        problems = posed(config, rows, tokenizer)
        scores, samples = sampled_scores(config, problems, tokenizer, generator)
        if config.eval.test_time is not None:
            places = rows.places[: len(problems.prompts)]
            scores["test_time"] = accuracy_by_tokens(config, tokenizer, generator, most_tokens, problems, places)
        return scores, samples

    return led(config, model, tokenizer, mesh, most_tokens, work, partial(answering, config, tokenizer))


def led(
    config: Config,
    model: Decoder,
    tokenizer: Tokenizer,
    mesh: Mesh | None,
    most_tokens: int | None,
    work: Callable[[Generator], Scored],
    through: Callable[[Generator], Generator] = lambda generator: generator,
) -> Scored:
    """Returns what `work` makes with a generator of `model`, on sequences of `most_tokens` at most (None: the model's
    limit), which answers `through` an environment where there is one. Each rank answers its share of what it asks for;
    the rest is done on rank 0, and others get nothing (a collective)."""
    with closing(together(mesh, lambda: generator_of(config, model, most_tokens, stop_text(tokenizer)))) as generator:
        answers = through(generator)
        if mesh is None:
            return work(answers)
        return lead(mesh.side_group(IDLE_S), sharing(generator, mesh, answers.generate), work) or ({}, [])


def generator_of(config: Config, model: Decoder, most_tokens: int | None, decode: Decode) -> Generator:
    """Returns what samples from the model on this rank, as `rollout.generator` says."""
    r, device = config.rollout, rank_device()
    if r.generator == "native":
        return NativeGenerator(model, r.max_batch_seqs, device, most_tokens, decode)
    generator = VllmGenerator(model.config, r, compute_dtype(config.engine.precision), device, most_tokens, decode)
    generator.load_weights(model.state_dict().items(), 0)
    return generator


def write_samples(directory: Path, label: str, samples: list[dict]) -> None:
    """Writes all completions, in the form of an RL stage's samples."""
    with open(directory / "samples.jsonl", "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": 0, "label": label, **sample}, ensure_ascii=False) + "\n")
