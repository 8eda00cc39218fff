"""Chooses the samples that a rank takes in a step, and reads the text rows that several recipes use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.arch.attention import FLEX_TOKENS, TILE_TOKENS
from llmtrain.arch.resolve import train_flops_per_token
from llmtrain.config.data import AnnealConfig, DataConfig
from llmtrain.config.ramp import longest_row, phase_at
from llmtrain.config.schema import Config, TrainConfig
from llmtrain.data.groups import piece_batch, pieces
from llmtrain.data.microbatches import Layout, Limits, plan_fixed, plan_microbatches
from llmtrain.data.mix import MixSettings
from llmtrain.data.objectives import objectives
from llmtrain.data.packing import Demonstrations, TextRows
from llmtrain.data.shards import check_tokenizer
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.engine.base import Scorer
from llmtrain.losses.token import perplexity_of, text_measures
from llmtrain.parallel.mesh import Mesh
from llmtrain.trainer.job import Job, data_dir
from llmtrain.types import IGNORE, Batch, Group

WIDTH_MULTIPLE = 16  # of the width of rows of groups, so that few different shapes occur
SPARSE_TOKENS = min(FLEX_TOKENS, TILE_TOKENS)  # rows from which attention leaves out what is not seen ...
NEAR_TOKENS = 512  # ... and costs a token at least what a masked row of so many does (see `data.microbatches`)


def rank_samples(step: int, global_seqs: int, micro_seqs: int, mesh: Mesh) -> list[range]:
    """Returns the global sample numbers of this rank's microbatches. A step takes the same samples on any mesh."""
    return samples_from(step * global_seqs, global_seqs, micro_seqs, mesh)


def samples_from(first: int, global_seqs: int, micro_seqs: int, mesh: Mesh) -> list[range]:
    """Returns `rank_samples` of a step that begins with sample `first`."""
    block = micro_seqs * mesh.dp_size
    starts = range(first + mesh.dp_rank * micro_seqs, first + global_seqs, block)
    return [range(start, start + micro_seqs) for start in starts]


def count_trained(microbatches: Sequence[Batch], mesh: Mesh) -> Tensor:
    """Returns the number of trained tokens over all data-parallel ranks: the denominator of a mean (a collective)."""
    count = torch.tensor([float(sum(b.loss_mask.sum() for b in microbatches))], device=mesh.device)
    dist.all_reduce(count, group=mesh.groups["dp"])
    return count


def text_rows(config: Config, split: str, tokenizer: Tokenizer, samples: int = 0) -> TextRows:
    """Returns the rows of the shards, mixed as the data section says; training takes the first `samples` of them.

    For training they are as long as the longest row of the run, with the objectives of the data section; held-out rows
    are always `train.seq_len` contiguous tokens of plain text, so their scores compare over a run. Raises ValueError
    when the shards were made with another tokenizer, or it lacks a sentinel, or they do not suffice.
    """
    check_tokenizer(data_dir(config), tokenizer)
    weights = {source.name: source.weight for source in config.data.sources} or None
    mask = config.data.mask_documents
    if split == "held_out":
        return TextRows(data_dir(config), split, config.train.seq_len, config.seed, mask, weights)
    rearranged, mix = objectives(config.data, tokenizer, config.seed), mix_settings(config.data, config.train, samples)
    whole, longest = config.data.packing == "best_fit", longest_row(config.train)
    return TextRows(data_dir(config), split, longest, config.seed, mask, weights, rearranged, mix, whole)


def mix_settings(data: DataConfig, train: TrainConfig, samples: int) -> MixSettings | None:
    """Returns how the sources are mixed over `samples` rows; None = at random in blocks."""
    capped = {source.name: source.max_epochs for source in data.sources if source.max_epochs is not None}
    if data.mix == "blocks":
        return None
    languages = {source.name: source.language for source in data.sources if source.language is not None}
    weights = {source.name: source.weight for source in data.sources} or None
    later = [(first_sample(entry, train), entry.weights) for entry in data.anneal]
    return MixSettings(weights, capped, languages, data.temperature, later, samples)


