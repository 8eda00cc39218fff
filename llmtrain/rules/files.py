"""Checks the run, its tokenizer, its data and its files. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from llmtrain.config.hub import is_name
from llmtrain.config.lm_eval import LmEvalConfig
from llmtrain.config.machine import has_wandb_key
from llmtrain.config.ramp import ramp_faults
from llmtrain.config.recipes import JUDGES, names_of, planned_recipes
from llmtrain.config.rows import dangling, is_hub_name, split_path
from llmtrain.config.schema import RewardConfig, TokenizerConfig
from llmtrain.config.specials import NUM_BYTES, special_tokens
from llmtrain.rules.case import (
    Case,
    Rules,
    command,
    either,
    evaluates_problems,
    here,
    plans,
    pretrains,
    reads_rewards,
    samples,
    trains,
    tunes,
)
from llmtrain.rules.vocabulary import makes_tokenizer


def _run_places(case: Case) -> Iterator[str]:
    for key, text in _texts(case.config.model_dump(), ""):
        if text.startswith("{run}") and case.run_dir is None:  # a place; a prompt may spell it
            yield f"{key}={text}: only a document with stages knows its run; write the path out"


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yields every text below a value, with its key."""
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from _texts(inner, f"{key}.{name}".lstrip("."))


def _one_process(case: Case) -> Iterator[str]:
    if case.world_size > 1:
        yield f"ranks={case.world_size}: {case.command} runs in one process; start it without torchrun (ranks: 1)"


def _new_tokenizer(case: Case) -> Iterator[str]:
    t = case.config.tokenizer
    specials = special_tokens(t, case.config.data)
    if twice := sorted({name for name in specials if not name or specials.count(name) > 1}):
        yield f"tokenizer.special_tokens: {twice[0]!r} must not be empty or named twice; remove it"
    smallest = NUM_BYTES + len(specials)
    if not t.base and makes_tokenizer(case) and t.vocab_size < smallest:
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
        if tunes(case) and getattr(train, name):
            have = names_of(lambda recipe: recipe.packs_text)
            yield f"train.{name}: must be empty, only {have} has ramps; remove it from {case.command}"
    yield from ramp_faults(train)


def _epochs(case: Case) -> Iterator[str]:
    """Epochs are counted where rows of a file are trained, and only one of steps and epochs can hold."""
    train = case.config.train
    if train.epochs is None:
        return
    if not tunes(case) or samples(case):
        have = names_of(lambda recipe: not recipe.packs_text and not recipe.samples)
        yield f"train.epochs={train.epochs:g}: only {have} counts epochs; set train.steps in {case.command}"
    elif "steps" in train.model_fields_set:
        yield f"train.epochs={train.epochs:g}: not together with train.steps={train.steps}; remove one of them"


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


def _completions(case: Case) -> Iterator[str]:
    if case.config.rollout.max_new_tokens >= case.config.train.seq_len:
        yield (
            f"rollout.max_new_tokens={case.config.rollout.max_new_tokens}: must be less than "
            f"train.seq_len={case.config.train.seq_len}, which holds the prompt too; lower it or raise seq_len"
        )


def _rewards(case: Case) -> Iterator[str]:
    rewards = case.config.rewards
    names = [reward.name for reward in rewards]
    for reward in rewards:
        file = (reward.function or "").rpartition(":")[0]
        if file.endswith(".py") and not case.planned and not os.path.isfile(file):
            yield f"rewards.{reward.name}.function={reward.function}: {file} is no file here; correct the path"
        yield from (*_reward_model(case, reward), *_judge(case, reward))
        if reward.unsandboxed and reward.function is None:
            yield f"rewards.{reward.name}.unsandboxed=true: only a function of your own may run outside; remove it"
    environment, agent = case.config.rollout.environment, case.config.rollout.agent
    rewarding = environment is not None and not (environment.tools or environment.mcp)  # tools reward nothing
    sampled, evaluated = samples(case) and (rewarding or agent is not None), evaluates_problems(case) and rewarding
    unjudged = not evaluated if case.recipe is None else case.recipe.judged and not sampled
    if not names and (unjudged or (evaluates_problems(case) and not evaluated)):
        yield "rewards=[]: must name at least one reward; add one, such as {name: math}"
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"rewards: {twice[0]} is named twice; remove one, or raise its weight; a function may have another `name`"


