"""Every document under configs/ loads, passes its checks on the ranks it is for, can be planned, and dumps."""

from __future__ import annotations

import json
import re
from functools import reduce
from pathlib import Path

import pytest

from llmtrain.config.load import dump, load
from llmtrain.config.schema import Config, RunConfig
from llmtrain.rules.check import planned_stages, violations
from llmtrain.scaling.describe import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.name != "principles.yaml")
# The folder says which command a document is for; elsewhere a comment such as `# llmtrain data ...` does.
COMMANDS = ("data", "pretrain", "sft", "grpo", "eval")
MADE_FIRST = re.compile(r"does not exist; |has neither config.json .* nor config.yaml")  # by other commands


def command_of(path: Path) -> str:
    return path.parent.name if path.parent.name in COMMANDS else "plan"


def ranks_of(config: Config) -> int:
    p, rollout = config.parallel, config.rollout
    workers = rollout.workers if rollout.placement == "separate" else 0
    return p.pp * p.dp_replicate * max(1, p.dp_shard) * p.cp * p.tp + workers


def faults(path: Path) -> list[str]:
    config = load(str(path), [])
    if isinstance(config, RunConfig):
        stages = planned_stages(config)
        return [v for s, c, earlier in stages for v in violations(c, s.ranks, s.command, config.directory, earlier)]
    return violations(config, ranks_of(config), command_of(path))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_document_is_right(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [fault for fault in faults(path) if not MADE_FIRST.search(fault)] == []
    config = load(str(path), [])
    (tmp_path / "dump.yaml").write_text(dump(config))
    assert load(str(tmp_path / "dump.yaml"), []) == config
    main(config)
    assert capsys.readouterr().out


CONTRACT = {  # the keys that users rely on, each with another value than in tiny.yaml
    **{"name": "other", "run_dir": "elsewhere", "seed": 1, "tokenizer.path": ".", "data.path": "."},
    **{"model.preset": "llama3-8b", "model.init_from": ".", "model.attention": "gqa", "model.head_dim": 16},
    **{"model.num_layers": 6, "model.hidden_size": 64, "model.ffn_size": 96, "model.vocab_size": 2048},
    **{"model.num_heads": 8, "model.num_kv_heads": 4, "parallel.pp": 2, "parallel.dp_replicate": 2},
    **{"parallel.dp_shard": 2, "parallel.cp": 2, "parallel.tp": 2, "parallel.ep": 1, "parallel.schedule": "zbv"},
    **{"parallel.sequence_parallel": False, "engine.backend": "fsdp", "engine.zero_stage": 3, "engine.remat": "full"},
    **{"engine.offload": "params", "engine.precision": "fp16", "engine.compile": True, "optim.name": "muon"},
    **{"optim.lr": 0.01, "optim.min_lr": 0.001, "optim.betas": [0.8, 0.9], "optim.weight_decay": 0.0},
    **{"optim.grad_clip": 0.0, "optim.schedule": "linear", "optim.warmup_steps": 1, "train.steps": 3},
    **{"train.seq_len": 64, "train.micro_batch_seqs": 2, "train.global_batch_seqs": 32},
    "train.batch_ramp": [{"from_tokens": 9, "global_batch_seqs": 64}],
    "train.seq_ramp": [{"from_tokens": 9, "seq_len": 256, "rope_theta": 50000.0, "rope_scaling": None}],
    **{"rollout.generator": "native", "rollout.placement": "separate", "rollout.workers": 1, "rollout.group_size": 4},
    **{"rollout.max_new_tokens": 8, "rollout.temperature": 0.5, "checkpoint.every_steps": 5, "checkpoint.keep": 1},
    **{"checkpoint.resume": "never", "log.every_steps": 2, "log.wandb": "off", "log.project": "other"},
}


@pytest.mark.parametrize("key", CONTRACT)
def test_every_key_of_the_contract_can_be_overridden_on_tiny(key: str) -> None:
    found = load(str(ROOT / "configs/pretrain/tiny.yaml"), [f"{key}={json.dumps(CONTRACT[key])}"]).model_dump(
        mode="json"
    )
    assert reduce(lambda section, name: section[name], key.split("."), found) == CONTRACT[key]


def test_there_are_documents() -> None:
    assert DOCUMENTS
