"""Says in lines what a stage needs that samples or scores and trains nothing: judge, constitutional, eval.

A whole model on each rank, its cache, and time for what it samples and scores, at full lengths: prompts and completions
fill rows of `train.seq_len` tokens. A forward without gradients is a third of a trained token's FLOPs. On several ranks
(eval) problems are dealt out, and text is scored by a model that is sharded as the section `parallel` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmtrain.arch.hardware import hardware_of, peak_flops
from llmtrain.arch.mesh import mesh_sizes
from llmtrain.arch.resolve import parameter_count
from llmtrain.config.plan import HardwareConfig
from llmtrain.config.recipes import JUDGES
from llmtrain.config.recipes.base import sample_tokens
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.scaling.activations import block_activations, logits_bytes
from llmtrain.scaling.parts import value_bytes
from llmtrain.scaling.sampler import PREFILL_TOKENS, Asked, Sampler, Turn
from llmtrain.scaling.speed import (
    APART,
    RANKS,
    RECOMPUTE,
    RECOMPUTE_ALL,
    ROWS,
    cost,
    estimated,
    fit_line,
    hardware_line,
)
from llmtrain.scaling.steptime import ATTENTION, REACHED
from llmtrain.scaling.turnlines import turn_lines
from llmtrain.scaling.turns import frozen_bytes, heaviest, scoring_turn
from llmtrain.scaling.work import work_of

SAMPLING = (*JUDGES, "eval")  # commands
TEXT_ROWS = 16  # of a forward over held-out text in one process, as `commands.evaluate` has it


def sampling_lines(command: str, config: Config, model: ModelConfig, ranks: int) -> list[str]:
    """Returns the lines of a stage. `model` is resolved. Raises ValueError where the ranks do not fit the mesh."""
    hardware = None if config.plan.hardware is None else hardware_of(config.plan.hardware)
    samplers = [Sampler(config, model, asked, hardware) for asked in asked_by(command, config, model, ranks)]
    rows, (completions, tokens) = scored_by(command, config), _total([each.asked for each in samplers])
    turns = memory_turns(command, config, model, samplers, ranks)
    lines = [
        f"ranks        {ranks}, which train nothing",
        f"parameters   {parameter_count(model):,}",
        f"work         at most {completions:,} completions of {tokens:,} tokens a rank; {rows:,} rows are scored",
        *turn_lines(turns),
        *(f"not counted  {key}" for key in uncounted(command, config)),
    ]
    if hardware is None:
        return lines
    seconds = {"sampling": sum(each.seconds(hardware) for each in samplers)}
    seconds["scoring"] = scoring_seconds(config, model, rows, hardware) / ranks
    each, whole = ", ".join(f"{name} {value:.3g}" for name, value in seconds.items()), sum(seconds.values())
    turn = heaviest(turns)[0]
    fits = fit_line(config, hardware, turns[turn], useless(command, turn, ranks))
    lines += [hardware_line(ranks, hardware), fits]
    if not whole:  # of what it does nothing is counted
        return lines
    return [
        *lines,
        f"time         {whole:.3g} s at full lengths: {each} {estimated(config)}",
        f"run          {cost(config, hardware, ranks, whole)}, at full lengths",
    ]


def asked_by(command: str, config: Config, model: ModelConfig, ranks: int) -> Iterator[Asked]:
    """Yields what each rank samples, one after the other."""
    r, new = config.rollout, config.rollout.max_new_tokens
    row = min(config.train.seq_len, model.max_positions)
    if command == "eval" and config.eval.problems:
        problems = -(-config.eval.problems // ranks)
        yield Asked(problems, config.eval.samples, sample_tokens(config), row)
        yield Asked(problems, 1, sample_tokens(config), row)  # greedily
    if command == "judge":
        j = config.judge
        yield Asked(j.prompts, r.group_size, new, row)
        if j.by == "greedy":
            yield Asked(j.prompts, 1, new, row)
        if j.by == "rubric":
            yield Asked(j.prompts * r.group_size, j.votes, j.rubric_tokens, row)
    if command == "constitutional":
        c = config.constitutional
        if c.revisions:
            yield Asked(c.prompts, 1, new, row, times=1 + c.revisions)  # the answer, and each revision
            yield Asked(c.prompts, 1, c.critique_tokens, row, times=c.revisions)
        if c.pairs_per_prompt:
            yield Asked(c.prompts, r.group_size, new, row)
        if c.label == "thought" and (count := _comparisons(config)):
            yield Asked(2 * count, 1, c.thought_tokens, row)  # in both orders


def scored_by(command: str, config: Config) -> int:
    """Returns the rows that forwards go over without sampling, those of all ranks."""
    if command == "eval":
        return config.eval.text_seqs if config.eval.text else 0
    if command == "judge":
        j, r = config.judge, config.rollout
        return j.prompts * r.group_size if j.by == "logprob" and r.temperature != 1 else 0
    return 4 * _comparisons(config)  # two answers in two orders


def _comparisons(config: Config) -> int:
    c = config.constitutional
    return c.prompts * c.pairs_per_prompt + (c.agreement_pairs if c.agreement is not None else 0)


def uncounted(command: str, config: Config) -> list[str]:
    """Returns the keys that ask for more than is planned: what they sample depends on rows, or on answers."""
    if command != "eval":
        return ["rewards that are models"] if any(reward.model for reward in config.rewards) else []
    e = config.eval
    asked = {"eval.tasks": e.tasks, "eval.test_time": e.test_time, "eval.lm_eval.tasks": e.lm_eval.tasks}
    return [f"{key}, whose rows or answers say how much it is" for key, value in asked.items() if value]


def useless(command: str, turn: str, ranks: int) -> list[str]:
    """Returns the remedies of training that do not help: no backward follows, one process scores TEXT_ROWS rows at
    once, and only text that is scored is of a sharded model."""
    found = [APART, RECOMPUTE, RECOMPUTE_ALL]
    found += [ROWS] if ranks == 1 else []
    return found + ([RANKS] if turn == "sampling" or command != "eval" else [])


def memory_turns(
    command: str, config: Config, model: ModelConfig, samplers: Sequence[Sampler], ranks: int
) -> dict[str, Turn]:
    """Returns what a rank holds while it samples and while it scores; who judges keeps its cache in both."""
    value = value_bytes(config.engine)
    held = max((each.memory() for each in samplers), key=lambda turn: sum(turn.values()), default={})
    served = {"model": value * parameter_count(model)} if samplers and samplers[0].served else {}  # of likelihoods
    turns = {"sampling": served | held} if held else {}
    if not scored_by(command, config):
        return turns or {"scoring": {"model": value * parameter_count(model)}}
    if ranks > 1:
        parallel = config.parallel.model_copy(update=mesh_sizes(config.parallel, ranks))
        mesh = {axis: getattr(parallel, axis) for axis in ("cp", "tp")}
        scoring = {"model": frozen_bytes(model, parallel, value)} | scoring_turn(config, [model], model, mesh)
        return turns | {"scoring": scoring}
    tokens = TEXT_ROWS * config.train.seq_len if command == "eval" else max(PREFILL_TOKENS, config.train.seq_len)
    forward = {
        "activations": int(value * tokens * block_activations(model, 1, False)),
        "logits": logits_bytes(config, model, {"tp": 1, "cp": 1}) // 2,
    }
    cached = {part: held[part] for part in ("packed weights", "KV cache") if command != "eval" and part in held}
    return turns | {"scoring": {"model": value * parameter_count(model)} | cached | forward}


def scoring_seconds(config: Config, model: ModelConfig, rows: int, hardware: HardwareConfig) -> float:
    """Returns the seconds of one rank for forwards over so many full rows."""
    rate = peak_flops(hardware, config.engine.precision) * (hardware.reached_share or REACHED)
    work = work_of(model, config.train.seq_len, config.engine)
    return rows * config.train.seq_len * (work.blocks + work.head + work.attention * REACHED / ATTENTION) / rate


def _total(asked: list[Asked]) -> tuple[int, int]:
    """Returns the completions of a rank, and the most tokens that they have."""
    counts = [(each.times * each.prompts * each.samples, each.new_tokens) for each in asked]
    return sum(count for count, _ in counts), sum(count * tokens for count, tokens in counts)
