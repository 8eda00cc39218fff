"""`llmtrain eval`: perplexity on held-out text, pass@k on held-out problems. One process."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.source import load_decoder
from llmtrain.config.load import dump
from llmtrain.config.schema import Config
from llmtrain.data.prompts import PromptSet
from llmtrain.data.sampler import derive
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.engine.precision import compute_dtype
from llmtrain.eval.generate import evaluate_problems
from llmtrain.eval.perplexity import perplexity
from llmtrain.model.decoder import Decoder
from llmtrain.observe.log import log, make_run_dir
from llmtrain.rewards import Score, check_rows, scorer_of, stop_if_failing
from llmtrain.rollout.native import NativeGenerator
from llmtrain.trainer.batches import text_rows
from llmtrain.trainer.job import resolved, tokenizer_dir
from llmtrain.types import Prompt, Sampling

ROWS_A_BATCH = 16


def main(config: Config) -> None:
    """Writes eval.json and samples.jsonl into the run directory."""
    make_run_dir(config.directory)
    with open(os.path.join(config.directory, "config.yaml"), "w", encoding="utf-8") as file:
        file.write(dump(resolved(config)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(config.engine.precision)
    model = load_decoder(config.model.init_from, resolve_model(config.model), dtype).to(device).eval()
    tokenizer = load_tokenizer(tokenizer_dir(config))
    result: dict[str, object] = {"label": config.eval.label}
    if config.eval.text:
        result |= text_scores(config, model, tokenizer)
    if config.eval.problems:
        scores, samples = problem_scores(config, model, tokenizer, device)
        result |= scores
        write_samples(config, samples)
    with open(os.path.join(config.directory, "eval.json"), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=2)
    log(
        "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in result.items()
        )
    )


def text_scores(config: Config, model: Decoder, tokenizer: Tokenizer) -> dict[str, float]:
    """Loss, perplexity and bits a byte on the held-out shards."""
    rows = text_rows(config, "held_out", tokenizer)
    numbers = range(min(config.eval.text_seqs, len(rows)))
    batches = (rows.batch(numbers[i : i + ROWS_A_BATCH]) for i in range(0, len(numbers), ROWS_A_BATCH))
    return perplexity(model, batches, rows.bytes_per_token)


def problem_scores(
    config: Config, model: Decoder, tokenizer: Tokenizer, device: torch.device
) -> tuple[dict[str, float], list[dict]]:
    """pass@k, majority and greedy on the first `eval.problems` held-out problems."""
    r, reward = config.rollout, config.rewards[0]
    problems = PromptSet(config.data.held_out, tokenizer, config.train.seq_len - r.max_new_tokens)
    count = min(config.eval.problems, len(problems))
    check_rows([reward], problems.examples[:count], problems.places[:count])
    scorer = scorer_of(reward)

    def judge(pairs: Sequence[tuple[int, str]]) -> list[Score]:
        scores = scorer.score([(text, problems.examples[i]) for i, text in pairs])
        stop_if_failing([reward], [{} if s.error is None else {reward.name: s.error} for s in scores])
        return scores

    prompts = [Prompt(problems.prompt_ids(i), derive(config.seed, f"eval/{i}")) for i in range(count)]
    return evaluate_problems(
        NativeGenerator(model, r.max_batch_seqs, device, config.train.seq_len),
        prompts,
        tokenizer.decode,
        judge,
        scorer.classes,
        config.eval.samples,
        Sampling(r.max_new_tokens, 1, r.temperature, r.top_p, r.top_k, (tokenizer.eos_id,)),
    )


def write_samples(config: Config, samples: list[dict]) -> None:
    """All completions, in the form of an RL stage's samples."""
    with open(os.path.join(config.directory, "samples.jsonl"), "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": 0, "label": config.eval.label, **sample}, ensure_ascii=False) + "\n")
