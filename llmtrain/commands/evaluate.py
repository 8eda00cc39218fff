"""Implements `llmtrain eval`: perplexity on held-out text, pass@k on held-out problems, tasks, in one process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.source import load_decoder
from llmtrain.commands.tasks import prepared, task_scores
from llmtrain.commands.testtime import accuracy_by_tokens
from llmtrain.commands.weights import of_own_run
from llmtrain.config.lm_eval import LmEvalConfig
from llmtrain.config.load import dump
from llmtrain.config.schema import Config
from llmtrain.data.ends import end_ids
from llmtrain.data.packing import TextRows
from llmtrain.data.sampler import derive
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.engine.precision import compute_dtype
from llmtrain.eval.generate import evaluate_problems
from llmtrain.eval.perplexity import perplexity
from llmtrain.eval.testtime.problems import Problems
from llmtrain.model.decoder import Decoder
from llmtrain.observe.evaluations import COMMAND, FILES, place_in_run
from llmtrain.observe.locks import locked, making
from llmtrain.observe.log import as_line, log, make_run_dir
from llmtrain.observe.owned import adopt, filling, is_run, replacing
from llmtrain.parallel.device import rank_device
from llmtrain.rewards import Score, check_rows, scorer_of, stop_if_failing
from llmtrain.rollout.native import NativeGenerator
from llmtrain.trainer.batches import text_rows
from llmtrain.trainer.completions import completion_text, prompts_of, sampling_of, stop_text
from llmtrain.trainer.job import open_tokenizer, resolved, tokenizer_dir
from llmtrain.types import Prompt

ROWS_A_BATCH = 16


def main(config: Config) -> None:
    """Writes eval.json, samples.jsonl and config.yaml: into the run directory, or where that holds a run which trains
    (or evaluations that lie apart) into its eval/<label>/."""
    make_run_dir(config.directory)
    meant = of_own_run(config)
    with results(config) as directory:
        result, samples = measured(meant)
        (directory / "config.yaml").write_text(dump(resolved(meant)), encoding="utf-8")
        (directory / "eval.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        if samples:
            write_samples(directory, config.eval.label, samples)
    log(as_line({name: value for name, value in result.items() if not isinstance(value, dict)}))
    harness = result.get("lm_eval", {}).get("tasks", {})
    for name, measures in {**result.get("text", {}), **result.get("tasks", {}), **harness}.items():
        log(f"{name}: {with_intervals(measures)}")


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


def measured(config: Config) -> tuple[dict[str, Any], list[dict]]:
    """Returns all measures, and all completions."""
    device = rank_device()
    dtype = compute_dtype(config.engine.precision)
    harness = harness_of(config.eval.lm_eval)
    tokenizer = open_tokenizer(config)
    tasks = prepared(config, tokenizer)  # their rows may be faulty: before weights are loaded
    model = load_decoder(config.model.init_from, resolve_model(config.model), dtype).to(device).eval()
    result: dict[str, Any] = {"label": config.eval.label}
    samples: list[dict] = []
    if config.eval.text:
        result |= text_scores(config, model, tokenizer)
    if config.eval.problems:
        scores, samples = problem_scores(config, model, tokenizer, device)
        result |= scores
    if tasks:
        result["tasks"], records = task_scores(config, tasks, model, tokenizer, device)
        samples += records
    if harness is not None:
        result["lm_eval"] = harness(
            model, tokenizer, end_ids(tokenizer, (config.model.init_from, tokenizer_dir(config)))
        )
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
    told = {name: f"{value:.4g}" for name, value in measures.items() if name != "interval"}
    told |= {name: f"{told[name]} ({low:.4g} to {high:.4g})" for name, (low, high) in ends.items()}
    return as_line(told)


def text_scores(config: Config, model: Decoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns loss, perplexity and bits a byte on the first `eval.text_seqs` held-out rows, and under `text` the same
    of each source by itself, on as many of its rows."""
    rows = text_rows(config, "held_out", tokenizer)
    sources = [name for name, count in rows.rows.items() if count]
    total = rows_perplexity(model, rows, config.eval.text_seqs)
    if len(sources) == 1:
        return {**total, "text": {sources[0]: total}}
    own = {name: rows_perplexity(model, rows.of_source(name), config.eval.text_seqs) for name in sources}
    return {**total, "text": own}


def rows_perplexity(model: Decoder, rows: TextRows, most: int) -> dict[str, float]:
    """Returns loss, perplexity and bits a byte on the first rows, `most` at most."""
    numbers = range(min(most, len(rows)))
    batches = (rows.batch(numbers[i : i + ROWS_A_BATCH]) for i in range(0, len(numbers), ROWS_A_BATCH))
    return perplexity(model, batches, rows.bytes_per_token)


def problem_scores(
    config: Config, model: Decoder, tokenizer: Tokenizer, device: torch.device
) -> tuple[dict[str, Any], list[dict]]:
    """Returns pass@k, majority vote and greedy accuracy on the first `eval.problems` held-out problems, and all
    completions."""
    r, reward = config.rollout, config.rewards[0]
    problems = prompts_of(config, config.data.held_out, tokenizer)
    count = min(config.eval.problems, len(problems))
    check_rows([reward], problems.examples[:count], problems.places[:count])
    scorer = scorer_of(reward)

    def judge(pairs: Sequence[tuple[int, str]]) -> list[Score]:
        scores = scorer.score([(text, problems.examples[i]) for i, text in pairs])
        stop_if_failing([reward], [{} if s.error is None else {reward.name: s.error} for s in scores])
        return scores

    prompts = [Prompt(problems.prompt_ids(i), derive(config.seed, f"eval/{i}")) for i in range(count)]
    generator = NativeGenerator(model, r.max_batch_seqs, device, config.train.seq_len, stop_text(tokenizer))
    decode = completion_text(config, tokenizer)
    scores, samples = evaluate_problems(
        generator,
        prompts,
        decode,
        judge,
        scorer.classes,
        config.eval.samples,
        sampling_of(config, tokenizer),
    )
    if config.eval.test_time is not None:
        asked = Problems(prompts, problems.examples[:count], decode, judge, scorer.classes)
        scores["test_time"] = accuracy_by_tokens(config, tokenizer, generator, asked, problems.places[:count])
    return scores, samples


def write_samples(directory: Path, label: str, samples: list[dict]) -> None:
    """Writes all completions, in the form of an RL stage's samples."""
    with open(directory / "samples.jsonl", "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": 0, "label": label, **sample}, ensure_ascii=False) + "\n")
