"""Checks names, weights and logits to and from transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from llmtrain import cli
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig, RopeScaling
from llmtrain.model.decoder import Decoder, initialize, parameter_shapes
from llmtrain.model.hf import disk_shapes, hf_weight_source, import_gguf
from llmtrain.model.hf_write import save_hf
from tests.model.llama import SMALL, loaded, random_llama, smollm2_directory

LLAMA3_ROPE = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_positions=32)
CONFIGS = {
    "tied, 6 heads on 2": SMALL,
    "untied": SMALL.model_copy(update={"tie_embeddings": False}),
    "one kv head": SMALL.model_copy(update={"num_kv_heads": 1}),
    "as many kv heads": SMALL.model_copy(update={"num_kv_heads": 6, "num_layers": 1}),
    "head_dim above": SMALL.model_copy(update={"head_dim": 16}),
    "head_dim below": SMALL.model_copy(update={"head_dim": 4, "tie_embeddings": False}),
    "llama3 rope": SMALL.model_copy(update={"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}),
    "theta and eps": SMALL.model_copy(update={"rope_theta": 100.0, "norm_eps": 1e-2, "vocab_size": 130}),
}


def ids_and_positions(vocab_size: int, tokens: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(vocab_size, (2, tokens), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(tokens).expand_as(ids)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_from_transformers(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    llama = random_llama(config, seed=3)
    llama.save_pretrained(tmp_path / "hf")
    ids, positions = ids_and_positions(config.vocab_size)
    expected = llama(ids).logits
    assert expected.std() > 0.3
    assert (loaded(tmp_path / "hf", config)(ids, positions) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_in_transformers(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = Decoder(config)
    initialize(model, config, seed=3)
    for p in model.parameters():
        p.mul_(torch.rand_like(p) * 8)
    save_hf(str(tmp_path / "hf"), config, model.named_parameters(), torch.float32, None, eos_id=7)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert llama.generation_config.eos_token_id == llama.config.eos_token_id == 7
    assert llama.dtype == torch.float32
    ids, positions = ids_and_positions(config.vocab_size)
    assert (model(ids, positions) - llama(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("max_shard_bytes", [5e9, 30e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_byte_equal(max_shard_bytes: float, dtype: torch.dtype, tmp_path: Path) -> None:
    config = CONFIGS["untied"]
    random_llama(config, seed=5).to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    read = hf_weight_source(str(tmp_path / "theirs"), config)
    weights = ((name, read(name)) for name in parameter_shapes(config))
    save_hf(str(tmp_path / "ours"), config, weights, dtype, None, None, max_shard_bytes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto").state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k].view(torch.uint8), ours[k].view(torch.uint8)) for k in theirs)
    shards = list((tmp_path / "ours").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 1e6)
    assert all(shard.stat().st_size < max_shard_bytes + 4096 for shard in shards)
    again = hf_weight_source(str(tmp_path / "ours"), config)
    assert all(torch.equal(read(name), again(name)) for name in parameter_shapes(config))


def saved(tmp_path: Path, config: ModelConfig = SMALL) -> tuple[Path, dict[str, torch.Tensor]]:
    random_llama(config, seed=0).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    return file, load_file(file)


def rejected(directory: Path, config: ModelConfig = SMALL) -> str:
    with pytest.raises(ValueError) as error:
        hf_weight_source(str(directory), config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_extra_misshapen_quantized(tmp_path: Path) -> None:
    file, tensors = saved(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    cases = {
        "missing": {k: v for k, v in tensors.items() if k != name},
        "no place": {**tensors, "model.layers.1.mlp.up_proj.bias": torch.zeros(80)},
        "the config says [80, 48]": {**tensors, name: tensors[name].T.contiguous()},
        "quantized": {**tensors, name: tensors[name].to(torch.int8)},
    }
    for message, changed in cases.items():
        save_file(changed, file)
        error = rejected(file.parent)
        assert message in error and "model.layers.1.mlp.up_proj" in error and str(file.parent) in error


def test_broken_files(tmp_path: Path) -> None:
    file, _ = saved(tmp_path)
    assert "no such file" in rejected(tmp_path)
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[:100], b""):
        file.write_bytes(broken)
        assert f"{file}: broken or cut short" in rejected(file.parent)
    index = file.parent / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": ')
    assert f"{index}: not a safetensors index" in rejected(file.parent)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    file.unlink()
    assert "model-1.safetensors: no such file" in rejected(file.parent)


def test_tied_head_in_the_file(tmp_path: Path) -> None:
    file, tensors = saved(tmp_path)
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    read = hf_weight_source(str(file.parent), SMALL)
    assert torch.equal(read("head.weight"), read("embed.weight"))
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    assert "tie_word_embeddings=false in config.json" in rejected(file.parent)
    save_file(tensors, file)
    assert "lm_head.weight is missing" in rejected(file.parent, CONFIGS["untied"])


def test_save_refuses_and_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    model = Decoder(SMALL)
    initialize(model, SMALL, seed=0)
    weights = dict(model.named_parameters())
    save_hf(str(target), SMALL, weights.items(), torch.float32, None, None)
    before = (target / "model.safetensors").read_bytes()
    bad = [
        {k: v for k, v in weights.items() if k != "norm.weight"},
        {**weights, "other.weight": torch.zeros(3)},
        {**weights, "norm.weight": torch.zeros(3)},
    ]
    for changed in bad:
        with pytest.raises(ValueError, match=r"norm.weight|other.weight"):
            save_hf(str(target), SMALL, changed.items(), torch.float32, None, None)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert (target / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        save_hf(str(target), SMALL, weights.items(), torch.float32, str(tmp_path), None)
    save_hf(str(target), SMALL, {**weights, "head.weight": model.head.weight}.items(), torch.bfloat16, None, None)
    assert load_file(target / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_generation_config_is_carried_along(tmp_path: Path) -> None:
    """The generation config beside the tokenizer is kept, with its end-of-text tokens when ours is among them."""
    model = Decoder(SMALL)
    initialize(model, SMALL, seed=0)
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    for eos, expected in ((1, [1, 106]), (7, 7), (None, [1, 106])):
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106], "top_k": 64}))
        save_hf(str(tmp_path / "out"), SMALL, model.named_parameters(), torch.float32, str(source), eos)
        written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        assert written == {"eos_token_id": expected, "top_k": 64}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"eos_token_id": 1', "not valid JSON (Expecting ',' delimiter"),
        (b"\xff", "not valid JSON ("),
        (b"", "not valid JSON ("),
        (b"[1, 2]", "must be an object of settings, is [1, 2]; copy"),
        (b'{"eos_token_id": "</s>"}', 'eos_token_id="</s>": must be a token\'s number'),
        (b'{"eos_token_id": [1, "2"]}', 'eos_token_id=[1, "2"]: must be'),
        (b'{"bos_token_id": true}', "bos_token_id=true: must be"),
        (b'{"pad_token_id": {}}', "pad_token_id={}: must be"),
    ],
)
def test_broken_generation_config(content: bytes, message: str, tmp_path: Path) -> None:
    """The fault is found before the weights are written, which may take hours."""
    (tmp_path / "generation_config.json").write_bytes(content)
    weights = (pytest.fail("a weight was asked for") for _ in range(1))
    with pytest.raises(ValueError) as error:
        save_hf(str(tmp_path / "out"), SMALL, weights, torch.float32, str(tmp_path), 1)
    assert str(error.value).startswith(f"{tmp_path / 'generation_config.json'}: ") and message in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def test_generation_survives_import_and_export(tmp_path: Path) -> None:
    """A directory that transformers wrote keeps its special tokens, in config.json too: old readers fall back to it,
    and the config class would put its own numbers there."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    llama = random_llama(SMALL, seed=0)
    asked = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}
    tokens = {"bos_token_id": 5, "eos_token_id": [3, 7], "pad_token_id": 9}
    llama.generation_config = GenerationConfig(**asked, **tokens)
    llama.save_pretrained(theirs)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w7").save_pretrained(theirs)
    config = tmp_path / "export.yaml"
    config.write_text(f"model: {{init_from: {theirs}}}\ntokenizer: {{path: {theirs}}}\nexport: {{path: {ours}}}\n")
    assert cli.main(["export", str(config)]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(place) for place in (theirs, ours))
    for name, value in (asked | tokens).items():
        assert getattr(before.generation_config, name) == getattr(after.generation_config, name) == value
    assert {name: getattr(after.config, name) for name in tokens} == tokens
    assert after.generation_config.to_diff_dict() == before.generation_config.to_diff_dict()


