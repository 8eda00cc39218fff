"""Implements supervised fine-tuning: the loss is on the answers only, of all rows or of those that are chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from llmtrain.config.recipes.sft import RECIPE
from llmtrain.config.schema import Config, RewardConfig
from llmtrain.data.encode import Encoded
from llmtrain.data.ends import end_ids
from llmtrain.data.packing import Choose, Demonstrations
from llmtrain.data.traces import answer_span, thinks_and_answers
from llmtrain.losses.token import token_loss
from llmtrain.observe.log import log
from llmtrain.parallel.mesh import shutdown
from llmtrain.rewards import build_reward, check_rows, scorer_of, stop_if_failing
from llmtrain.rollout.source import shared_reward
from llmtrain.trainer.batches import count_trained, demonstration_microbatches, held_out_loss
from llmtrain.trainer.completions import completion_text
from llmtrain.trainer.job import Job, join, set_epochs, tokenizer_dir
from llmtrain.trainer.kept import keep, path_of, recall
from llmtrain.trainer.loop import train
from llmtrain.trainer.record import is_due, note_evaluation
from llmtrain.trainer.replay import Replay
from llmtrain.trainer.waste import note_padding
from llmtrain.trainer.weights import build_engine
from llmtrain.types import Sample

FILE = "rows-train.json"  # in the run directory: which rows were left out, and why
STATE = "rows"  # key in Job.state: a checksum of the rows that are trained
CHUNK = 256  # rows of each rank that are judged together
REASONS = SHORT, LONG, THOUGHTLESS, WRONG, NOT_SCORED = (
    "too short",
    "too long",
    "without whole thinking",
    "wrong",
    "not scored",
)
JUDGES = {"name", "weight", "deadline_s", "dtype", "render"}  # keys of a reward that it judges by


def main(config: Config) -> None:
    """Runs `llmtrain sft` on this rank."""
    job = join(config, RECIPE.of(config))
    rows = demonstrations(job, config.data.train, partial(choose, job) if config.sft.chooses else None)
    held_out = demonstrations(job, config.data.held_out) if config.train.eval_every_steps else None
    set_epochs(job, len(rows))
    settings, mesh = job.config.train, job.mesh
    replay = Replay(job)
    build_engine(job, settings.steps)
    if config.sft.chooses:
        check_same_rows(job, rows)

    def evaluate() -> None:
        if held_out is not None:
            scores = held_out_loss(job.engine, held_out, settings.eval_seqs, settings.micro_batch_seqs, mesh)
            note_evaluation(job, scores)

    def step(number: int) -> tuple[dict[str, float], int]:
        if number == 0 or is_due(number, settings.eval_every_steps):
            evaluate()
        turn = number + job.guard.skipped_steps(number)
        microbatches = demonstration_microbatches(job, rows, turn, fixed_width=replay.seqs > 0)
        trained = count_trained(microbatches, mesh)
        microbatches, loss = replay.mix(turn, microbatches, token_loss, trained)
        note_padding(job, microbatches)
        stats = job.engine.train_step(microbatches, loss, trained)
        tokens = (settings.global_batch_seqs + replay.seqs) * settings.seq_len
        return stats.numbers(), tokens

    train(job, step)
    evaluate()
    shutdown()


def demonstrations(job: Job, path: str, choose: Choose | None = None) -> Demonstrations:
    """Returns the rows of a file of demonstrations, as the data section says."""
    c = job.config
    return Demonstrations(path, job.tokenizer, c.train.seq_len, c.seed, c.data.pack, c.data, choose=choose)


def choose(job: Job, rows: list[Encoded]) -> list[Encoded]:
    """Returns the rows that the section keeps, the same on all ranks (a collective). Which it leaves out, and why, is
    kept in the run directory: rows are judged once, and a run that goes on takes the same.

    Raises ValueError when none is left, or a row lacks what a reward needs; RewardsFail when a reward fails too often.
    """
    made_from = origin(job, rows)
    left_out = recall(job, FILE, made_from, "numbers")
    if left_out is None:
        left_out = judge(job, rows)
        count = len(rows) - sum(map(len, left_out.values()))
        places = {reason: [rows[i].where for i in each] for reason, each in left_out.items()}
        keep(job, FILE, made_from, rows=len(rows), kept=count, left_out=places, numbers=left_out)
    report(job, len(rows), left_out)
    gone = set(chain.from_iterable(left_out.values()))  # by number: several objects may stand on one line
    return [row for i, row in enumerate(rows) if i not in gone]


def report(job: Job, rows: int, left_out: dict[str, list[int]]) -> None:
    """Logs how many rows are left out, and why. Raises ValueError when none is left."""
    told = ", ".join(f"{len(each)} {reason}" for reason, each in left_out.items() if each) or "none left out"
    path, where, kept = job.config.data.train, path_of(job, FILE), rows - sum(map(len, left_out.values()))
    if not kept:
        raise ValueError(f"{path}: none of {rows} rows is left ({told}; see {where}); ask less in the section sft")
    log(f"{path}: kept {kept} of {rows} rows: {told}; see {where}")


def origin(job: Job, rows: Sequence[Encoded]) -> dict[str, Any]:
    """Returns what the choice follows from: a checksum of all rows with their tokens, and what judges them."""
    digest, config = hashlib.sha256(), job.config
    for row in rows:
        digest.update(np.array([*row.ids, *answer_span(row)]).tobytes())
        digest.update(json.dumps([row.where, row.example.record], default=str).encode())
    rewards = config.rewards if config.sft.min_reward is not None else []
    judging = [{**r.model_dump(include=JUDGES), "function": function_of(r)} for r in rewards]
    sums = {key: found["sha256"] for key, found in job.contents.items() if key.startswith("rewards.")}
    settings = {**config.sft.model_dump(), "rewards": judging, "skip_special": config.rollout.skip_special_tokens}
    return {"rows": digest.hexdigest(), **settings, **sums}


def function_of(reward: RewardConfig) -> str | None:
    """Returns a reward's own function; of one in a file the name alone, as the contents of the file count."""
    return reward.function if reward.file is None else (reward.function or "").rpartition(":")[2]


