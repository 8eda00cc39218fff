"""Chooses the samples that a rank takes in a step, and reads the text rows that several recipes use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config.ramp import longest_row
from llmtrain.config.schema import Config
from llmtrain.data.groups import group_batch, group_rows, row_width
from llmtrain.data.objectives import objectives
from llmtrain.data.packing import Demonstrations, TextRows
from llmtrain.data.shards import check_tokenizer
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.engine.base import Engine
from llmtrain.losses.token import perplexity_of, text_measures
from llmtrain.parallel.mesh import Mesh
from llmtrain.trainer.job import Job, data_dir
from llmtrain.types import IGNORE, Batch, Group

WIDTH_MULTIPLE = 16  # of the width of rows of groups, so that few different shapes occur


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


def text_rows(config: Config, split: str, tokenizer: Tokenizer) -> TextRows:
    """Returns the rows of the shards, mixed by the weights of `data.sources` where they are given.

    For training they are as long as the longest row of the run, with the objectives of the data section; held-out rows
    are always `train.seq_len` tokens of plain text, so their scores compare over a run. Raises ValueError when the
    shards were made with another tokenizer, or it lacks a sentinel.
    """
    check_tokenizer(data_dir(config), tokenizer)
    weights = {source.name: source.weight for source in config.data.sources} or None
    mask = config.data.mask_documents
    if split == "held_out":
        return TextRows(data_dir(config), split, config.train.seq_len, config.seed, mask, weights)
    rearranged = objectives(config.data, tokenizer, config.seed)
    return TextRows(data_dir(config), split, longest_row(config.train), config.seed, mask, weights, rearranged)


def evaluate_text(engine: Engine, rows: TextRows, num_rows: int, micro_seqs: int, mesh: Mesh) -> dict[str, float]:
    """Returns the mean loss (nats a token), perplexity and bits a byte over the first held-out rows (a collective)."""
    loss = mean_loss(engine, rows, num_rows, micro_seqs, mesh)
    return text_measures(loss, rows.bytes_per_token)


def held_out_loss(engine: Engine, rows: Demonstrations, num_rows: int, micro_seqs: int, mesh: Mesh) -> dict[str, float]:
    """Returns the mean loss (nats a token) and perplexity of what is trained in the first held-out rows (a
    collective)."""
    loss = mean_loss(engine, rows, num_rows, micro_seqs, mesh)
    return {"loss": loss, "perplexity": perplexity_of(loss)}


def mean_loss(engine: Engine, rows: TextRows | Demonstrations, num_rows: int, micro_seqs: int, mesh: Mesh) -> float:
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
    job: Job, groups: Sequence[Group], columns: Sequence[str], fixed_width: bool, whole: bool = False
) -> list[Batch]:
    """Returns this rank's microbatches of the groups, each prompt once for its samples, with these `columns`.

    Rows are as wide as the longest group, at most `train.seq_len` (exactly that with `fixed_width`), and scored at the
    temperature that they were sampled with. `whole`: no group is cut over rows; ValueError if one is too long.
    """
    config, mesh = job.config, job.mesh
    seq_len, micro = config.train.seq_len, config.train.micro_batch_seqs
    multiple = WIDTH_MULTIPLE * mesh.sizes["cp"] * mesh.sizes["tp"]
    width = seq_len if fixed_width else min(seq_len, row_width(groups, multiple))
    block = micro * mesh.dp_size
    turns = max(mesh.sizes["pp"], -(-len(group_rows(groups, width, columns, whole)) // block))
    batch = group_batch(groups, width, turns * block, job.tokenizer.pad_id, columns, whole)
    batch.temperature = config.rollout.temperature
    starts = [turn * block + mesh.dp_rank * micro for turn in range(turns)]
    return [batch.rows(slice(start, start + micro)) for start in starts]
