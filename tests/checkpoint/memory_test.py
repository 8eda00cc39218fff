"""Nobody holds the whole model to bring it in, to save it, or to write it out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import parameter_shapes
from llmtrain.model.hf_write import save_hf

# 50M parameters, 201 MB as fp32; the largest tensor is 4 % of it
CONFIG = resolve_model(
    ModelConfig(
        num_layers=14, hidden_size=512, ffn_size=1536, num_heads=8, num_kv_heads=8, vocab_size=4096, tie_embeddings=True
    )
)


@pytest.mark.timeout(200)
def test_memory_of_import_save_and_export(tmp_path: Path, torchrun: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = ((name, torch.randn(shape, generator=generator)) for name, shape in parameter_shapes(CONFIG).items())
    save_hf(str(tmp_path / "hf"), CONFIG, weights, torch.float32, None, None)
    worker = Path(__file__).parent / "memory_worker.py"
    mapped = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}  # a tensor that is freed is resident no more
    result = torchrun(2, worker, tmp_path, CONFIG.model_dump_json(), env=mapped)
    assert result.returncode == 0, result.stdout[-3000:]
    (ranks,) = (json.loads(line) for line in result.stdout.splitlines() if line.startswith("[{"))
    assert len(ranks) == 2
    for shares in ranks:
        assert 0.4 < shares["import"] < 0.75, ranks  # its half, and one tensor at a time
        for backend in ("fsdp", "deepspeed"):
            for source in ("hf", "checkpoint"):
                assert 0.4 < shares[f"{backend} {source}"] < 0.75, ranks
        assert shares["save"] < 0.1 and shares["export"] < 0.25, ranks
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
