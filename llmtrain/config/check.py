"""Rules that span several keys, checked before any process group exists. Each says value, rule and remedy."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from llmtrain.config.load import ConfigError, stage_config
from llmtrain.config.ramp import phases, ramp_faults, trained_model, with_phase
from llmtrain.config.schema import Config, ModelConfig, ParallelConfig, RunConfig, StageConfig
from llmtrain.config.shapes import resolve_model
from llmtrain.config.stages import plan_stages

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # outermost first
TRAIN = ("pretrain", "sft", "grpo")
TUNE = ("sft", "grpo")


Earlier = Mapping[str, ModelConfig | None]
"""Directories of the stages before this one, with their models where these are known."""


@dataclass(frozen=True)
class Case:
    """What a rule may look at. `model` is resolved, or None when its weights do not exist yet."""

    config: Config
    model: ModelConfig | None
    world_size: int
    command: str
    run_dir: str | None  # of the whole run: what lies below it may be made by a stage before
    earlier: Earlier

    @property
    def trainers(self) -> int:
        """Ranks that train."""
        rollout = self.config.rollout
        separate = self.command == "grpo" and rollout.placement == "separate"
        return self.world_size - (rollout.workers if separate else 0)

    @property
    def makes_data(self) -> bool:
        """Does the stage itself make the tokenizer and what lies in its data directory?"""
        return self.command in TRAIN and bool(self.config.data.sources or self.config.data.tasks)

    def missing(self, path: str) -> bool:
        """Is there nothing at `path`, and neither this stage nor one before could make it?"""
        data_dir = self.config.data.path or os.path.join(self.config.directory, "data")
        made = self.run_dir is not None and _inside(path, self.run_dir)
        made = made or (self.makes_data and _inside(path, data_dir))
        return not made and not glob.glob(path, recursive=True)

    def missing_model(self, path: str) -> bool:
        """The same for weights, which only lie in the directory of a stage."""
        return not os.path.exists(path) and not any(_inside(path, stage) for stage in self.earlier)


Rule = Callable[[Case], Iterator[str]]


def check(config: Config, world_size: int, command: str) -> None:
    """Refuse a configuration that cannot work. A run document is checked stage by stage, each with its own ranks.

    Raises ConfigError with one line for each violation: `key=value: rule; remedy`.
    """
    if isinstance(config, RunConfig):
        found = _run_violations(config, world_size, command)
    else:
        found = violations(config, world_size, command)
    if found:
        raise ConfigError("\n".join(found))


def violations(
    config: Config,
    world_size: int,
    command: str,
    run_dir: str | None = None,
    earlier: Earlier | None = None,
) -> list[str]:
    """All broken rules of one stage; `run_dir` and `earlier` only where it is a stage of a run."""
    found: list[str] = []
    model = None
    absent = config.model.init_from is not None and not os.path.exists(config.model.init_from)
    try:
        model = resolve_model(config.model, earlier)
    except ValueError as error:
        if not absent:  # a missing directory is the business of `_init_from`
            found += str(error).splitlines()
    case = Case(config, model, world_size, command, run_dir, earlier or {})
    found += _broken(case)
    for phase in phases(config.train)[1:] if command in ("pretrain", "plan") else ():
        lines = _broken(replace(case, config=with_phase(config, phase)))
        found += [f"train ramp from token {phase.first_token}: {line}" for line in lines if line not in found]
    return found


def _broken(case: Case) -> Iterator[str]:
    for commands, rule in RULES:
        if case.command in commands:
            yield from rule(case)


def _run_violations(run: RunConfig, world_size: int, command: str) -> list[str]:
    if command not in ("run", "plan", "report"):
        return [f"stages: {command} takes one stage; start this document with `llmtrain run`, or remove `stages:`"]
    if command == "run" and world_size > 1:
        return [f"WORLD_SIZE={world_size}: run starts the processes of its stages itself; call it without torchrun"]
    found: list[str] = []
    for stage, config, earlier in planned_stages(run):
        lines = violations(config, stage.ranks, stage.command, run.directory, earlier)
        found += [f"stages.{stage.name}: {line}" for line in lines]
    return found


def planned_stages(run: RunConfig) -> Iterator[tuple[StageConfig, Config, Earlier]]:
    """Each stage with its configuration and the stages before it."""
    earlier: dict[str, ModelConfig | None] = {}
    for stage in run.stages:
        config = stage_config(run, stage.name)
        yield stage, config, dict(earlier)
        try:
            model = resolve_model(config.model, earlier)
            earlier[config.directory] = trained_model(model, config.train, config.train.steps)
        except ValueError:
            earlier[config.directory] = None  # this stage's own check says why


def mesh_sizes(parallel: ParallelConfig, num_trainers: int) -> dict[str, int]:
    """Ranks on each axis, `dp_shard: -1` taking what is left. Raises ValueError if the product is not the ranks."""
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    fixed = math.prod(n for axis, n in sizes.items() if axis != "dp_shard")
    if sizes["dp_shard"] == -1:
        sizes["dp_shard"] = max(1, num_trainers // fixed)
    if math.prod(sizes.values()) != num_trainers:
        product = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
        raise ValueError(
            f"parallel: {product} = {math.prod(sizes.values())} ranks: must be the {num_trainers} trainer ranks; "
            "change the axes or the number of processes"
        )
    return sizes


def _inside(path: str, directory: str) -> bool:
    path, directory = os.path.abspath(path), os.path.abspath(directory)
    return os.path.commonpath([path, directory]) == directory


def _offered(case: Case) -> Iterator[str]:
    """What the schema foresees and this version does not do."""
    c, p = case.config, case.config.parallel
    instead = {
        f"engine.precision={c.engine.precision}": (c.engine.precision == "fp8", "use bf16"),
        f"parallel.ep={p.ep}": (p.ep > 1, "set parallel.ep=1, the models are dense"),
    }
    for key, (used, remedy) in instead.items():
        if used:
            yield f"{key}: not in this version; {remedy}"


def _ranks(case: Case) -> Iterator[str]:
    shard = case.config.parallel.dp_shard
    if shard == 0 or shard < -1:
        yield f"parallel.dp_shard={shard}: must be positive, or -1 for all ranks left; set one of these"
        return
    try:
        mesh_sizes(case.config.parallel, case.trainers)
    except ValueError as error:
        if case.trainers > 0:
            yield str(error)


def _one_process(case: Case) -> Iterator[str]:
    if case.world_size > 1:
        yield f"ranks={case.world_size}: {case.command} runs in one process; start it without torchrun (ranks: 1)"


def _placement(case: Case) -> Iterator[str]:
    r = case.config.rollout
    if r.placement == "separate" and not r.workers:
        yield "rollout.workers=0: must be at least 1 with rollout.placement=separate; raise it or use colocated"
    if r.placement == "separate" and r.workers >= case.world_size:
        yield (
            f"rollout.workers={r.workers}: must be fewer than the {case.world_size} ranks, so that some train; "
            "start more processes or lower it"
        )


def _heads(case: Case) -> Iterator[str]:
    m = case.model
    if m is None:
        return
    if case.config.model.head_dim is None and m.head_dim * m.num_heads != m.hidden_size and not m.init_from:
        yield f"model.hidden_size={m.hidden_size}: must be a multiple of num_heads={m.num_heads}; or set model.head_dim"
    if m.head_dim % 2:
        yield f"model.head_dim={m.head_dim}: must be even, RoPE rotates pairs; change hidden_size or num_heads"
    if m.num_heads % m.num_kv_heads:
        yield f"model.num_heads={m.num_heads}: must be a multiple of num_kv_heads={m.num_kv_heads}; change one of them"


def _vocabulary(case: Case) -> Iterator[str]:
    c = case.config
    path = c.tokenizer.path or os.path.join(c.directory, "tokenizer")
    if case.model and not os.path.exists(path) and case.model.vocab_size < c.tokenizer.vocab_size:
        yield (
            f"model.vocab_size={case.model.vocab_size}: must be at least "
            f"tokenizer.vocab_size={c.tokenizer.vocab_size}; raise it or lower the tokenizer's"
        )


def _tensor_parallel(case: Case) -> Iterator[str]:
    tp = case.config.parallel.tp
    hints = {
        "num_heads": "lower tp or change the heads",
        "num_kv_heads": "lower tp, K/V heads are not replicated over tp ranks",
        "ffn_size": "lower tp or change it",
        "vocab_size": "lower tp or pad the vocabulary",
    }
    for name, remedy in hints.items() if case.model else ():
        value = getattr(case.model, name)
        if value % tp:
            yield f"model.{name}={value}: must be a multiple of parallel.tp={tp}; {remedy}"
    seq_len = case.config.train.seq_len
    if case.config.parallel.sequence_parallel and seq_len % tp:
        yield (
            f"train.seq_len={seq_len}: must be a multiple of parallel.tp={tp} with sequence_parallel; "
            "change it or set parallel.sequence_parallel=false"
        )


def _context_parallel(case: Case) -> Iterator[str]:
    p, seq_len = case.config.parallel, case.config.train.seq_len
    if p.cp == 1:
        return
    multiple = p.cp * math.lcm(2, p.tp if p.sequence_parallel else 1)
    if seq_len % multiple:
        yield (
            f"train.seq_len={seq_len}: must be a multiple of {multiple}, for two chunks of a row on each of the "
            f"parallel.cp={p.cp} ranks, divided again by tp with sequence_parallel; change it or lower cp"
        )
    if p.context == "alltoall" and case.model and case.model.num_heads // p.tp % p.cp:
        yield (
            f"parallel.context=alltoall: model.num_heads={case.model.num_heads} / parallel.tp={p.tp} must be a "
            f"multiple of parallel.cp={p.cp}, which splits the heads; use ring or allgather, or lower cp"
        )


def _pipeline(case: Case) -> Iterator[str]:
    if case.model:
        try:
            plan_stages(case.model, case.config.parallel)
        except ValueError as error:
            yield str(error)


def _schedule(case: Case) -> Iterator[str]:
    p, e = case.config.parallel, case.config.engine
    if p.schedule != "1f1b" and p.pp == 1:
        yield f"parallel.schedule={p.schedule}: needs parallel.pp of at least 2; raise it or use 1f1b"
    exact = {"1f1b": 1, "zbv": 2}.get(p.schedule)
    if p.virtual_stages != (exact or max(2, p.virtual_stages)):
        rule = f"must be {exact or 'at least 2'} with parallel.schedule={p.schedule}"
        yield f"parallel.virtual_stages={p.virtual_stages}: {rule}; set it or choose another schedule"
    if p.schedule not in ("interleaved_zero_bubble", "zbv"):
        return
    reasons = {
        "engine.compile=true": (e.compile, "a compiled block cannot split its backward into two"),
        f"engine.remat={e.remat}": (e.remat != "none", "a block would be computed again for each of its weights"),
        "engine.zero_stage=3": (
            e.backend == "deepspeed" and e.zero_stage == 3,
            "it frees weights before their gradients are computed",
        ),
    }
    for key, (used, reason) in reasons.items():
        if used:
            yield f"{key}: not with parallel.schedule={p.schedule}, {reason}; change it or use interleaved_1f1b"


def _rounds(case: Case) -> Iterator[str]:
    c, p = case.config, case.config.parallel
    try:
        sizes = mesh_sizes(p, case.trainers)
    except ValueError:
        return  # reported by `_ranks`
    block = c.train.micro_batch_seqs * sizes["dp_replicate"] * sizes["dp_shard"]
    if not p.schedule.startswith("interleaved") or block < 1:
        return
    if case.command == "grpo":
        yield (
            f"parallel.schedule={p.schedule}: needs equal rounds of microbatches, whose number in grpo follows the "
            "lengths of the samples; use 1f1b or zbv"
        )
        return
    replayed = c.data.replay_seqs if case.command == "sft" else 0
    microbatches = (c.train.global_batch_seqs + replayed) // block
    rounds = max(1, microbatches // sizes["pp"])
    if microbatches % rounds:
        yield (
            f"parallel.schedule={p.schedule}: takes the microbatches of a step in equal rounds of at least pp="
            f"{sizes['pp']}, and {microbatches} is not a multiple of {rounds} rounds; make it a multiple of pp by "
            "train.global_batch_seqs or micro_batch_seqs"
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


def _batch(case: Case) -> Iterator[str]:
    t = case.config.train
    try:
        sizes = mesh_sizes(case.config.parallel, case.trainers)
    except ValueError:
        return  # reported by `_ranks`
    dp = sizes["dp_replicate"] * sizes["dp_shard"]
    if dp > 0 and t.global_batch_seqs % (t.micro_batch_seqs * dp):
        yield (
            f"train.global_batch_seqs={t.global_batch_seqs}: must be a multiple of micro_batch_seqs x data-parallel "
            f"ranks = {t.micro_batch_seqs} x {dp} = {t.micro_batch_seqs * dp}; change one of the three"
        )
    elif t.global_batch_seqs // (t.micro_batch_seqs * dp) < sizes["pp"]:
        yield (
            f"parallel.pp={sizes['pp']}: must be at most the microbatches of a step, global_batch_seqs / "
            f"(micro_batch_seqs x data-parallel ranks) = {t.global_batch_seqs // (t.micro_batch_seqs * dp)}; "
            "lower micro_batch_seqs or raise global_batch_seqs"
        )


def _replay(case: Case) -> Iterator[str]:
    seqs, micro = case.config.data.replay_seqs, case.config.train.micro_batch_seqs
    try:
        sizes = mesh_sizes(case.config.parallel, case.trainers)
    except ValueError:
        return  # reported by `_ranks`
    block = micro * sizes["dp_replicate"] * sizes["dp_shard"]
    if block > 0 and seqs % block:
        yield (
            f"data.replay_seqs={seqs}: must be a multiple of micro_batch_seqs x data-parallel ranks = {block}, so that "
            "every rank has as many microbatches; change one of them"
        )


def _zero(case: Case) -> Iterator[str]:
    e, p = case.config.engine, case.config.parallel
    if e.backend != "deepspeed":
        return
    if e.zero_stage > 0 and p.dp_replicate > 1:
        yield (
            f"parallel.dp_replicate={p.dp_replicate}: must be 1 with engine.zero_stage={e.zero_stage}, ZeRO shards "
            "over all data-parallel ranks; use parallel.dp_shard"
        )
    if e.zero_stage == 0 and e.precision in ("bf16", "fp16"):
        yield (
            f"engine.precision={e.precision}: drifts at engine.zero_stage=0, without an fp32 master; "
            "set zero_stage=1 or fp32"
        )
    if e.zero_stage == 3 and e.compile:
        yield (
            "engine.compile=true: must be false with engine.zero_stage=3, whose hooks make every layer compile anew; "
            "use zero_stage 1 or 2, or compile=false"
        )


def _offload(case: Case) -> Iterator[str]:
    e = case.config.engine
    least = {"none": 0, "optimizer": 2, "params": 3, "nvme": 3}[e.offload]
    if e.backend == "deepspeed" and e.zero_stage < least:
        needed = "2 or 3" if least == 2 else "3"
        yield (
            f"engine.offload={e.offload}: needs engine.zero_stage {needed}, not {e.zero_stage}; raise it or use none"
        )
    if e.backend == "fsdp" and e.offload in ("optimizer", "nvme"):
        yield (
            f"engine.offload={e.offload}: not with engine.backend=fsdp, whose shards are what the optimizer updates; "
            "use params, which keeps both on the CPU, or backend=deepspeed"
        )
    elif e.offload == "nvme" and e.offload_path is None:
        yield "engine.offload=nvme: needs engine.offload_path, a directory on a fast disk; set it or use optimizer"
    if e.loss_scale is not None and e.precision != "fp16":
        yield f"engine.loss_scale={e.loss_scale:g}: is for engine.precision=fp16, not {e.precision}; leave it out"


def _muon(case: Case) -> Iterator[str]:
    e, muon = case.config.engine, case.config.optim.name == "muon"
    if muon and e.backend == "deepspeed" and e.zero_stage > 0:
        yield (
            f"optim.name=muon: needs whole matrices, engine.zero_stage={e.zero_stage} gives the optimizer flat pieces; "
            "use engine.backend=fsdp or engine.zero_stage=0"
        )
    if muon and e.backend == "deepspeed" and e.zero_stage == 0 and e.precision == "fp16":
        yield (
            "engine.precision=fp16: must be fp32 with optim.name=muon at engine.zero_stage=0, where the optimizer gets "
            "copies of the weights that have no names; use fp32 or engine.backend=fsdp"
        )
    if muon and e.offload != "none":
        yield (
            f"engine.offload={e.offload}: must be none with optim.name=muon, whose matrix products would run on the "
            "CPU; use none or optim.name=adamw"
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


def _replica_check(case: Case) -> Iterator[str]:
    e, steps = case.config.engine, case.config.guard.replica_check_steps
    try:
        sizes = mesh_sizes(case.config.parallel, case.trainers)
    except ValueError:
        return  # reported by `_ranks`
    whole = e.backend == "deepspeed" and e.zero_stage < 3
    copies = sizes["dp_replicate"] * (sizes["dp_shard"] * sizes["cp"] if whole else 1)
    if steps and copies == 1:
        yield (
            f"guard.replica_check_steps={steps}: needs data-parallel copies of the weights, on {case.trainers} rank(s) "
            "with these parallel and engine sections there are none; set it to 0"
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


RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    ((*TRAIN, "plan"), _offered),
    (TRAIN, _ranks),
    (("data", "tokenizer", "eval", "export", "report"), _one_process),
    (("grpo",), _placement),
    ((*TRAIN, "plan", "eval", "export"), _heads),
    (("pretrain",), _vocabulary),
    ((*TRAIN, "plan"), _tensor_parallel),
    ((*TRAIN, "plan"), _context_parallel),
    ((*TRAIN, "plan"), _pipeline),
    ((*TRAIN, "plan"), _schedule),
    (TRAIN, _rounds),
    ((*TRAIN, "plan"), _positions),
    ((*TRAIN, "plan"), _ramps),
    (TRAIN, _objectives),
    (("pretrain", "sft"), _batch),
    (TUNE, _replay),
    ((*TRAIN, "plan"), _zero),
    ((*TRAIN, "plan"), _offload),
    ((*TRAIN, "plan"), _muon),
    (TRAIN, _learning_rate),
    (("grpo",), _groups),
    (TRAIN, _spikes),
    (TRAIN, _replica_check),
    (TRAIN, _wandb),
    ((*TRAIN, "eval", "export"), _init_from),
    ((*TUNE, "eval", "export"), _tokenizer),
    (("data", "tokenizer", "pretrain"), _sources),
    (TUNE, _train_file),
    (("eval",), _evaluation_files),
)