def judge(job: Job, rows: Sequence[Encoded]) -> dict[str, list[int]]:
    """Returns by reason the numbers of the rows that the section leaves out, from 0 in the order of the file (a
    collective if it judges by reward)."""
    left_out: dict[str, list[int]] = {reason: [] for reason in REASONS}
    fit, ends = [], end_ids(job.tokenizer, (job.config.model.init_from, tokenizer_dir(job.config)))
    for i, row in enumerate(rows):
        reason = unfit(job, row, ends)
        if reason is None:
            fit.append(i)
        else:
            left_out[reason].append(i)
    least = job.config.sft.min_reward
    if least is None:
        return left_out
    for i, sample in zip(fit, rewarded(job, [rows[i] for i in fit]), strict=True):
        if sample.errors:
            left_out[NOT_SCORED].append(i)
        elif sample.reward < least:
            left_out[WRONG].append(i)
    return left_out


def unfit(job: Job, row: Encoded, ends: Sequence[int]) -> str | None:
    """Returns why a row is left out whatever a reward says, None if it is not."""
    settings, (first, stop) = job.config.sft, answer_span(row)
    if stop - first < settings.min_trace_tokens:
        return SHORT
    if settings.max_trace_tokens is not None and stop - first > settings.max_trace_tokens:
        return LONG
    if not settings.require_think:
        return None
    ended = stop > first and row.ids[stop - 1] in ends
    text = job.tokenizer.decode(row.ids[first : stop - ended], skip_special=False)  # <think> may be a special token
    return None if thinks_and_answers(text) else THOUGHTLESS


def rewarded(job: Job, rows: Sequence[Encoded]) -> list[Sample]:
    """Returns the answers of the rows as samples with their rewards, as if the policy had written them: each rank
    judges its share (a collective). They hold no tokens, which would be many."""
    if not rows:
        return []
    rewards, answers = job.config.rewards, []
    check_rows(rewards, [row.example.record for row in rows], [row.where for row in rows])
    reward = shared_reward(build_reward(rewards, completion_text(job.config, job.tokenizer)), job.mesh)
    log(f"{len(rows)} answers are judged by {', '.join(each.name for each in rewards)}")
    chunk = CHUNK * job.mesh.size
    for first in range(0, len(rows), chunk):
        groups = [[answered(row)] for row in rows[first : first + chunk]]
        reward(groups)
        answers += [replace(sample, ids=[], trained=[], logprobs=[], versions=[]) for (sample,) in groups]
    for each in rewards:  # nothing is judged while it trains
        scorer_of(each).close()
    stop_if_failing(rewards, [answer.errors for answer in answers])
    return answers


def answered(row: Encoded) -> Sample:
    """Returns the answer of a row as a sample."""
    first, stop = answer_span(row)
    n = stop - first
    ids, example = row.ids[first:stop], row.example.record
    return Sample(row.ids[:first], ids, [True] * n, [0.0] * n, [0] * n, finished=True, example=example)


def check_same_rows(job: Job, rows: Demonstrations) -> None:
    """Raises ValueError when a run that goes on has chosen other rows than before: its file with the choice is gone,
    and a reward has judged otherwise."""
    digest = hashlib.sha256()
    for example in rows.examples:
        digest.update(np.array(example["input_ids"]).tobytes())
    now = digest.hexdigest()
    if job.state.setdefault(STATE, now) != now:
        raise ValueError(
            f"{path_of(job, FILE)}: other rows are kept than those that the run was trained on, as a reward has judged "
            "otherwise; put the file back, or give the run another name"
        )
