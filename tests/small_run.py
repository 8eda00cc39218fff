"""Provides a run that takes seconds: its text, its tokenizer and shards (made once), and its configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.schema import DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from llmtrain.data.prepare import prepare

DOCUMENT = """
name: small
seed: 1
model:
  {{num_layers: 4, hidden_size: 32, ffn_size: 48, num_heads: 4, num_kv_heads: 2, vocab_size: 512, max_positions: 256}}
tokenizer: {{path: {data}/tokenizer, vocab_size: 512}}
data: {{path: {data}/shards, train: {data}/shards/sums-train.jsonl, held_out: {data}/shards/sums-held_out.jsonl}}
engine: {{precision: fp32, zero_stage: 1, timeout_s: 60}}
optim: {{lr: 3.0e-3, min_lr: 3.0e-4, warmup_steps: 2}}
train: {{steps: 6, seq_len: 64, micro_batch_seqs: 2, global_batch_seqs: 8, eval_seqs: 8}}
rollout: {{group_size: 4, max_new_tokens: 8}}
grpo: {{prompts_per_step: 4}}
checkpoint: {{every_steps: 3, keep: 10}}
log: {{wandb: "off"}}
"""


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the directory with `tokenizer`, `shards` and the task `sums`."""
    base = tmp_path_factory.mktemp("small")
    data = DataConfig(
        sources=[SourceConfig(name="topics", type="topics", max_bytes=120_000)],
        tasks=[TaskConfig(name="sums", type="chain_sum", train=64, held_out=16)],
    )
    prepare(data, TokenizerConfig(vocab_size=512), str(base / "shards"), str(base / "tokenizer"), seed=1)
    return base


@pytest.fixture
def small(small_data: Path, tmp_path: Path) -> Path:
    """Returns the path of the configuration file."""
    path = tmp_path / "small.yaml"
    path.write_text(DOCUMENT.format(data=small_data))
    return path
