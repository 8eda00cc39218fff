"""What `llmtrain export` passes on to the directory that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from llmtrain.arch.resolve import resolve_model
from llmtrain.commands.export import main
from llmtrain.config.load import load
from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf_write import save_hf


def test_a_scalar_head_is_exported_with_the_tokenizers_padding(small: Path, small_data: Path, tmp_path: Path) -> None:
    model = resolve_model(ModelConfig(head="scalar", num_layers=1, hidden_size=8, vocab_size=512))
    weights = {name: init_tensor(name, shape, model, 3) for name, shape in parameter_shapes(model).items()}
    save_hf(str(tmp_path / "there"), model, weights.items(), torch.float32, None, None)
    (tmp_path / "x.yaml").write_text(f"tokenizer: {{path: {small_data}/tokenizer}}")
    main(load(str(tmp_path / "x.yaml"), [f"model.init_from={tmp_path}/there", f"export.path={tmp_path}/out"]))
    tokenizer = load_tokenizer(f"{small_data}/tokenizer")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert tokenizer.pad_id != tokenizer.eos_id == written["eos_token_id"]
    assert written["pad_token_id"] == tokenizer.pad_id and written["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    score = load_file(tmp_path / "out" / "model.safetensors")["score.weight"]
    assert torch.equal(score, weights["head.weight"].to(score.dtype))
