"""Trees of samples: each trained token of each sample lies in the row once, sees what it would see alone, and nothing
that could be shared is there twice."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.data.groups import group_length, lay_out, piece_batch, pieces
from llmtrain.data.tree import Tree, shared_tokens
from llmtrain.losses.policy import clipped_by_sequence, grpo_loss, policy_loss
from llmtrain.losses.sequence import sequence_sums
from llmtrain.model.attention import attention_mask
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.parallel.pipeline import inputs_of
from llmtrain.types import IGNORE, Batch, Group, Sample, Scores

COLUMNS = ("advantages", "number")
LossFn = Callable[[Scores, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def sample(prompt: list[int], turns: list[tuple[bool, list[int]]], advantage: float = 1.0, number: int = 0) -> Sample:
    """`turns`: (whether the policy wrote them, the tokens)."""
    ids = [token for _, turn in turns for token in turn]
    trained = [mine for mine, turn in turns for _ in turn]
    columns = {"advantages": [advantage] * len(ids), "number": [1000.0 * number + i for i in range(len(ids))]}
    logprobs = [-4.0 - 0.01 * (i + number) for i in range(len(ids))]
    return Sample(prompt, ids, trained, logprobs, [0] * len(ids), True, columns=columns)


def test_the_example_of_the_module() -> None:
    p, q, c, t, u, x, y = range(1, 8)
    group = [sample([p, q], [(True, [c]), (False, [t, u]), (True, [end])]) for end in (x, y)]
    tree = Tree(group)
    row = lay_out(tree, ())
    assert row["input_ids"] == [p, q, c, t, u, u, q] and tree.tokens == 7 and group_length(group) == 9
    assert row["labels"] == [IGNORE, c, IGNORE, IGNORE, x, y, c]
    assert row["positions"] == [0, 1, 2, 3, 4, 4, 1] and row["branch_ids"] == [0, 1, 0, 0, 1, 2, 2]
    assert row["ends"] == [7, 6, 6, 6, 5, 6, 7] and tree.seen_pairs == 1 + 2 + 3 + 4 + 5 + 5 + 2


def test_what_one_trains_and_another_was_told() -> None:
    """An agent that rewrote its history: the second row begins with the first turn, which is not trained there. Who
    comes first makes no difference to what is computed."""
    first = sample([1], [(True, [2, 3]), (False, [4]), (True, [5])], number=1)
    second = sample([1], [(False, [2, 3, 6]), (True, [7])], number=2)
    for group in ([first, second], [second, first]):
        row = lay_out(Tree(group), ("number",))
        assert row["input_ids"] == [1, 2, 3, *(s.ids[2] for s in group)]
        assert row["labels"] == [2, 3, IGNORE, *(s.ids[3] for s in group)]
        owner = 1 + group.index(first)
        assert row["branch_ids"] == [owner, owner, 0, 1, 2] and row["number"][:2] == [1000, 1001]
        assert row["number"][3:] == [s.columns["number"][3] for s in group]


def test_rows_that_add_nothing() -> None:
    silent, whole = sample([1, 2], [(False, [3])]), sample([1, 2], [(False, [3]), (True, [4])])
    assert [Tree(group).tokens for group in ([silent], [silent] * 5, [silent, whole], [whole, silent])] == [2, 2, 3, 3]
    twins = [sample([1, 2], [(True, [3, 4, 5])])] * 3
    assert Tree(twins).tokens == 1 + 3 * 3  # each has its own advantage for every token


def drawn(rng: random.Random, samples: int, letters: int = 2) -> Group:
    """Draws samples of turns that are often alike."""
    prompt = [rng.randrange(2, 9) for _ in range(rng.randint(1, 4))]

    def turns() -> list[tuple[bool, list[int]]]:
        first = rng.random() < 0.6
        return [
            (first == (i % 2 == 0), [9 + rng.randrange(letters)] * rng.randint(1, 3)) for i in range(rng.randint(1, 5))
        ]

    return [sample(prompt, turns(), 1 + rng.gauss(0, 1), number) for number in range(samples)]


def trained_in(group: Group) -> Counter:
    """Returns, for each trained token: its sample's number of 1000 and its own, the token and what stands before it."""
    found = Counter()
    for s in group:
        whole, n = s.prompt_ids + s.ids, len(s.prompt_ids)
        found.update(
            (s.columns["number"][i], s.ids[i], tuple(whole[: n + i])) for i, mine in enumerate(s.trained) if mine
        )
    return found


