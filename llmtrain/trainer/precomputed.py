"""Computes what a frozen reference says of pairs once, keeps it in the run directory, and lets the model go."""

from __future__ import annotations

import gc
import hashlib
import json

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.arch.adapters import without_adapters
from llmtrain.checkpoint.source import fingerprint, locate
from llmtrain.data.pairs import Pairs, fill
from llmtrain.engine.base import Scorer
from llmtrain.engine.build import Role, build_frozen
from llmtrain.losses.preference import pair_sums
from llmtrain.observe.log import log
from llmtrain.trainer.job import Job
from llmtrain.trainer.kept import keep, path_of, recall
from llmtrain.trainer.pairs import pair_microbatches
from llmtrain.trainer.weights import start_source

COLUMN = "ref_logprobs"
NUMBER = "pair_number"  # a column of fp32, which holds whole numbers up to 2^24 exactly
FILE = "reference-{name}.json"  # in the run directory


def precompute(job: Job, files: dict[str, Pairs]) -> None:
    """Gives each answer of these pairs the column `ref_logprobs`, whose sum is the log-prob of the whole answer under
    the weights at the start, without adapters (a collective).

    They come from `reference-NAME.json` in the run directory where that was made from the same tokens, weights and
    precision, else from a frozen model, which is gone when this returns: call it before the engine is built.
    """
    place = locate(job.config.model.init_from, job.mesh)
    made_from = {name: origin(pairs, place, job.config.engine.precision) for name, pairs in files.items()}
    tables = {name: recall(job, FILE.format(name=name), made_from[name], "logprobs") for name in files}
    if missing := [name for name, table in tables.items() if table is None]:
        reference = start_model(job)
        for name in missing:
            tables[name] = reference_sums(job, files[name], reference)
            keep(job, FILE.format(name=name), made_from[name], logprobs=tables[name])
            log(f"log-probs of the reference for {len(tables[name])} pairs in {path_of(job, FILE.format(name=name))}")
        del reference
        gc.collect()  # modules and hooks refer to each other
    for name, pairs in files.items():
        for pair, sums in zip(pairs.pairs, tables[name], strict=True):
            fill(pair, COLUMN, sums)


def origin(pairs: Pairs, place: str, precision: str) -> dict[str, str]:
    """Returns what log-probs follow from: a checksum of all tokens and their masks, the fingerprint of the weights at
    `place`, and the precision."""
    digest = hashlib.sha256()
    for sample in (sample for pair in pairs.pairs for sample in pair):
        digest.update(json.dumps([sample.prompt_ids, sample.ids, sample.trained]).encode())
    return {"tokens": digest.hexdigest(), "weights": fingerprint(place), "precision": precision}


def start_model(job: Job) -> Scorer:
    """Returns the weights at the start, without adapters, as a frozen model (a collective)."""
    model, config = without_adapters(job.model), job.config
    role = Role("reference", model, config.parallel, config.engine, start_source(job, model))
    return build_frozen(role, job.mesh)


def reference_sums(job: Job, pairs: Pairs, reference: Scorer) -> list[list[float]]:
    """Returns the log-probs of the chosen and the rejected answer of each pair of the file, in its order (a
    collective)."""
    table = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for number, pair in enumerate(pairs.pairs):
        fill(pair, NUMBER, (number, 0))
    block = job.config.train.global_batch_seqs
    for first in range(0, len(pairs), block):
        batches = pair_microbatches(job, pairs, range(first, min(first + block, len(pairs))), (NUMBER,))
        for batch, scores in zip(batches, reference.score(batches), strict=True):
            numbers = pair_sums(batch.extra[NUMBER], batch.loss_mask, batch)[:, 0].long()
            table[numbers] = pair_sums(scores.logprobs.cpu(), batch.loss_mask, batch).double()
    return gathered(job, table).tolist()


def gathered(job: Job, table: Tensor) -> Tensor:
    """Returns the sum of the tables of all data-parallel ranks: each row is 0 on all but one."""
    whole = table.to(job.mesh.device)
    dist.all_reduce(whole, group=job.mesh.groups["dp"])
    return whole.cpu()
