from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtrain.checkpoint.export import export
from llmtrain.checkpoint.source import load_decoder, weight_source
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import parameter_shapes


def run_directory(tmp_path: Path, fake: SimpleNamespace, config: ModelConfig) -> tuple[Path, dict]:
    tensors = fake.tensors(config)
    fake.save(tmp_path / "checkpoints", fake.tensors(config, seed=1), fake.Layout(), 1)
    fake.save(tmp_path / "checkpoints", tensors, fake.Layout(pp=2, tp=2), 2)
    return tmp_path, tensors


@pytest.mark.parametrize("tied", [True, False])
def test_run_checkpoint_and_export_give_the_same_weights(tmp_path: Path, fake: SimpleNamespace, tied: bool) -> None:
    config = fake.CONFIG.model_copy(update={"tie_embeddings": tied})
    run, tensors = run_directory(tmp_path, fake, config)
    assert ("head.weight" in tensors) is not tied
    export(str(run), str(run / "export"), config, None, 1, torch.float32)
    for path in (run, run / "checkpoints" / "step-00000002", run / "export"):
        weight = weight_source(str(path), config)
        assert all(torch.equal(weight(name), keys["weight"]) for name, keys in tensors.items()), path


def test_a_broken_checkpoint_is_passed_over_in_a_run_and_refused_by_name(tmp_path: Path, fake: SimpleNamespace) -> None:
    run, _ = run_directory(tmp_path, fake, fake.CONFIG)
    newest = run / "checkpoints" / "step-00000002"
    (newest / "rank-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"rank-00002\.safetensors: No such file"):
        weight_source(str(newest), fake.CONFIG)
    older = fake.tensors(seed=1)["embed.weight"]["weight"]
    assert torch.equal(weight_source(str(run), fake.CONFIG)("embed.weight"), older)
    (run / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no intact checkpoint"):
        weight_source(str(run), fake.CONFIG)


def test_modules_for_further_tokens_are_left_out_where_the_model_has_none(
    tmp_path: Path, fake: SimpleNamespace
) -> None:
    trained = fake.CONFIG.model_copy(update={"mtp_layers": 2})
    run, tensors = run_directory(tmp_path, fake, trained)
    assert any(name.startswith("mtp.1.") for name in tensors)
    for layers in (0, 1):
        config = trained.model_copy(update={"mtp_layers": layers})
        weight = weight_source(str(run), config)
        assert all(torch.equal(weight(name), tensors[name]["weight"]) for name in parameter_shapes(config))
    with pytest.raises(ValueError, match=r"no parameter mtp\.2\."):
        weight_source(str(run), trained.model_copy(update={"mtp_layers": 3}))


def test_a_path_without_weights_says_what_was_looked_for(tmp_path: Path, fake: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"looked for checkpoints/ .* manifest\.json .* config\.json"):
        weight_source(str(tmp_path), fake.CONFIG)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"hidden_size": 32}, r"embed\.weight has shape \[32, 16\], the model has \[32, 32\]"),
        ({"num_layers": 3}, r"no parameter layers\.2\."),
        ({"num_layers": 1}, r"has no layers\.1\..* \(9 such\)"),
        ({"tie_embeddings": False}, r"no parameter head\.weight"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, fake: SimpleNamespace, update: dict, message: str) -> None:
    run, _ = run_directory(tmp_path, fake, fake.CONFIG)
    with pytest.raises(ValueError, match=message):
        weight_source(str(run), fake.CONFIG.model_copy(update=update))


def test_the_decoder_has_the_weights_and_the_exported_model_the_same_logits(
    tmp_path: Path, fake: SimpleNamespace
) -> None:
    run, tensors = run_directory(tmp_path, fake, fake.CONFIG)
    rounded = load_decoder(str(run), fake.CONFIG, torch.bfloat16)
    assert rounded.head.weight is rounded.embed.weight
    weight = tensors["layers.1.feedforward.up.weight"]["weight"]
    assert torch.equal(rounded.layers["1"].feedforward.up.weight, weight.bfloat16())
    model = load_decoder(str(run), fake.CONFIG, torch.float32)
    export(str(run), str(run / "export"), fake.CONFIG, None, 1, torch.float32)
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids, torch.arange(9).expand(2, 9))
        theirs = AutoModelForCausalLM.from_pretrained(run / "export")(ids).logits
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
