"""`llmtrain eval` writes what it measured on text, by source, and on tasks, with intervals and samples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llmtrain.commands import evaluate
from llmtrain.config.load import load
from llmtrain.config.schema import DataConfig, ModelConfig, SourceConfig, TokenizerConfig
from llmtrain.data.prepare import prepare
from tests.model.llama import random_llama

SHAPE = ModelConfig(
    num_layers=2, hidden_size=32, ffn_size=48, num_heads=4, num_kv_heads=2, vocab_size=512, max_positions=256
)


def test_text_by_source_and_tasks(small: Path, small_data: Path, capsys: pytest.CaptureFixture) -> None:
    base = small.parent
    random_llama(SHAPE, seed=1).save_pretrained(base / "model")
    kinds = {"prose": "topics", "sums": "arithmetic"}
    sources = [SourceConfig(name=n, type=t, max_bytes=30_000, count=300, held_out=0.2) for n, t in kinds.items()]
    tokenizer = TokenizerConfig(vocab_size=512)
    prepare(DataConfig(sources=sources), tokenizer, str(base / "shards"), str(small_data / "tokenizer"), seed=1)
    sums = "{task: chain_sum, limit: 5, samples: 4, max_new_tokens: 6}"
    choices = "choices: ['{{answer}}', x], first_option: null"
    options = f"{{name: o, kind: options, data: {{generator: gcd, size: 4}}, prompt: '{{{{question}}}}', {choices}}}"
    keys = [f"data.path={base}/shards", "eval.problems=0", "eval.text_seqs=1000", f"eval.tasks=[{sums}, {options}]"]
    keys += [f"run_dir={base}/run", f"model.init_from={base}/model", "model.num_layers=2", "train.seq_len=32"]
    evaluate.main(load(str(small), keys))
    found = json.loads((base / "run" / "eval.json").read_text())
    assert found["text"].keys() == kinds.keys()
    for own in [*found["text"].values(), found]:
        assert own["perplexity"] == pytest.approx(math.exp(own["loss"]))
    losses = [own["loss"] for own in found["text"].values()]
    assert min(losses) < found["loss"] < max(losses)  # the mean of all rows
    assert found["text"]["sums"]["bits_per_byte"] != found["text"]["prose"]["bits_per_byte"]
    assert found["tasks"]["chain_sum"]["problems"] == 5 and found["tasks"]["o"]["problems"] == 4
    assert found["tasks"]["chain_sum"]["interval"].keys() >= {"greedy", "pass@1", "pass@2", "pass@4", "avg@4", "maj@4"}
    assert found["tasks"]["o"].keys() == {"acc", "acc_tokens", "acc_bytes", "interval", "problems"}
    samples = [json.loads(line) for line in (base / "run" / "samples.jsonl").read_text().splitlines()]
    assert [s["task"] for s in samples] == ["chain_sum"] * 25 + ["o"] * 4
    assert samples[0]["prompt"].endswith("Give the answer as <answer>number</answer>.\n")
    assert "\nchain_sum: greedy 0 (0 to 0)" in capsys.readouterr().err


def test_measures_of_any_kind_are_told() -> None:
    """The harness's tasks have a version, which is a number or a text, and counts that may be unknown."""
    told = {"acc,none": 0.25, "problems": None, "version": "1.0", "interval": {"acc,none": [0.1, 0.5]}}
    assert evaluate.with_intervals(told) == "acc,none 0.25 (0.1 to 0.5)  problems None  version 1.0"
