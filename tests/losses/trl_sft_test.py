"""The loss of SFT against TRL's own trainer, on the same rows and weights: tokens, masks, loss and every gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.data.packing import Demonstrations
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import Decoder
from llmtrain.types import Batch, Scores
from tests.data.families import family_directory
from tests.model.llama import SMALL, loaded, random_llama

pytest.importorskip("trl")

WIDTH = 96
TEXTS = [
    {"prompt": "say 4:", "completion": "4"},
    {"prompt": "the sum of 3 and 5 is", "completion": " 8, I think"},
    {"prompt": "say it", "completion": " now and again"},
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "1+2=", "completion": "<think>2+1</think> 3"},
]
THOUGHT = "<think>\n40 + 2\n</think>\n\nSo 42."
CHATS = [
    {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": said}]}
    for asked, said in (("What is 40 + 2?", THOUGHT), ("so?", "The answer is 7."), ("3 + 4 ?", "7"))
]
TALK = [{"role": "user", "content": "3 + 4 ?"}, {"role": "assistant", "content": "7"}, CHATS[0]["prompt"][0]]
CHATS.append({"prompt": TALK, "completion": CHATS[0]["completion"]})


def their_trainer(directory: Path, policy: Any, rows: list[dict], tokenizer: Tokenizer, **keys: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    common = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": WIDTH}
    return SFTTrainer(
        model=policy,
        args=SFTConfig(output_dir=str(directory), per_device_train_batch_size=len(rows), **common, **keys),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer.hugging_face,
    )


def their_step(trainer: Any) -> tuple[dict[str, Tensor], float]:
    """Returns the first batch of a trainer, which holds all rows, and its loss; gradients are left in the model."""
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return batch, loss.item()


def our_step(decoder: Decoder, batch: Batch) -> float:
    """Returns the mean over the trained tokens of the batch; gradients are left in the model."""
    scores = Scores(*decoder(batch.input_ids, batch.positions, batch.segment_ids, batch.ends, batch.labels))
    loss = token_loss(scores, batch)[0] / batch.loss_mask.sum()
    loss.backward()
    return loss.item()


def with_gradients(policy: Any, directory: Path, model: ModelConfig) -> dict[str, Tensor]:
    """Returns the gradients of their model by our names: saved and loaded as if they were its weights."""
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(p.grad)
    policy.save_pretrained(directory)
    return {name: p.detach() for name, p in loaded(directory, model).named_parameters()}


def trained(ids: Tensor, labels: Tensor) -> list[list[tuple[int, int]]]:
    """Returns (token, the one that is to be predicted behind it) of every row, where that is trained."""
    rows = zip(ids.tolist(), labels.tolist(), strict=True)
    return sorted([pair for pair in zip(*row, strict=True) if pair[1] >= 0] for row in rows)


def compare(rows: list[dict], tokenizer: Tokenizer, tmp_path: Path, packed: bool) -> None:
    model = SMALL.model_copy(update={"vocab_size": 512})
    policy = random_llama(model, seed=1)
    policy.save_pretrained(tmp_path / "policy")
    decoder = loaded(tmp_path / "policy", model)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Demonstrations(str(tmp_path / "rows.jsonl"), tokenizer, WIDTH, 0, pack=packed)
    assert (len(found) < len(rows)) == packed
    batch = found.batch(range(len(found)))
    keys = {"packing": True, "packing_strategy": "bfd"} if packed else {}
    theirs, loss = their_step(their_trainer(tmp_path / "out", policy, rows, tokenizer, **keys))
    if not packed:
        assert trained(batch.input_ids, batch.labels) == trained(theirs["input_ids"][:, :-1], theirs["labels"][:, 1:])
    assert int(batch.loss_mask.sum()) == int((theirs["labels"] >= 0).sum())
    assert our_step(decoder, batch) == pytest.approx(loss, rel=1e-5, abs=1e-5)
    expected = with_gradients(policy, tmp_path / "gradients", model)
    for name, p in decoder.named_parameters():
        assert float((p.grad - expected[name]).norm() / expected[name].norm()) < 1e-5, name


@pytest.mark.parametrize("packed", [False, True])
def test_answers_behind_prompts(packed: bool, small_data: Path, tmp_path: Path) -> None:
    compare(TEXTS, load_tokenizer(str(small_data / "tokenizer")), tmp_path, packed)


@pytest.mark.parametrize("packed", [False, True])
def test_conversations_that_think(packed: bool, tmp_path: Path) -> None:
    """The template ends a turn with its token and nothing behind it: of ChatML's newline there, theirs trains too."""
    compare(CHATS, load_tokenizer(str(family_directory("llama3", tmp_path))), tmp_path, packed)


def test_they_train_what_a_template_puts_behind_the_end_of_a_turn(tmp_path: Path) -> None:
    """So ours has a token a row less; should this fail, theirs has learned to stop, and is to be compared."""
    tokenizer = load_tokenizer(str(family_directory("qwen", tmp_path)))
    policy = random_llama(SMALL.model_copy(update={"vocab_size": 512}), seed=1)
    theirs = next(iter(their_trainer(tmp_path / "out", policy, CHATS[:1], tokenizer).get_train_dataloader()))
    (tmp_path / "rows.jsonl").write_text(json.dumps(CHATS[0]) + "\n")
    ours = Demonstrations(str(tmp_path / "rows.jsonl"), tokenizer, WIDTH, 0).batch([0])
    said = [x for x in theirs["labels"][0].tolist() if x >= 0]
    assert said == [*ours.labels[ours.loss_mask].tolist(), *tokenizer.encode("\n")]
