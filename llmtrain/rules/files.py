"""Rules of the model, the run and its files. Each says value, rule and remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator

from llmtrain.config.ramp import ramp_faults
from llmtrain.config.schema import TokenizerConfig
from llmtrain.config.specials import NUM_BYTES, special_tokens
from llmtrain.rules.case import TRAIN, TUNE, Case, Rules


def _one_process(case: Case) -> Iterator[str]:
    if case.world_size > 1:
        yield f"ranks={case.world_size}: {case.command} runs in one process; start it without torchrun (ranks: 1)"


def _makes_tokenizer(case: Case) -> bool:
    """Is there no tokenizer yet?"""
    return not os.path.exists(case.config.tokenizer.path or os.path.join(case.config.directory, "tokenizer"))


def _vocabulary(case: Case) -> Iterator[str]:
    t = case.config.tokenizer
    if case.model and _makes_tokenizer(case) and not t.base and case.model.vocab_size < t.vocab_size:
        yield (
            f"model.vocab_size={case.model.vocab_size}: must be at least "
            f"tokenizer.vocab_size={t.vocab_size}; raise it or lower the tokenizer's"
        )


def _new_tokenizer(case: Case) -> Iterator[str]:
    t = case.config.tokenizer
    specials = special_tokens(t, case.config.data)
    if twice := sorted({name for name in specials if not name or specials.count(name) > 1}):
        yield f"tokenizer.special_tokens: {twice[0]!r} must not be empty or named twice; remove it"
    smallest = NUM_BYTES + len(specials)
    if not t.base and _makes_tokenizer(case) and t.vocab_size < smallest:
        yield (
            f"tokenizer.vocab_size={t.vocab_size}: must be at least {smallest}, {NUM_BYTES} bytes and {len(specials)} "
            "special tokens; raise it"
        )


def _base_tokenizer(case: Case) -> Iterator[str]:
    t = case.config.tokenizer
    if t.base is None:
        return
    yield from _existing(case, "tokenizer.base", t.base, None)
    for key in ("algorithm", "vocab_size", "train_bytes", "split", "digits"):
        if getattr(t, key) != TokenizerConfig.model_fields[key].default:
            yield (
                f"tokenizer.{key}={getattr(t, key)}: must not be set with tokenizer.base, which is taken as it is; "
                "remove one of them"
            )


def _positions(case: Case) -> Iterator[str]:
    seq_len = case.config.train.seq_len
    if case.model and seq_len > case.model.max_positions:
        yield (
            f"train.seq_len={seq_len}: must be at most model.max_positions={case.model.max_positions}; "
            "lower it or raise max_positions"
        )


def _ramps(case: Case) -> Iterator[str]:
    train = case.config.train
    for name in ("batch_ramp", "seq_ramp"):
        if case.command in TUNE and getattr(train, name):
            yield f"train.{name}: must be empty, only pretrain has ramps; remove it from {case.command}"
    yield from ramp_faults(train)


def _objectives(case: Case) -> Iterator[str]:
    d = case.config.data
    if d.fim_share + d.span_share > 1:
        yield (
            f"data.fim_share={d.fim_share:g}: must be at most 1 - data.span_share={d.span_share:g}, a document has one "
            "objective; lower one of them"
        )


def _learning_rate(case: Case) -> Iterator[str]:
    o = case.config.optim
    if o.schedule != "constant" and o.min_lr > o.lr:
        yield f"optim.min_lr={o.min_lr:g}: must be at most optim.lr={o.lr:g}, where the schedule ends; lower min_lr"


def _groups(case: Case) -> Iterator[str]:
    g, group_size = case.config.grpo, case.config.rollout.group_size
    if g.prompts_per_step % g.minibatches:
        yield (
            f"grpo.prompts_per_step={g.prompts_per_step}: must be a multiple of grpo.minibatches={g.minibatches}; "
            "change one of them"
        )
    if case.config.rollout.max_new_tokens >= case.config.train.seq_len:
        yield (
            f"rollout.max_new_tokens={case.config.rollout.max_new_tokens}: must be less than "
            f"train.seq_len={case.config.train.seq_len}, which holds the prompt too; lower it or raise seq_len"
        )
    if group_size < 2:
        yield f"rollout.group_size={group_size}: must be at least 2, an advantage compares samples; raise it"


def _spikes(case: Case) -> Iterator[str]:
    g, every_steps = case.config.guard, case.config.checkpoint.every_steps
    if g.spike == "off":
        return
    if case.command == "grpo":
        yield f"guard.spike={g.spike}: must be off in grpo, whose loss is near 0 whatever happens; remove it"
    if g.spike_window < 2:
        yield f"guard.spike_window={g.spike_window}: must be at least 2, a deviation needs them; raise it"
    if g.spike == "rewind" and not 0 < every_steps <= g.spike_window:
        yield (
            f"checkpoint.every_steps={every_steps}: must be in 1 .. guard.spike_window={g.spike_window} with "
            "guard.spike=rewind, so that there is a checkpoint to go back to; change one of them"
        )


def _wandb(case: Case) -> Iterator[str]:
    if case.config.log.wandb == "online" and not os.environ.get("WANDB_API_KEY"):
        yield "log.wandb=online: needs the environment variable WANDB_API_KEY; set it or use log.wandb=offline"


def _existing(case: Case, key: str, path: str | None, needed: str | None) -> Iterator[str]:
    """A path that is read must be there; None is refused with the reason `needed`."""
    if path is None and needed:
        yield f"{key}: must be set, {needed}; give a path"
    if path is not None and case.missing(path):
        yield f"{key}={path}: does not exist; give an existing path or make it first"


def _init_from(case: Case) -> Iterator[str]:
    path = case.config.model.init_from
    if path is None and case.command in ("grpo", "eval"):
        yield f"model.init_from: must be set, {case.command} starts from a trained model; give its directory"
    if path is not None and case.missing_model(path):
        yield f"model.init_from={path}: does not exist; give the directory of a model or of an earlier stage"


def _tokenizer(case: Case) -> Iterator[str]:
    path = case.config.tokenizer.path
    if case.makes_data or os.path.exists(os.path.join(case.config.directory, "tokenizer")):
        return
    yield from _existing(case, "tokenizer.path", path, f"{case.command} uses the tokenizer that the model knows")


def _sources(case: Case) -> Iterator[str]:
    for source in case.config.data.sources:
        if source.type in ("text", "jsonl"):
            needed = f"a source of type {source.type} reads files"
            yield from _existing(case, f"data.sources.{source.name}.path", source.path, needed)


def _train_file(case: Case) -> Iterator[str]:
    data = case.config.data
    yield from _existing(case, "data.train", data.train, f"{case.command} reads its prompts there")
    if data.replay_seqs:
        yield from _existing(case, "data.path", data.path, "data.replay_seqs takes text from the shards there")


def _evaluation_files(case: Case) -> Iterator[str]:
    data, evaluation = case.config.data, case.config.eval
    if evaluation.problems:
        yield from _existing(case, "data.held_out", data.held_out, "eval.problems are read there")
    if evaluation.text:
        yield from _existing(case, "data.path", data.path, "eval.text measures on the held-out shards there")


RULES: Rules = (
    (("data", "tokenizer", "eval", "export", "report"), _one_process),
    (("pretrain",), _vocabulary),
    ((*TRAIN, "plan"), _positions),
    ((*TRAIN, "plan"), _ramps),
    (TRAIN, _objectives),
    (TRAIN, _learning_rate),
    (("grpo",), _groups),
    (TRAIN, _spikes),
    (TRAIN, _wandb),
    ((*TRAIN, "eval", "export"), _init_from),
    ((*TUNE, "eval", "export"), _tokenizer),
    (("data", "tokenizer", "pretrain"), _sources),
    (("data", "tokenizer", *TRAIN), _new_tokenizer),
    (("data", "tokenizer", *TRAIN), _base_tokenizer),
    (TUNE, _train_file),
    (("eval",), _evaluation_files),
)