def test_names_are_those_of_transformers() -> None:
    config = CONFIGS["untied"]
    assert disk_shapes(config) == {n: tuple(p.shape) for n, p in random_llama(config, seed=0).named_parameters()}


@torch.no_grad()
def test_smollm2(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = smollm2_directory(tmp_path_factory)
    config = resolve_model(ModelConfig(init_from=str(directory)))
    llama, ours = AutoModelForCausalLM.from_pretrained(directory).eval(), loaded(directory, config)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    expected = llama(ids).logits
    assert (ours(ids, torch.arange(ids.size(1))[None]) - expected).abs().max() <= 1e-5
    assert tokenizer.decode(expected[0, -1].argmax()) == "The"


def test_smollm2_round_trip(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    directory = smollm2_directory(tmp_path_factory)
    config = resolve_model(ModelConfig(init_from=str(directory)))
    read = hf_weight_source(str(directory), config)
    weights = ((name, read(name)) for name in parameter_shapes(config))
    save_hf(str(tmp_path / "ours"), config, weights, torch.float32, str(directory), eos_id=2)
    theirs, ours = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k].view(torch.uint8), ours[k].view(torch.uint8)) for k in theirs)
    tokenizers = [AutoTokenizer.from_pretrained(d) for d in (directory, tmp_path / "ours")]
    assert tokenizers[0].chat_template and tokenizers[0].chat_template == tokenizers[1].chat_template
    assert tokenizers[0]("1 + 1 = 2").input_ids == tokenizers[1]("1 + 1 = 2").input_ids


def test_import_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nothing.gguf: no such GGUF file"):
        import_gguf(str(tmp_path / "nothing.gguf"), str(tmp_path / "out"))
    monkeypatch.setattr("llmtrain.model.hf.smollm2_gguf", lambda: None)
    with pytest.raises(ValueError, match="pip install"):
        import_gguf("smollm2", str(tmp_path / "out"))
    command = [sys.executable, "-m", "llmtrain.model.hf", "nothing.gguf", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)
    assert result.returncode == 2 and result.stderr == "nothing.gguf: no such GGUF file\n"
    assert not (tmp_path / "out").exists()


def test_an_import_refuses_what_is_not_ours_before_it_reads(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("no model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out: holds thesis\.txt, which llmtrain did not write"):
        import_gguf(str(tmp_path / "model.gguf"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"would replace"):
        import_gguf(str(tmp_path / "model.gguf"), str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["model.gguf", "out"] and os.listdir(tmp_path / "out") == ["thesis.txt"]
