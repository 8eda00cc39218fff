"""Defines the few records that travel between packages. Tensors are batch-first; `T` is the row length in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # a label that is not trained and whose log-prob is not computed


@dataclass
class Batch:
    """Holds one microbatch of token rows.

    Example: the document `a b c <eos>`, trained on everything, in a row of 4:
        input_ids = [a, b, c, pad]      labels = [b, c, <eos>, IGNORE]     loss_mask = [T, T, T, F]
        positions = [0, 1, 2, 0]        segment_ids = [0, 0, 0, -1]        branch_ids = None
    A group that shares its prompt `p q` (GRPO, samples `x y` and `z`): the trunk is the prompt without its last
    token, and every branch starts with that last token, so that each position has exactly one label:
        input_ids = [p, q, x, q]        labels = [IGNORE, x, y, z]         loss_mask = [F, T, T, T]
        positions = [0, 1, 2, 1]        segment_ids = [0, 0, 0, 0]         branch_ids = [0, 1, 1, 2]
        ends = [4, 3, 3, 4]
    A token at place i sees those of its own segment at places j <= i with i < ends[j]: a row can hold any tree, depth
    first. `branch_ids` only say to whose sequence a token belongs.
    """

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64: the token that follows, or IGNORE
    loss_mask: Tensor  # [B, T] bool: True = trained
    positions: Tensor  # [B, T] int64: for RoPE
    segment_ids: Tensor | None = None  # [B, T] int64: document in the row, -1 = padding; None = one causal row
    branch_ids: Tensor | None = None  # [B, T] int64: k = of the k-th sample of the group, 0 = shared and nobody's
    ends: Tensor | None = None  # [B, T] int64: tokens from a place up to this one see it; None = all that follow
    extra: dict[str, Tensor] = field(default_factory=dict)  # [B, T] each: what one loss needs (advantages, ...)
    temperature: float = 1.0  # log-probs are those of logits / temperature
    candidates: Tensor | None = None  # [B, T, K] int64: tokens whose log-probs are wanted, distinct at a position
    experts: Tensor | None = None  # [B, T, layers with experts x top_k] int16: those to use, -1 = the router's choice
    top_k: int = 0  # in scoring: the log-probs of so many of the likeliest tokens are wanted (not with `candidates`)

    def to(self, device: torch.device) -> Batch:
        """Returns a copy on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()}
        return replace(self, **{**moved, "extra": {k: v.to(device) for k, v in self.extra.items()}})

    def rows(self, chosen: slice) -> Batch:
        """Returns a batch of the `chosen` rows."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        own = {name: value[chosen] for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **own, extra={name: value[chosen] for name, value in self.extra.items()})


@dataclass
class Scores:
    """Holds what a model says of a batch: fp32 [B, T] each, whole rows on every rank, 0 where nothing was asked; None =
    the model has no such head, or it was not asked for.

    Example: a language model on the labels [b, IGNORE], p(b) = 1/2, asked for its likeliest token, which is b:
        Scores(logprobs=[-0.69, 0], entropies=[1.1, 0], candidates=[[-0.69], [0]], candidate_ids=[[b], [0]])
    """

    logprobs: Tensor | None = None  # of the labels; 0 where the label is IGNORE
    entropies: Tensor | None = None  # of the distributions that the labels were drawn from; without gradient
    values: Tensor | None = None  # of a scalar head, at every position
    candidates: Tensor | None = None  # [B, T, K]: log-probs of `Batch.candidates`, or of the `Batch.top_k` likeliest
    candidate_ids: Tensor | None = None  # [B, T, K] int64: the `Batch.top_k` likeliest tokens, the likeliest first


WeightSource = Callable[[str], Tensor]
"""Maps a canonical name to its global fp32 tensor, wherever the weights come from."""

Metrics = dict[str, Tensor]
"""Maps names to detached scalars: sums over the microbatch, or maxima if named `*_max`."""


@dataclass
class Prompt:
    """Holds token ids to continue, and the seed of their random stream (sample i of the group uses stream (seed, i)).

    Example: Prompt([5, 7, 9], seed=42)
    """

    ids: list[int]
    seed: int = 0
    example: dict[str, Any] = field(default_factory=dict)  # the line of the problem file, for an environment


@dataclass
class Sampling:
    """Says how to sample. `temperature=0` is greedy.

    Example: Sampling(max_new_tokens=64, num_samples=8, stop_ids=(1,))
    """

    max_new_tokens: int
    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()  # each ends a sequence as soon as its text, special tokens too, holds it


@dataclass
class Sample:
    """Holds one sequence, whoever wrote its parts. `ids` follow the prompt; the lists beside them have a value a token.

    Example: the policy (weights of version 3) answers `9 1`, where 1 is the stop token, and gets full marks:
        Sample([5, 7], ids=[9, 1], trained=[True, True], logprobs=[-0.1, -0.3], versions=[3, 3], finished=True,
               reward=1.0, parts={"math": 1.0}, columns={"advantages": [0.7, 0.7]}, example={"answer": "9"})
    """

    prompt_ids: list[int]
    ids: list[int]  # including the stop token, or the tokens of the stop string
    trained: list[bool]  # True = the policy wrote the token; False = a tool, an environment or a user did
    logprobs: list[float]  # under the sampling temperature, before top-p and top-k; 0 where the policy did not write
    versions: list[int]  # version of the weights that wrote each token
    finished: bool  # a stop token or string was sampled (else: cut at a limit)
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)  # rewards by name, not yet multiplied by their weights
    errors: dict[str, str] = field(default_factory=dict)  # why a reward failed, by its name
    columns: dict[str, list[float]] = field(default_factory=dict)  # for Batch.extra (advantages, returns, ...)
    example: dict[str, Any] = field(default_factory=dict)  # the line of the problem file that it answers
    experts: Tensor | None = field(default=None, compare=False)  # that the generator chose, see `rollout.experts`
    attempt: int | None = None  # rows of a group with one number are one attempt, with one reward; None = each its own

    def __post_init__(self) -> None:
        lists = (self.trained, self.logprobs, self.versions, *self.columns.values())
        assert all(len(each) == len(self.ids) for each in lists), "one value for each of `ids`"
        assert self.experts is None or len(self.experts) == len(self.prompt_ids) + len(self.ids) - 1, "of each input"

    def turns(self) -> list[tuple[bool, list[int]]]:
        """Returns the ids in runs: (whether the policy wrote them, the tokens). Between two turns of a policy there is
        always something that an environment wrote."""
        pairs = groupby(zip(self.trained, self.ids, strict=True), key=lambda pair: pair[0])
        return [(trained, [token for _, token in run]) for trained, run in pairs]

    @property
    def last_turn(self) -> list[int]:
        """Returns what the policy wrote last: what rewards read. All of `ids` where nobody else wrote any."""
        return next((ids for trained, ids in reversed(self.turns()) if trained), [])

    @property
    def written_tokens(self) -> int:
        """Returns how many tokens the policy wrote."""
        return sum(self.trained)


Group = list[Sample]
"""Holds the samples of one prompt. A preference pair is a group of two, the chosen one first."""


def attempts(group: Group) -> list[list[Sample]]:
    """Returns the rows of each attempt of a group, by `Sample.attempt`; the reward of an attempt is that of its last
    row."""
    found: dict[tuple[bool, int], list[Sample]] = {}
    for i, sample in enumerate(group):
        found.setdefault((sample.attempt is None, i if sample.attempt is None else sample.attempt), []).append(sample)
    return list(found.values())


Reward = Callable[[Sequence[Group]], None]
"""Fills in `reward`, `parts` and `errors` of every sample."""


@dataclass
class StepStats:
    """Holds what one optimizer step reports, equal on all ranks.

    Example: StepStats(loss=2.31, grad_norm=0.8, lr=3e-4, metrics={"clip_fraction": 0.1})
    `loss` is sum / denominator; `metrics` are global sums / denominator, or global maxima if named `*_max`.
    """

    loss: float
    grad_norm: float  # before clipping
    lr: float
    metrics: dict[str, float] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Returns all values by their names in metrics.jsonl."""
        return {"loss": self.loss, "grad_norm": self.grad_norm, "lr": self.lr, **self.metrics}


@dataclass(frozen=True)
class Address:
    """Says where a rank's piece of a parameter lies.

    The local parameter is the `tp_rank`-th of `tp_size` equal slices of the global tensor along `tp_dim` (the whole
    tensor if `tp_dim` is None); the piece is `[start, start + numel)` of the flattened local parameter.
    Example: rows 2-3 of a [4, 8] matrix split by rows over 2 ranks, second half by ZeRO over 2:
        Address("head.weight", shape=(4, 8), tp_dim=0, tp_rank=1, tp_size=2, start=8, numel=8)
    """

    name: str  # canonical, as in a single-process Decoder
    shape: tuple[int, ...]  # global
    tp_dim: int | None
    tp_rank: int
    tp_size: int
    start: int
    numel: int


@dataclass
class Fragment:
    """Holds an address with its flat fp32 values: keys `weight` and the optimizer's (`exp_avg`, `exp_avg_sq`).

    Example: Fragment(address, {"weight": ..., "exp_avg": ..., "exp_avg_sq": ...})
    """

    address: Address
    tensors: dict[str, Tensor]
