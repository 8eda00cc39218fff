"""What `llmtrain export` passes on to the directory that it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmtrain.arch.resolve import resolve_model
from llmtrain.commands.export import main
from llmtrain.config.load import load
from llmtrain.config.schema import ModelConfig
from llmtrain.data.chat import CHATML
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.trainer.completions import sampling_of
from llmtrain.trainer.job import keep_generation


def chatting(small_data: Path, directory: Path) -> str:
    """A model whose documents end with token 1 and whose turns end with <|im_end|>, with several chat templates."""
    model = resolve_model(ModelConfig(num_layers=1, hidden_size=8, vocab_size=520, num_kv_heads=4))
    weights = ((name, init_tensor(name, shape, model, 3)) for name, shape in parameter_shapes(model).items())
    theirs = load_tokenizer(f"{small_data}/tokenizer").hugging_face
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<stop>"]})  # 512 to 514
    theirs.chat_template = {"default": CHATML, "tool_use": "{{ messages }}"}
    theirs.save_pretrained(directory)
    save_hf(str(directory / "model"), model, weights, torch.float32, str(directory), 1)
    settings = {"eos_token_id": [514, 1], "pad_token_id": 9999, "top_k": 7}
    (directory / "model" / "generation_config.json").write_text(json.dumps(settings))
    return str(directory / "model")


def test_end_tokens_and_templates_survive_a_run(small_data: Path, tmp_path: Path) -> None:
    """The run starts from the model with a tokenizer that lies elsewhere; the directory it started from is gone when it
    is exported."""
    start, kept = chatting(small_data, tmp_path), str(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "additional_chat_templates"):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        shutil.move(Path(start, name), Path(kept, name))
    shutil.copy(Path(start, "chat_template.jinja"), kept)
    document = tmp_path / "x.yaml"
    document.write_text(f"run_dir: {tmp_path}/run\nmodel: {{init_from: {start}}}\ntokenizer: {{path: {kept}}}\n")
    config = load(str(document), [])
    (tmp_path / "run").mkdir()
    keep_generation(config)
    generation = {"eos_token_id": [514, 1, 513], "top_k": 7}
    assert json.loads((tmp_path / "run" / "generation_config.json").read_text()) == generation
    assert set(sampling_of(config, load_tokenizer(kept)).stop_ids) == {1, 513, 514}
    weights = tmp_path / "run" / "model.safetensors"  # stand in for a checkpoint
    shutil.move(Path(start, "model.safetensors"), weights)
    shutil.move(Path(start, "config.json"), tmp_path / "run" / "config.json")
    shutil.rmtree(start)
    main(load(str(document), [f"model.init_from={tmp_path}/run", f"export.path={tmp_path}/out"]))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.generation_config.eos_token_id == again.config.eos_token_id == [514, 1, 513]
    assert again.generation_config.top_k == 7 and again.generation_config.pad_token_id is None
    templates = load_tokenizer(f"{tmp_path}/out").hugging_face.chat_template
    assert templates == {"default": CHATML, "tool_use": "{{ messages }}"}


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