def _reward_model(case: Case, reward: RewardConfig) -> Iterator[str]:
    """Yields what is wrong with a reward that is a model."""
    key = f"rewards.{reward.name}.model={reward.model}"
    if reward.model is None:
        return
    if reward.function is not None:
        yield f"{key}: not with function={reward.function}, a reward is one of the two; remove one of them"
    if case.missing(reward.model) and not is_name(reward.model):
        yield f"{key}: does not exist; give an export of a reward model, a Hugging Face directory or a name on the hub"
    if case.config.rewards[0] is reward and evaluates_problems(case):
        yield f"{key}: eval calls an answer right by its first reward, and a model knows no right; put another first"


def _judge(case: Case, reward: RewardConfig) -> Iterator[str]:
    """Yields what is wrong with a reward that a judge gives."""
    key, settings = f"rewards.{reward.name}", reward.rubric
    if settings is None:
        return
    yield from settings.faults(key)
    for other in ("function", "model"):
        if getattr(reward, other) is not None:
            yield f"{key}.{other}={getattr(reward, other)}: not with rubric, a reward is one of them; remove one"
    if settings.rubric is not None and case.missing(settings.rubric):
        yield f"{key}.rubric.rubric={settings.rubric}: does not exist; give a text with {{prompt}} and {{completion}}"
    if case.config.rewards[0] is reward and evaluates_problems(case):
        yield f"{key}: eval calls an answer right by its first reward, and a judge only rates it; put another first"


def _own_rules(case: Case) -> Iterator[str]:
    """Yields what the recipe itself asks for."""
    for recipe in planned_recipes(case.config) if case.recipe is None else [case.recipe]:
        for rule in recipe.rules:
            yield from rule(case.config)


def _spikes(case: Case) -> Iterator[str]:
    g, every_steps = case.config.guard, case.config.checkpoint.every_steps
    if g.spike == "off":
        return
    if g.spike_window < 2:
        yield f"guard.spike_window={g.spike_window}: must be at least 2, a deviation needs them; raise it"
    if g.spike == "rewind" and not 0 < every_steps <= g.spike_window:
        yield (
            f"checkpoint.every_steps={every_steps}: must be in 1 .. guard.spike_window={g.spike_window} with "
            "guard.spike=rewind, so that there is a checkpoint to go back to; change one of them"
        )


def _wandb(case: Case) -> Iterator[str]:
    if case.config.log.wandb == "online" and not has_wandb_key():
        yield "log.wandb=online: needs a key; run `wandb login`, set WANDB_API_KEY, or use log.wandb=offline"


def _existing(case: Case, key: str, path: str | None, needed: str | None) -> Iterator[str]:
    """Yields a line if a path that is read is not there; None is refused with the reason `needed`."""
    if path is None and needed:
        yield f"{key}: must be set, {needed}; give a path"
    if path is not None and not case.planned and (fault := dangling(path)):
        yield f"{key}={path}: {fault}"
    elif path is not None and case.missing(path):
        yield f"{key}={path}: does not exist; give an existing path or make it first"


def _rows(case: Case, key: str, path: str | None, needed: str) -> Iterator[str]:
    """A file of rows must be there; whether the hub has a data set of a name is seen when it is read."""
    name = None if path is None else split_path(path)[0]
    if name is None or not is_hub_name(name):
        yield from _existing(case, key, name, needed)


