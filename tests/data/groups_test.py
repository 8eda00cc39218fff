from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.data.groups import group_length, piece_batch
from llmtrain.data.tree import Tree
from llmtrain.model.attention import attention_mask
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.types import IGNORE, Batch, Sample
from tests.group_rows import group_batch, group_rows

PAD = 0


def sample(prompt: list[int], ids: list[int], advantage: float = 1.0, trained: list[bool] | None = None) -> Sample:
    n = len(ids)
    logprobs, columns = [-0.1 * t for t in ids], {"advantages": [advantage] * n}
    return Sample(prompt, ids, trained or [True] * n, logprobs, [0] * n, finished=True, columns=columns)


def random_groups(rng: random.Random, prompts: int, samples: int) -> list[list[Sample]]:
    groups = []
    for _ in range(prompts):
        prompt = [rng.randint(2, 49) for _ in range(rng.randint(1, 9))]
        lengths = [rng.randint(1, 8) for _ in range(samples)]
        groups.append([sample(prompt, [rng.randint(2, 49) for _ in range(n)], rng.random()) for n in lengths])
    return groups


def test_the_example_of_types() -> None:
    p, q, x, y, z = 5, 6, 7, 8, 9
    batch = group_batch(
        [[sample([p, q], [x, y], 0.5), sample([p, q], [z], -2.0)]], 5, rows=1, pad_id=PAD, columns=("advantages",)
    )
    assert batch.input_ids.tolist() == [[p, q, x, q, PAD]]
    assert batch.labels.tolist() == [[IGNORE, x, y, z, IGNORE]]
    assert batch.loss_mask.tolist() == [[False, True, True, True, False]]
    assert batch.positions.tolist() == [[0, 1, 2, 1, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, -1]]
    assert batch.branch_ids.tolist() == [[0, 1, 1, 2, 0]]
    assert batch.ends.tolist() == [[4, 3, 3, 4, 5]]
    assert batch.extra["advantages"].tolist() == [[0, 0.5, 0.5, -2.0, 0]]
    assert torch.allclose(batch.extra["old_logprobs"], torch.tensor([[0, -0.7, -0.8, -0.9, 0]]))
    assert {t.dtype for t in batch.extra.values()} == {torch.float32}


def logprobs(model: Decoder, batch: Batch) -> torch.Tensor:
    logits = model(batch.input_ids, batch.positions, batch.segment_ids, batch.ends)
    labels = batch.labels.clamp(min=0)
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


@pytest.mark.parametrize("width", [20, 40, 97])
@torch.no_grad()
def test_shared_prefix_equals_each_sample_alone(width: int) -> None:
    config = ModelConfig(num_layers=2, hidden_size=32, ffn_size=48, num_kv_heads=2, vocab_size=50)
    model = Decoder(config)
    initialize(model, config, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)  # log-probs that depend on what is attended to
    groups = random_groups(random.Random(width), prompts=6, samples=4)
    batch = group_batch(groups, width, len(group_rows(groups, width)), PAD)
    found = Counter()
    for row, values in enumerate(logprobs(model, batch)):
        branches = torch.stack([batch.segment_ids[row], batch.branch_ids[row]], 1)
        for key in branches[batch.loss_mask[row]].unique(dim=0):
            at = (branches == key).all(1) & batch.loss_mask[row]
            old = batch.extra["old_logprobs"][row][at]
            found[tuple(batch.labels[row][at].tolist()), tuple(values[at].tolist()), tuple(old.tolist())] += 1
    expected = []
    for r in (s for group in groups for s in group):
        ids = torch.tensor([r.prompt_ids + r.ids])
        alone = model(ids[:, :-1], torch.arange(ids.size(1) - 1)[None]).log_softmax(-1)[0]
        values = alone.gather(-1, ids[0, 1:, None])[len(r.prompt_ids) - 1 :, 0]
        expected.append((tuple(r.ids), tuple(values.tolist()), tuple(torch.tensor(r.logprobs).tolist())))
    got = sorted(found.elements())
    for mine, wanted in zip(got, sorted(expected), strict=True):
        assert mine[0] == wanted[0]
        assert mine[1] == pytest.approx(wanted[1], abs=1e-5)
        assert mine[2] == wanted[2]


