"""Implements `llmtrain eval`: perplexity on held-out text, pass@k on held-out problems, on one rank or several."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.source import load_decoder
from llmtrain.commands.weights import of_own_run
from llmtrain.config.load import dump
from llmtrain.config.schema import Config
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.engine.precision import compute_dtype
from llmtrain.eval.perplexity import perplexity
from llmtrain.eval.ranks import IDLE_S, Agreeing, agreed, lead
from llmtrain.model.decoder import Decoder
from llmtrain.observe.evaluations import COMMAND, FILES, place_in_run
from llmtrain.observe.locks import locked, making
from llmtrain.observe.log import as_line, log, make_run_dir
from llmtrain.observe.owned import adopt, filling, is_run, replacing
from llmtrain.parallel.device import rank_device
from llmtrain.parallel.mesh import Mesh, init_mesh, shutdown
from llmtrain.rollout.generator import Generator
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.worker import ColocatedGenerator
from llmtrain.trainer.batches import text_rows
from llmtrain.trainer.completions import stop_text
from llmtrain.trainer.evaluating import problem_scores as sampled_scores
from llmtrain.trainer.evaluating import read_problems, sharded_text
from llmtrain.trainer.job import open_tokenizer, resolved

ROWS_A_BATCH = 16


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
    log(as_line(result))
    shutdown()


def opened(config: Config, mesh: Mesh | None, stack: ExitStack) -> tuple[Config, Path | None]:
    """Returns the configuration with the weights that it means, and the directory to write into, on other ranks than 0
    None (a collective); `stack` ends it."""
    found: list[Config] = []

    def open_() -> None:
        make_run_dir(config.directory)
        found.append(of_own_run(config))

    if mesh is None:
        open_()
        return found[0], stack.enter_context(results(config))
    agreed(mesh, open_)
    places: list[Path] = []
    agreed(mesh, lambda: places.append(stack.enter_context(results(config))) if mesh.rank == 0 else None)
    return found[0], next(iter(places), None)


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


def measured(config: Config, mesh: Mesh | None) -> tuple[dict[str, object], list[dict]]:
    """Returns all measures, and all completions; of those that are sampled on rank 0 alone (a collective)."""
    tokenizer, asked = open_tokenizer(config), config.eval
    result: dict[str, object] = {"label": asked.label}
    samples: list[dict] = []
    if asked.text and mesh is not None:
        result |= sharded_text(config, tokenizer, mesh)
    model = whole_model(config, mesh) if mesh is None or asked.problems else None
    if asked.text and mesh is None:
        result |= text_scores(config, model, tokenizer)
    if asked.problems:
        scores, samples = problem_scores(config, model, tokenizer, mesh)
        result |= scores
    return result, samples


def whole_model(config: Config, mesh: Mesh | None) -> Decoder:
    """Returns the model, whole on each rank, on its device (a collective)."""
    device, dtype, loaded = rank_device(), compute_dtype(config.engine.precision), list[Decoder]()

    def load() -> None:
        loaded.append(load_decoder(config.model.init_from, resolve_model(config.model), dtype).to(device).eval())

    load() if mesh is None else agreed(mesh, load)
    return loaded[0]


def text_scores(config: Config, model: Decoder, tokenizer: Tokenizer) -> dict[str, float]:
    """Returns loss, perplexity and bits a byte on the held-out shards."""
    rows = text_rows(config, "held_out", tokenizer)
    numbers = range(min(config.eval.text_seqs, len(rows)))
    batches = (rows.batch(numbers[i : i + ROWS_A_BATCH]) for i in range(0, len(numbers), ROWS_A_BATCH))
    return perplexity(model, batches, rows.bytes_per_token)


def problem_scores(
    config: Config, model: Decoder, tokenizer: Tokenizer, mesh: Mesh | None
) -> tuple[dict[str, float], list[dict]]:
    """Returns pass@k, majority vote and greedy accuracy on the first `eval.problems` held-out problems, and all
    completions; nothing on other ranks than 0. Each rank answers its share (a collective)."""
    r, device = config.rollout, rank_device()
    generator = NativeGenerator(model, r.max_batch_seqs, device, config.train.seq_len, stop_text(tokenizer))

    def work(answering: Generator) -> tuple[dict[str, float], list[dict]]:
        return sampled_scores(config, read_problems(config, tokenizer), tokenizer, answering)

    if mesh is None:
        return work(generator)
    shared = ColocatedGenerator(Agreeing(generator, mesh), mesh)
    return lead(mesh.side_group(IDLE_S), shared, work) or ({}, [])


def write_samples(directory: Path, label: str, samples: list[dict]) -> None:
    """Writes all completions, in the form of an RL stage's samples."""
    with open(directory / "samples.jsonl", "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": 0, "label": label, **sample}, ensure_ascii=False) + "\n")
