"""Losses of pairs against TRL's own trainers, on the same rows and weights: tokens, log-probs, scores and loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.data.pairs import Pairs
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.losses.preference import bradley_terry_loss, dpo_loss
from llmtrain.model.decoder import Decoder
from llmtrain.types import Batch, Scores
from tests.group_rows import group_batch, group_rows
from tests.model.llama import SMALL, loaded, random_llama

pytest.importorskip("trl")

WIDTH = 64
ROWS = [
    {"prompt": "say 4:", "chosen": "4", "rejected": "17 or 8"},
    {"prompt": "the sum of 3 and 5 is", "chosen": " 8, I think", "rejected": " 7"},
    {"prompt": "say it", "chosen": " now and again", "rejected": " no"},
    {"prompt": "1+1=", "chosen": "2", "rejected": ""},
    {"prompt": "1+2=", "chosen": "3", "rejected": "12"},
]


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return SMALL.model_copy(update={"vocab_size": 512})


@pytest.fixture
def ours(small_data: Path, tmp_path: Path) -> Any:
    """ours(rows, at_end=False) -> the batch of all pairs, and their number."""
    tokenizer = load_tokenizer(str(small_data / "tokenizer"))

    def make(rows: list[dict], at_end: bool = False) -> tuple[Batch, int]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = Pairs(str(tmp_path / "rows.jsonl"), tokenizer, WIDTH, 0, at_end)
        groups = pairs.groups(range(len(pairs)))
        filled = len(group_rows(groups, WIDTH, pairs.columns, whole=True))
        return group_batch(groups, WIDTH, filled, tokenizer.pad_id, pairs.columns, whole=True), len(pairs)

    return make


def settings(directory: Path, kind: type, **keys: Any) -> Any:
    common = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": None}
    return kind(output_dir=str(directory), per_device_train_batch_size=len(ROWS), **common, **keys)


def loss_of(trainer: Any) -> float:
    """Returns the loss of the first batch of a trainer: all rows."""
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.compute_loss(trainer.model, batch).item()


@torch.no_grad()
def scored(decoder: Decoder, batch: Batch) -> Scores:
    output = decoder(batch.input_ids, batch.positions, batch.segment_ids, batch.ends, batch.labels)
    return Scores(values=output) if isinstance(output, torch.Tensor) else Scores(*output)


FORMS = {  # theirs by ours
    "sigmoid": ({"loss_type": ["sigmoid"], "beta": 0.1}, {"kind": "sigmoid", "beta": 0.1}),
    "hinge": ({"loss_type": ["hinge"], "beta": 0.5}, {"kind": "hinge", "beta": 0.5}),
    "a mean a token": (
        {"loss_type": ["sigmoid_norm"], "beta": 2.0},
        {"kind": "sigmoid", "beta": 2.0, "length_normalized": True},
    ),
    "their ipo is of means": (
        {"loss_type": ["ipo"], "beta": 0.3},
        {"kind": "ipo", "beta": 0.3, "length_normalized": True},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_dpo_is_that_of_their_trainer(
    form: str, model: ModelConfig, ours: Any, small_data: Path, tmp_path: Path
) -> None:
    compare_dpo(*FORMS[form], ROWS, model, ours, small_data, tmp_path)


def test_likelihood_of_one_chosen_answer(model: ModelConfig, ours: Any, small_data: Path, tmp_path: Path) -> None:
    """Theirs is a mean over all tokens of a batch, ours over the tokens of an answer: equal where there is one."""
    theirs = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.1}
    compare_dpo(theirs, {"kind": "sigmoid", "beta": 0.1, "nll_coef": 0.7}, ROWS[:1], model, ours, small_data, tmp_path)


def test_their_sigmoid_ignores_smoothing(model: ModelConfig, ours: Any, small_data: Path, tmp_path: Path) -> None:
    """So ours is held to hand arithmetic; should this fail, theirs has learned to smooth, and is to be compared."""
    theirs = {"loss_type": ["sigmoid"], "beta": 0.1, "label_smoothing": 0.2}
    compare_dpo(theirs, {"kind": "sigmoid", "beta": 0.1}, ROWS, model, ours, small_data, tmp_path)


def compare_dpo(
    their_keys: dict, our_keys: dict, rows: list[dict], model: ModelConfig, ours: Any, small_data: Path, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = (random_llama(model, seed) for seed in (1, 2))
    for name, each in {"policy": policy, "reference": reference}.items():
        each.save_pretrained(tmp_path / name)
    batch, count = ours(rows)
    batch.extra["ref_logprobs"] = scored(loaded(tmp_path / "reference", model), batch).logprobs
    total, _ = dpo_loss(scored(loaded(tmp_path / "policy", model), batch), batch, **our_keys)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=settings(tmp_path / "out", DPOConfig, **their_keys),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(str(small_data / "tokenizer")).hugging_face,
    )
    assert float(total) / count == pytest.approx(loss_of(trainer), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("center_coef", [0.0, 0.01])
@pytest.mark.parametrize("margins", [False, True])
def test_bradley_terry_is_that_of_their_trainer(
    center_coef: float, margins: bool, model: ModelConfig, ours: Any, small_data: Path, tmp_path: Path
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    from llmtrain.model.decoder import initialize
    from llmtrain.model.hf_write import save_hf

    scalar = resolve_model(model.model_copy(update={"head": "scalar", "tie_embeddings": False}))
    decoder = Decoder(scalar)
    initialize(decoder, scalar, seed=3)
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(4 if p.dim() > 1 else 1)  # scores that depend on what is attended to
    tokenizer = load_tokenizer(str(small_data / "tokenizer"))
    weights = decoder.state_dict().items()
    save_hf(str(tmp_path / "hf"), scalar, weights, torch.float32, None, tokenizer.eos_id, pad_id=tokenizer.pad_id)
    rows = [{**row, "margin": 0.3 * i} for i, row in enumerate(ROWS)] if margins else ROWS
    batch, count = ours(rows, at_end=True)
    total, _ = bradley_terry_loss(scored(decoder, batch), batch, center_coef)
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf"),
        args=settings(tmp_path / "out", RewardConfig, center_rewards_coefficient=center_coef or None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer.hugging_face,
    )
    assert float(total) / count == pytest.approx(loss_of(trainer), rel=1e-5, abs=1e-5)