def trained_at(batch: Batch) -> Counter:
    """Returns the same of what lies in rows: what each place sees."""
    mask = attention_mask(batch.segment_ids, batch.ends)[:, 0]
    found = Counter()
    for row, place in batch.loss_mask.nonzero().tolist():
        seen = mask[row, place].nonzero()[:, 0]
        assert batch.positions[row, seen].tolist() == list(range(len(seen)))
        own = (float(batch.extra["number"][row, place]), int(batch.labels[row, place]))
        found[(*own, tuple(batch.input_ids[row, seen].tolist()))] += 1
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_trained_token_sees_what_it_would_see_alone(seed: int) -> None:
    rng = random.Random(seed)
    groups = [drawn(rng, rng.randint(1, 7)) for _ in range(3)]
    trees = [Tree(group) for group in groups]
    batch = piece_batch(trees, [[1, 0], [2]], sum(tree.tokens for tree in trees), 0, COLUMNS)
    assert trained_at(batch) == sum(map(trained_in, groups), Counter())
    real = batch.segment_ids >= 0
    assert int(real.sum()) == sum(tree.tokens for tree in trees)
    mask = attention_mask(batch.segment_ids, batch.ends)[:, 0] & real[:, :, None]
    assert int(mask.sum()) == sum(tree.seen_pairs for tree in trees)
    for tree in trees:
        assert len(distinct(tree.samples)) <= tree.tokens <= group_length(tree.samples)
    sums, _ = sequence_sums(batch.loss_mask.float(), batch.loss_mask, batch)  # whose token each is
    written = [s.written_tokens for n in (1, 0, 2) for s in groups[n]]
    assert [n for n in sums.tolist() if n] == [n for n in written if n]


def distinct(samples: Group) -> set[tuple[int, ...]]:
    """Returns all inputs with what stands before them: less cannot be computed."""
    return {tuple((s.prompt_ids + s.ids)[:i]) for s in samples for i in range(1, len(s.prompt_ids + s.ids))}


def test_without_what_two_train_no_input_is_computed_twice() -> None:
    """Only one sample of a tree trains anything: the least that there can be."""
    rng = random.Random(0)
    for _ in range(40):
        group = drawn(rng, 6, letters=3)
        for s in group[1:]:
            s.trained = [False] * len(s.ids)
        rng.shuffle(group)
        assert Tree(group).tokens == len(distinct(group))


def one_level(group: Group) -> dict[str, list]:
    """Returns the row of a group that shares its prompt alone, as it was laid out before there were trees."""
    *trunk, last = group[0].prompt_ids
    n = len(trunk)
    row = {"input_ids": trunk, "labels": [IGNORE] * n, "positions": [*range(n)], "branch_ids": [0] * n}
    row |= {"segment_ids": [0] * n, "old_logprobs": [0.0] * n, "advantages": [0.0] * n}
    for branch, s in enumerate(group, 1):
        m = len(s.ids)
        labels = [token if mine else IGNORE for token, mine in zip(s.ids, s.trained, strict=True)]
        own = [[last, *s.ids[:-1]], labels, [*range(n, n + m)], [branch] * m, [0] * m, s.logprobs]
        row = {name: row[name] + more for name, more in zip(row, [*own, s.columns["advantages"]], strict=True)}
    return row


@pytest.mark.parametrize("tool", [False, True])
def test_samples_that_share_their_prompt_alone_lie_as_they_did(tool: bool) -> None:
    """What the policy wrote is never shared, however alike; nor what a tool answered to different calls."""
    rng = random.Random(3)
    for _ in range(20):
        group = drawn(rng, rng.randint(1, 6))
        for number, s in enumerate(group):
            s.trained = [True] * len(s.ids)
            if tool:
                s.ids, s.trained[1:2] = [50 + number, *s.ids[1:]], [False] * len(s.ids[1:2])
        row = lay_out(Tree(group), ("advantages",))
        ends, expected = torch.tensor([row.pop("ends")]), one_level(group)
        assert row == expected
        branches = torch.tensor(expected["branch_ids"])
        earlier = torch.ones(len(branches), len(branches), dtype=torch.bool).tril()
        before = earlier & ((branches == 0) | (branches[:, None] == branches))
        assert torch.equal(attention_mask(torch.zeros_like(ends), ends)[0, 0], before)