def _init_from(case: Case) -> Iterator[str]:
    path = case.config.model.init_from
    needed = case.command in ("eval", *JUDGES) or (case.recipe is not None and case.recipe.starts_trained)
    if case.own_run:
        return  # the document of a run that has trained means that run's weights
    if path is None and needed:
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
        if source.type in ("text", "jsonl", "rows"):
            needed, key = f"a source of type {source.type} reads files", f"data.sources.{source.name}.path"
            yield from (_rows if source.type == "rows" else _existing)(case, key, source.path, needed)
        elif source.type == "cleaned":
            yield from _existing(case, f"data.sources.{source.name}.path", source.path, None)


def _asked_file(case: Case) -> Iterator[str]:
    yield from _rows(case, "data.train", case.config.data.train, f"{case.command} reads its prompts there")


def _train_file(case: Case) -> Iterator[str]:
    data = case.config.data
    yield from _asked_file(case)
    if case.config.train.eval_every_steps and not samples(case):
        yield from _rows(case, "data.held_out", data.held_out, "train.eval_every_steps measures the loss there")
    if data.replay_seqs:
        yield from _existing(case, "data.path", data.path, "data.replay_seqs takes text from the shards there")


def _evaluation_files(case: Case) -> Iterator[str]:
    data, evaluation = case.config.data, case.config.eval
    if evaluation.problems:
        yield from _rows(case, "data.held_out", data.held_out, "eval.problems are read there")
    if evaluation.text:
        own = os.path.join(case.config.directory, "data")
        place = data.path or (own if os.path.isdir(own) else None)
        why = "eval.text measures on the held-out shards there (not with eval.text=false)"
        yield from _existing(case, "data.path", place, why)
    yield from _harness(case, evaluation.lm_eval)


def _harness(case: Case, section: LmEvalConfig) -> Iterator[str]:
    if section.tasks and not case.planned and find_spec("lm_eval") is None:
        yield (
            f"eval.lm_eval.tasks={section.tasks[0]}: the lm-evaluation-harness is not installed; "
            "pip install 'llmtrain[eval]' -c constraints.txt, or remove the key"
        )
    if section.include_path is not None:
        yield from _existing(case, "eval.lm_eval.include_path", section.include_path, None)


def _beside_training(case: Case) -> Iterator[str]:
    data, e = case.config.data, case.config.eval
    key = f"eval.every_steps={e.every_steps}"
    if not e.every_steps or case.recipe is None:
        return
    if case.recipe.head == "scalar":
        yield f"{key}: {case.command} trains a model that writes no tokens; use train.eval_every_steps, which it can"
        return
    if not evaluates_problems(case) and not (e.text and (case.recipe.packs_text or data.path)):
        problems = "" if case.config.rollout.agent else " data.held_out for problems (eval.problems),"
        yield f"{key}: has nothing to measure; set data.path for the held-out text there (eval.text),{problems} or 0"
    if e.text and not case.recipe.packs_text:
        yield from _existing(case, "data.path", data.path, None)
    if evaluates_problems(case):
        yield from _rows(case, "data.held_out", data.held_out, "eval.problems are read there")


KEY_RULES: Rules = (  # of these what looks at no files
    (plans, _positions),
    (plans, _ramps),
    (trains, _objectives),
    (trains, _epochs),
    (trains, _learning_rate),
    (plans, _own_rules),
    (trains, _spikes),
    (either(samples, evaluates_problems, command(*JUDGES)), _completions),
)
FILE_RULES: Rules = (
    (lambda case: True, _run_places),
    (command("data", "tokenizer", "export", "report", "scaling", "ladder", "index", *JUDGES), _one_process),
    *KEY_RULES,
    (either(reads_rewards, evaluates_problems, command("eval", "judge")), _rewards),
    (here(trains), _wandb),
    (either(trains, command("eval", "export", *JUDGES)), _init_from),
    (either(tunes, command("eval", "export", *JUDGES)), _tokenizer),
    (either(pretrains, command("data", "tokenizer")), _sources),
    (either(trains, command("data", "tokenizer")), _new_tokenizer),
    (either(trains, command("data", "tokenizer")), _base_tokenizer),
    (tunes, _train_file),
    (command(*JUDGES), _asked_file),
    (command("eval"), _evaluation_files),
    (trains, _beside_training),
)
