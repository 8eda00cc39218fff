"""Batch size never changes a score: a small real model, one, three and sixty-four sequences at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.config.tasks import EvalTask, TaskData
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.eval.continuations import continuation_logprobs
from llmtrain.eval.tasks.measure import measure_generation, measure_likelihoods
from llmtrain.eval.tasks.problems import Problem, encode_problems, read_problems
from llmtrain.eval.tasks.scoring import Judge
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.rollout.native import NativeGenerator

COUNT = 9
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = ModelConfig(num_layers=2, hidden_size=32, ffn_size=48, vocab_size=512, max_positions=256)
    made = Decoder(resolve_model(config))
    initialize(made, made.config, seed=0)
    for parameter in made.requires_grad_(False).parameters():
        parameter.mul_(4 if parameter.dim() == 2 else 1)  # so that answers depend on prompts
    return made.eval()


@pytest.fixture(scope="module")
def tokenizer(small_data: Path) -> Tokenizer:
    return load_tokenizer(str(small_data / "tokenizer"))


def asked(task: EvalTask, tokenizer: Tokenizer) -> list[Problem]:
    problems = read_problems(task, 0)
    encode_problems(task, problems, tokenizer, 256)
    return problems


def test_generation(model: Decoder, tokenizer: Tokenizer) -> None:
    """Greedy completions, samples, and every measure of them."""
    data = TaskData(generator="chain_sum", size=COUNT)
    task = EvalTask(name="g", data=data, prompt="{{question}}", score="exact", extract="whole", stop=["e"])
    task = task.model_copy(update={"max_new_tokens": 12, "samples": 4, "few_shot": 1, "solution": "{{answer}}"})
    problems, found = asked(task, tokenizer), []
    for seqs in (1, 3, 64):
        decode = partial(tokenizer.decode, skip_special=False)
        generator = NativeGenerator(model, seqs, CPU, decode=decode)
        found.append(measure_generation(Judge(task, problems), generator, decode, (tokenizer.eos_id,), range(COUNT)))
    for scores, records in found[1:]:
        # its sums of log-probs differ by rounding, in the sixth digit
        assert scores.pop("entropy") == pytest.approx(found[0][0]["entropy"], rel=1e-4)
        assert records == found[0][1] and scores == {k: v for k, v in found[0][0].items() if k != "entropy"}
    records = found[0][1]
    assert len(records) == 5 * COUNT and len({r["completion"] for r in records}) > 3 * COUNT
    assert {"greedy", "pass@1", "pass@2", "pass@4", "avg@4", "maj@4", "interval", "tokens"} <= found[0][0].keys()


def test_options(model: Decoder, tokenizer: Tokenizer) -> None:
    data = TaskData(generator="chain_sum", size=COUNT)
    choices = ["{{answer}}", "17", "no number at all", "{{question}}"]
    task = EvalTask(name="o", kind="options", data=data, prompt="{{question}}\nAnswer:", choices=choices)
    problems = asked(task, tokenizer)
    scored = partial(continuation_logprobs, model, device=CPU)
    found = [measure_likelihoods(problems, partial(scored, batch_tokens=n)) for n in (1, 200, 8192)]
    one_by_one = [v for p in problems for pair in p.option_ids for v in scored([pair])]
    for scores, records in found:
        assert scores == found[0][0]
        assert [v for r in records for v in r["logprobs"]] == pytest.approx(one_by_one, abs=1e-3)
    assert len({round(value, 2) for value in one_by_one}) > 3 * COUNT