def test_pieces_are_cut_by_the_length_of_the_tree() -> None:
    """Eight samples of 21 inputs, of which 17 are what a tool wrote to all: 1 + 17 + 8 * 3, and not 1 + 8 * 20."""
    told = [(False, list(range(100, 117)))]
    group = [sample([1, 2], [*told, (True, [i, i, i])], number=i) for i in range(8)]
    assert [tree.tokens for tree in pieces(group, 42, whole=False)] == [42]
    parts = list(pieces(group, 41, whole=False))
    assert [(tree.tokens, len(tree.samples)) for tree in parts] == [(39, 7), (21, 1)]
    assert [s for tree in parts for s in tree.samples] == group
    with pytest.raises(ValueError, match="a sample of 21 tokens does not fit in a row of 20"):
        list(pieces(group, 20, whole=False))


def test_a_group_that_must_stay_whole_shares_its_prompt_alone() -> None:
    """Pairs of a reward model, whose answers begin alike and are trained at their ends, lie as they did."""
    pair = [sample([1, 2], [(False, [3, end, 5]), (True, [6])]) for end in (4, 7)]
    (tree,) = pieces(pair, 9, whole=True)
    assert tree.tokens == group_length(pair) == 9 and Tree(pair).tokens == 7
    row = lay_out(tree, ("advantages",))
    assert row.pop("ends") == [9, 5, 5, 5, 5, 9, 9, 9, 9] and row == one_level(pair)
    with pytest.raises(ValueError, match="a group of 9 tokens does not fit in a row of 8, and its loss compares"):
        list(pieces(pair, 8, whole=True))


def test_shared_tokens() -> None:
    for a, b, count in (([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2, 4, 5], 2), ([1], [2], 0)):
        assert shared_tokens(a, b) == shared_tokens(b, a) == count


def gradients(model: Decoder, batches: list[Batch], loss: LossFn) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = []
    for batch in batches:
        scores = Scores(*model(batch.input_ids, **inputs_of(batch, True)))
        value, _ = loss(scores, batch)
        value.backward()
        losses.append(value.item())
    return sum(losses), {name: p.grad.clone() for name, p in model.named_parameters()}


BY_TOKEN = partial(grpo_loss, clip_low=0.2, clip_high=0.28, kl_coef=0.0)
BY_SEQUENCE = partial(policy_loss, objective=partial(clipped_by_sequence, low=0.1, high=0.15))


@pytest.mark.parametrize(("window", "loss_of"), [(None, BY_TOKEN), (5, BY_TOKEN), (None, BY_SEQUENCE)])
def test_loss_and_gradients_are_those_of_a_row_for_each_sample(window: int | None, loss_of: LossFn) -> None:
    config = ModelConfig(num_layers=2, hidden_size=32, ffn_size=48, num_kv_heads=2, vocab_size=64)
    if window is not None:
        config = config.model_copy(update={"sliding_window": window, "layer_types": ["sliding", "full"]})
    model = Decoder(config)
    initialize(model, config, seed=0)
    rng = random.Random(5)
    trees = [Tree(drawn(rng, 6)) for _ in range(4)]
    alone = [Tree([s]) for tree in trees for s in tree.samples]
    width = sum(tree.tokens for tree in trees)
    assert width < 0.75 * sum(tree.tokens for tree in alone)
    shared = [piece_batch(trees, [[0, 1], [2, 3]], width, 0, COLUMNS)]
    loss, grads = gradients(model, shared, loss_of)
    apart = [piece_batch(alone, [[i]], one.tokens, 0, COLUMNS) for i, one in enumerate(alone)]
    want, each = gradients(model, apart, loss_of)
    assert loss == pytest.approx(want, rel=1e-5)
    for name, grad in grads.items():
        assert (grad - each[name]).norm() <= 1e-5 * each[name].norm(), name
