"""A reward model of SmolLM2-135M on conversations of hh-rlhf: trained on some, measured on others, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmtrain.data.pairs import Pairs
from llmtrain.data.tokenizer import load_tokenizer
from tests.hh_rlhf import document, hh_pairs
from tests.model.llama import smollm2_directory


def test_every_row_becomes_a_pair(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Five of the 2,312 rows have answers that are the same, or conversations that part earlier."""
    rows = hh_pairs(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    tokenizer = load_tokenizer(str(smollm2_directory(tmp_path_factory)))
    pairs = Pairs(str(tmp_path / "pairs.jsonl"), tokenizer, 2048, 0, at_end=True)
    ends = {sample.ids[-2] for pair in pairs.pairs for sample in pair}
    assert len(pairs) == len(rows) == 2307 and ends == set(tokenizer.turn_end_ids)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_accuracy_on_pairs_that_it_has_not_seen(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints accuracy and interval before and after; then transformers' scores of what is exported are ours."""
    from tests.forked import run_alone

    hh_pairs(tmp_path)
    (tmp_path / "reward.yaml").write_text(document(tmp_path, smollm2_directory(tmp_path_factory)))
    done = run_alone("llmtrain", "reward", tmp_path / "reward.yaml", timeout_s=2200)
    assert done.returncode == 0, done.stdout[-3000:]
    before, after = map(json.loads, (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines())
    with capsys.disabled():
        print(f"\nbefore {before}\nafter {after}")
    assert after["pairs"] == before["pairs"] == 274 and after["loss"] < before["loss"]
    same_scores(tmp_path)


@torch.no_grad()
def same_scores(base: Path) -> None:
    """Holds transformers' scores of the exported model to those of our decoder on rows of pairs, in fp32."""
    from transformers import AutoModelForSequenceClassification

    from llmtrain.arch.resolve import resolve_model
    from llmtrain.checkpoint.source import load_decoder
    from llmtrain.commands.export import main as export
    from llmtrain.config.load import load
    from llmtrain.config.schema import ModelConfig
    from llmtrain.data.groups import group_length
    from tests.group_rows import group_batch

    config = load(str(base / "reward.yaml"), [f"export.path={base}/exported", "export.dtype=fp32"])
    export(config)
    theirs = AutoModelForSequenceClassification.from_pretrained(base / "exported").eval()
    ours = load_decoder(str(base / "run"), resolve_model(ModelConfig(init_from=str(base / "run"))), torch.float32)
    tokenizer = load_tokenizer(config.tokenizer.path)
    pairs = Pairs(config.data.held_out, tokenizer, 224, 0, at_end=True, settings=config.data)
    for pair in pairs.pairs[:4]:
        batch = group_batch([pair], group_length(pair), 1, tokenizer.pad_id, whole=True)
        values = ours(batch.input_ids, batch.positions, batch.segment_ids, batch.ends)[batch.loss_mask]
        rows = [torch.tensor([[*s.prompt_ids, *s.ids[:-1]]]) for s in pair]
        assert values.tolist() == pytest.approx([theirs(row).logits.item() for row in rows], abs=1e-4)