def test_neighbours_share_rows_and_large_groups_are_cut() -> None:
    groups = random_groups(random.Random(1), prompts=8, samples=4)
    longest = max(map(group_length, groups))
    width = 2 * longest
    tokens = sum(len(g[0].prompt_ids) - 1 + sum(len(s.ids) for s in g) for g in groups)
    assert -(-tokens // width) <= len(group_rows(groups, width)) < len(groups)
    assert len(group_rows(groups, longest)) <= len(groups)
    cut = group_rows(groups[:1], max(len(s.prompt_ids) + len(s.ids) for s in groups[0]))
    assert len(cut) > 1
    assert all(row["labels"].count(IGNORE) == len(groups[0][0].prompt_ids) - 1 for row in cut)


def test_rows_are_padded_and_bounded() -> None:
    groups = random_groups(random.Random(2), prompts=3, samples=2)
    needed = len(group_rows(groups, 40))
    batch = group_batch(groups, 40, needed + 2, PAD)
    assert batch.input_ids.shape == (needed + 2, 40)
    assert not batch.loss_mask[needed:].any()
    assert (batch.segment_ids[needed:] == -1).all()
    with pytest.raises(ValueError, match="a sample of 11 tokens does not fit in a row of 10"):
        group_rows([[sample([1, 2, 3, 4], [5] * 8)]], 10)


def test_no_groups_give_empty_rows() -> None:
    batch = group_batch([], 16, 2, PAD, ("advantages",))
    assert batch.input_ids.shape == (2, 16)
    assert batch.extra["advantages"].dtype == torch.float32
    assert not batch.loss_mask.any()


def test_the_pairs_of_attention_are_those_of_its_mask() -> None:
    trees = [Tree(group) for group in random_groups(random.Random(2), prompts=3, samples=3)]
    batch = piece_batch(trees, [[2, 0], [1]], 128, PAD)
    mask = attention_mask(batch.segment_ids, batch.ends)[:, 0] & (batch.segment_ids >= 0)[:, :, None]
    assert mask.sum((1, 2)).tolist() == [trees[2].seen_pairs + trees[0].seen_pairs, trees[1].seen_pairs]


def test_pieces_lie_where_they_are_put() -> None:
    a, b, c = (Tree([sample([1, token], [token])]) for token in (7, 8, 9))
    batch = piece_batch([a, b, c], [[2, 0], [], [1]], 6, PAD, ("advantages",))
    assert batch.input_ids.tolist() == [[1, 9, 1, 7, PAD, PAD], [PAD] * 6, [1, 8, *[PAD] * 4]]
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1, -1, -1], [-1] * 6, [0, 0, *[-1] * 4]]
    assert batch.extra["advantages"].tolist() == [[0, 1, 0, 1, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    assert not batch.loss_mask[1].any()


def test_what_a_tool_wrote_is_seen_but_not_trained() -> None:
    p, q, x, tool, y = 5, 6, 7, 8, 9
    one = sample([p, q], [x, tool, y], 0.5, trained=[True, False, True])
    one.columns["values"] = [0.1, 0.2, 0.3]
    batch = group_batch([[one]], 4, rows=1, pad_id=PAD, columns=("values",))
    assert batch.input_ids.tolist() == [[p, q, x, tool]]
    assert batch.labels.tolist() == [[IGNORE, x, IGNORE, y]]
    assert batch.loss_mask.tolist() == [[False, True, False, True]]
    assert torch.allclose(batch.extra["values"], torch.tensor([[0, 0.1, 0.2, 0.3]])) and "advantages" not in batch.extra


def test_a_group_that_must_stay_whole_is_not_cut() -> None:
    pair = [sample([1, 2], [3, 4, 5]), sample([1, 2], [6, 7, 8])]
    assert len(group_rows([pair], 6)) == 2 and len(group_rows([pair], 7, whole=True)) == 1
    with pytest.raises(ValueError, match="a group of 7 tokens does not fit in a row of 6, and its loss compares"):
        group_batch([pair], 6, 2, PAD, whole=True)


def test_what_would_put_the_rest_of_a_row_out_of_place_is_caught() -> None:
    short, long = sample([1, 2], [3, 4]), sample([1, 2], [5])
    long.columns["advantages"] = [1.0, 1.0]
    with pytest.raises(AssertionError, match="advantages: one value for each"):
        group_rows([[short, long]], 9, ("advantages",))
    with pytest.raises(AssertionError, match="at least one token after it"):
        group_rows([[sample([1, 2], [])]], 9)
    with pytest.raises(AssertionError, match="share their prompt"):
        group_rows([[short, sample([1, 9], [3])]], 9)
    with pytest.raises(AssertionError, match="a name of its own"):
        group_rows([[short]], 9, ("labels",))
