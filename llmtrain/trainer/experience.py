"""From prompts to the microbatches of a policy update."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from llmtrain.data.groups import group_batch, group_rows, row_width
from llmtrain.data.prompts import PromptSet
from llmtrain.data.sampler import derive
from llmtrain.losses.advantage import group_advantages
from llmtrain.rewards import reward_fn
from llmtrain.rollout.generator import Generator
from llmtrain.trainer.job import Job
from llmtrain.types import Batch, Experience, Prompt, Rollout, Sampling

WIDTH_MULTIPLE = 16  # of rows, so that few different shapes occur

Group = list[Experience]


def collect(job: Job, generator: Generator, prompts: PromptSet, number: int) -> list[Experience]:
    """Sample, score and credit one step's groups; the same on every trainer (a collective)."""
    config = job.config
    first = number * config.grpo.prompts_per_step
    chosen = [prompts.at(first + i, config.seed) for i in range(config.grpo.prompts_per_step)]
    asked = [
        Prompt(prompts.prompt_ids(example), derive(config.seed, f"rollout/{first + i}"))
        for i, example in enumerate(chosen)
    ]
    rollouts = generator.generate(asked, sampling_of(job))
    stale = {r.weight_version for r in rollouts} - {number}
    assert not stale, f"rollouts of weight version {stale} at step {number}"
    texts = [job.tokenizer.decode(r.completion_ids) for r in rollouts]
    rewards = rewards_of(job, texts, [prompts.examples[chosen[r.group]] for r in rollouts])
    return credit(rollouts, texts, rewards, config.rollout.group_size, config.grpo.normalize_std)


def sampling_of(job: Job) -> Sampling:
    """The rollout section as a request."""
    r = job.config.rollout
    stop_ids = (job.tokenizer.eos_id,)
    return Sampling(r.max_new_tokens, r.group_size, r.temperature, r.top_p, r.top_k, stop_ids)


def rewards_of(job: Job, texts: Sequence[str], examples: Sequence[dict]) -> list[float]:
    """Rewards; each trainer scores its share."""
    reward, mesh = reward_fn(job.config.grpo.reward), job.mesh
    mine = [reward(t, e) for t, e in zip(texts[mesh.rank :: mesh.size], examples[mesh.rank :: mesh.size], strict=True)]
    rewards = [0.0] * len(texts)
    for rank, part in enumerate(mesh.all_gather_json(mine)):
        rewards[rank :: mesh.size] = part
    return rewards


def credit(
    rollouts: Sequence[Rollout], texts: Sequence[str], rewards: Sequence[float], group_size: int, normalize_std: bool
) -> list[Experience]:
    """Group-relative advantages; `rollouts` lie group by group."""
    advantages = group_advantages(torch.tensor(rewards).view(-1, group_size), normalize_std).flatten().tolist()
    return [Experience(*each) for each in zip(rollouts, rewards, advantages, texts, strict=True)]


def learnable(experiences: Sequence[Experience]) -> list[Group]:
    """Groups in which some sample has an advantage."""
    groups = [list(members) for _, members in groupby(experiences, key=lambda e: e.rollout.group)]
    return [group for group in groups if any(e.advantage for e in group)]


def split_groups(groups: Sequence[Group], minibatches: int) -> list[list[Group]]:
    """Dealt out in turn; empty minibatches are left out."""
    return [part for i in range(minibatches) if (part := list(groups[i::minibatches]))]


def microbatches_of(job: Job, groups: Sequence[Group], fixed_width: bool) -> list[Batch]:
    """This rank's microbatches of the groups, each prompt once for its samples.

    Rows are as wide as the longest group, at most `train.seq_len` (exactly that with `fixed_width`).
    """
    config, mesh = job.config, job.mesh
    seq_len, micro = config.train.seq_len, config.train.micro_batch_seqs
    multiple = WIDTH_MULTIPLE * mesh.sizes["cp"] * mesh.sizes["tp"]
    width = seq_len if fixed_width else min(seq_len, row_width(groups, multiple))
    block = micro * mesh.dp_size
    turns = max(mesh.sizes["pp"], -(-len(group_rows(groups, width)) // block))
    batch = group_batch(groups, width, turns * block, job.tokenizer.pad_id)
    starts = [turn * block + mesh.dp_rank * micro for turn in range(turns)]
    return [rows_of(batch, slice(start, start + micro), config.rollout.temperature) for start in starts]


def rows_of(batch: Batch, rows: slice, temperature: float) -> Batch:
    """Some rows, to be scored at the temperature they were sampled with."""
    names = ("input_ids", "labels", "loss_mask", "positions", "segment_ids", "branch_ids")
    extra = {name: value[rows] for name, value in batch.extra.items()}
    return Batch(**{name: getattr(batch, name)[rows] for name in names}, extra=extra, temperature=temperature)
