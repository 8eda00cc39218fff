"""Scores of whole samples, put together from what each data-parallel rank scored."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.trainer.scored import score_samples
from llmtrain.types import Batch, Group, Sample, Scores

MODEL = resolve_model(ModelConfig(num_layers=2, hidden_size=32, ffn_size=48, num_kv_heads=2, vocab_size=512))


class Scorer:
    """Gives each label a log-prob that tells which it is: -label / 100. Where nothing is asked it gives 9."""

    def score(self, batches: Sequence[Batch]) -> list[Scores]:
        return [Scores(torch.where(batch.loss_mask, -batch.labels / 100.0, 9.0)) for batch in batches]


def groups() -> list[Group]:
    """Returns three groups of two samples of unequal lengths; a tool wrote the second token of each first one."""
    made = []
    for g in range(3):
        lists = [[10 * g + 1, 10 * g + 2, 10 * g + 3], [10 * g + t for t in range(4, 9)]]
        trained = [[True, False, True], [True] * 5]
        made.append(
            [
                Sample([90, 91, 92 + g], ids, written, [0.0] * len(ids), [0] * len(ids), True)
                for ids, written in zip(lists, trained, strict=True)
            ]
        )
    return made


def on_rank(rank: int, size: int, seq_len: int) -> list[Group]:
    """Scores on one rank; collectives are those that `monkeypatch` puts there."""
    mesh = SimpleNamespace(
        sizes={"cp": 1, "tp": 1, "pp": 1}, dp_size=size, dp_rank=rank, device=torch.device("cpu"), groups={"dp": None}
    )
    config = Config.model_validate({"name": "a", "train": {"seq_len": seq_len, "micro_batch_seqs": 1}})
    job = SimpleNamespace(config=config, mesh=mesh, model=MODEL, engine=None, tokenizer=SimpleNamespace(pad_id=0))
    found = groups()
    score_samples(job, Scorer(), found, "theirs")
    return found


@pytest.mark.parametrize("seq_len", [64, 8])  # a group in a row, and cut over two
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_has_the_scores_of_all_samples(size: int, seq_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: own.append(x.clone()))
    for rank in range(size):
        on_rank(rank, size, seq_len)
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: x.copy_(sum(own)))
    for rank in range(size):
        for sample in (each for group in on_rank(rank, size, seq_len) for each in group):
            wanted = [-x / 100 if trained else 0.0 for x, trained in zip(sample.ids, sample.trained, strict=True)]
            assert sample.columns == {"theirs": pytest.approx(wanted)}