def first_sample(entry: AnnealConfig, train: TrainConfig) -> int:
    """Returns the sample from which on the shares of an entry of `data.anneal` hold: the first row that begins with its
    token, or its step, or after them."""
    tokens = entry.from_tokens
    if entry.from_step is not None:
        tokens = phase_at(train, entry.from_step).token_at(entry.from_step)
    return -(-tokens // longest_row(train))


def evaluate_text(
    engine: Scorer, rows: TextRows, num_rows: int, micro_seqs: int, mesh: Mesh, tokenizer: Tokenizer
) -> dict[str, float]:
    """Returns the mean loss (nats a token), perplexity and bits a byte over the first held-out rows (a collective)."""
    loss = mean_loss(engine, rows, num_rows, micro_seqs, mesh)
    return text_measures(loss, rows.bytes_per_token(num_rows, tokenizer.decode))


def held_out_loss(engine: Scorer, rows: Demonstrations, num_rows: int, micro_seqs: int, mesh: Mesh) -> dict[str, float]:
    """Returns the mean loss (nats a token) and perplexity of what is trained in the first held-out rows (a
    collective)."""
    loss = mean_loss(engine, rows, num_rows, micro_seqs, mesh)
    return {"loss": loss, "perplexity": perplexity_of(loss)}


def mean_loss(engine: Scorer, rows: TextRows | Demonstrations, num_rows: int, micro_seqs: int, mesh: Mesh) -> float:
    """Returns the mean loss (nats a token) over the first rows (a collective)."""
    num_rows = min(num_rows, len(rows))
    # Equal numbers of microbatches everywhere, at least one a pipeline stage; rows past the end count nothing.
    turns = max(mesh.sizes["pp"], -(-num_rows // (micro_seqs * mesh.dp_size)))
    batches = [
        _held_out(rows, samples, num_rows)
        for samples in rank_samples(0, turns * micro_seqs * mesh.dp_size, micro_seqs, mesh)
    ]
    total = sum(scores.logprobs.double().sum() for scores in engine.score(batches))
    total = torch.tensor([float(total)], device=mesh.device)
    dist.all_reduce(total, group=mesh.groups["dp"])
    return -float(total) / float(count_trained(batches, mesh))


def _held_out(rows: TextRows | Demonstrations, samples: range, num_rows: int) -> Batch:
    """Returns the rows of these samples, of which those past the end have no labels."""
    batch = rows.batch([min(s, num_rows - 1) for s in samples])
    past = torch.tensor([s >= num_rows for s in samples])[:, None]
    batch.labels, batch.loss_mask = batch.labels.masked_fill(past, IGNORE), batch.loss_mask & ~past
    return batch


def split_groups(groups: Sequence[Group], minibatches: int) -> list[list[Group]]:
    """Deals the groups out in turn; empty minibatches are left out."""
    return [part for i in range(minibatches) if (part := list(groups[i::minibatches]))]


def group_microbatches(
    job: Job,
    groups: Sequence[Group],
    columns: Sequence[str],
    fixed_width: bool = False,
    whole: bool = False,
    policy: bool = False,
) -> list[Batch]:
    """Returns this rank's microbatches of the groups, what their samples share once (see `data.tree`), with these
    `columns`, scored at the temperature that they were sampled with.

    How many, and of what shape, says `data.microbatches`. A group longer than `train.seq_len` is cut into pieces; with
    `whole`, for losses that compare its samples, it is a ValueError. `fixed_width`: text rows come into the same step.
    `policy`: they are for the model that wrote the samples, which with `rollout.router_replay` gets their experts.
    """
    limits = limits_of(job.config.train, job.mesh)
    parts = [piece for group in groups for piece in pieces(group, limits.row_tokens, whole)]
    layout = planned(job, [part.tokens for part in parts], [part.seen_pairs for part in parts], fixed_width)
    mine = layout.microbatches[job.mesh.dp_rank :: job.mesh.dp_size]
    experts = policy and job.config.rollout.router_replay
    batches = [piece_batch(parts, rows, layout.width, job.tokenizer.pad_id, columns, experts) for rows in mine]
    return [replace(batch, temperature=job.config.rollout.temperature) for batch in batches]


def demonstration_microbatches(job: Job, rows: Demonstrations, turn: int, fixed_width: bool = False) -> list[Batch]:
    """Returns this rank's microbatches of the `train.global_batch_seqs` rows of a step, the `turn`-th, as wide as the
    longest of them needs.

    With `train.micro_batch_tokens` rows that are short share one, else each microbatch has `train.micro_batch_seqs`.
    `fixed_width`: text rows come into the same step.
    """
    train, mesh = job.config.train, job.mesh
    samples = range(turn * train.global_batch_seqs, (turn + 1) * train.global_batch_seqs)
    lengths = [rows.lengths(sample) for sample in samples]
    if train.micro_batch_tokens is None:
        longest = train.seq_len if one_form(mesh, fixed_width) else max(map(sum, lengths))
        width = limits_of(train, mesh).width(longest)
        return [rows.batch(s, width) for s in rank_samples(turn, train.global_batch_seqs, train.micro_batch_seqs, mesh)]
    pairs = [sum(n * (n + 1) // 2 for n in each) for each in lengths]
    layout = planned(job, [sum(each) for each in lengths], pairs, fixed_width)
    mine = layout.microbatches[mesh.dp_rank :: mesh.dp_size]
    return [rows.rows([[samples[i] for i in row] for row in batch], layout.width) for batch in mine]


def planned(job: Job, lengths: Sequence[int], loads: Sequence[int], fixed_width: bool) -> Layout:
    """Returns the layout of pieces of these lengths, the cheapest for the model of the job."""
    limits = limits_of(job.config.train, job.mesh)
    if one_form(job.mesh, fixed_width):
        return plan_fixed(lengths, loads, limits, job.config.train.micro_batch_seqs)
    longest = max(lengths, default=1)

    def cost(width: int) -> float:
        # the function counts half of a row's scores; a mask leaves none out
        return train_flops_per_token(job.model, 2 * (width if width < SPARSE_TOKENS else max(NEAR_TOKENS, longest)))

    return plan_microbatches(lengths, loads, limits, cost)


def limits_of(train: TrainConfig, mesh: Mesh) -> Limits:
    """Returns the bounds of microbatches whose rows have no fixed number."""
    multiple = math.lcm(WIDTH_MULTIPLE, 2 * mesh.sizes["cp"] * mesh.sizes["tp"])
    tokens = train.micro_batch_tokens or train.micro_batch_seqs * train.seq_len
    return Limits(tokens, train.seq_len, multiple, mesh.dp_size, mesh.sizes["pp"])


def one_form(mesh: Mesh, with_text: bool) -> bool:
    """Tells whether all microbatches must have the shape of text rows: a pipeline's have one, and `with_text` some of
    them are text."""
    return with_text and mesh.sizes["pp"] > 1
