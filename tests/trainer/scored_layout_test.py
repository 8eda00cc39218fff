"""What a model says of sampled tokens comes to the tokens that it belongs to, however they were laid out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmtrain.trainer.job import Job
from llmtrain.trainer.scored import score_samples
from llmtrain.types import Batch, Sample, Scores
from tests.recipes.conftest import one_rank, stub_job  # noqa: F401
from tests.recipes.stubs import StubScorer


def sample(prompt: list[int], ids: list[int], gap: int | None = None) -> Sample:
    n = len(ids)
    return Sample(prompt, ids, [i != gap for i in range(n)], [-1.0] * n, [0] * n, True, columns={"own": [9.0] * n})


def test_each_token_has_its_own_number(stub_job: Callable[..., Job]) -> None:  # noqa: F811
    """A scorer that says of a token 100 x its input + its label; groups of several samples, of which some are cut over
    rows, and a token that a tool wrote."""

    def says(batch: Batch) -> Scores:
        return Scores(logprobs=(100.0 * batch.input_ids + batch.labels), values=-1.0 * batch.input_ids)

    groups = [
        [sample([1, 2], [3, 4, 5]), sample([1, 2], [6]), sample([1, 2], list(range(20, 60)), gap=1)],
        [sample([7], [8, 9], gap=0)],
        [sample([10, 11, 12], [13, 14])],
    ]
    job, scorer = stub_job("sft", "train.seq_len=48", "rollout.temperature=0.7"), StubScorer(says)
    score_samples(job, scorer, groups, "ref")
    first, second, third = groups[0]
    assert first.columns["ref"] == [203.0, 304.0, 405.0] and second.columns["ref"] == [206.0]
    assert third.columns["ref"][:4] == [220.0, 0.0, 2122.0, 2223.0] and third.columns["ref"][-1] == 5859.0
    assert groups[1][0].columns["ref"] == [0.0, 809.0] and groups[2][0].columns["ref"] == [1213.0, 1314.0]
    assert all(set(each.columns) == {"own", "ref"} for group in groups for each in group)
    assert {batch.temperature for batch in scorer.scored[0]} == {0.7}
    score_samples(job, scorer, groups, "values", of="values")
    assert first.columns["values"] == [-2.0, -3.0, -4.0] and groups[1][0].columns["values"] == [0.0, -8.0]
    assert torch.tensor(third.columns["values"])[:3].tolist() == [-2.0, 0.0, -21.0]
