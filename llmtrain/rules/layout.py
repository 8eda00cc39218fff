"""Checks the mesh, the pipeline and the engine. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llmtrain.arch.mesh import mesh_sizes
from llmtrain.arch.pipeline import plan_stages
from llmtrain.config.machine import torch_version
from llmtrain.rules.case import Case, Rules, either, plans, samples, trains, tunes

ZERO_BUBBLE_TORCH = (2, 13)


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


def _expert_ranks(case: Case) -> Iterator[str]:
    p, e = case.config.parallel, case.config.engine
    if p.ep == 1 or case.model is None or case.model.moe is None:
        return  # a rule of the model's
    if (sizes := case.sizes) is None:
        return
    shard = sizes["dp_shard"] * sizes["cp"]
    if shard % p.ep:
        yield f"parallel.ep={p.ep}: must divide dp_shard x cp = {shard}, whose ranks share the experts; lower ep"
    if e.backend == "fsdp" and e.remat == "selective":
        yield (
            f"engine.remat=selective: not with engine.backend=fsdp and parallel.ep={p.ep}, which gathers experts "
            "within what is computed again; use full, or backend=deepspeed"
        )
    if e.backend == "deepspeed" and e.zero_stage == 3 and p.pp > 1:
        yield (
            f"parallel.ep={p.ep}: not with engine.zero_stage=3 and parallel.pp={p.pp}, whose pipeline stages "
            "gather experts at different times and would wait for each other; use engine.backend=fsdp, or "
            "zero_stage 1 or 2"
        )


def _whole_models(case: Case) -> Iterator[str]:
    """An evaluation on several ranks samples from whole models, one a rank."""
    e = case.config.eval
    for axis in ("tp", "pp", "cp"):
        size = getattr(case.config.parallel, axis)
        if size > 1 and (e.problems or e.tasks):
            yield (
                f"parallel.{axis}={size}: must be 1 where eval samples, from a whole model on each rank; set it to 1, "
                "or measure the text alone (eval.problems=0, no eval.tasks)"
            )
    if e.lm_eval.tasks:
        yield f"eval.lm_eval: runs in one process, not on {case.world_size} ranks; start one, or remove its tasks"


def _placement(case: Case) -> Iterator[str]:
    r = case.config.rollout
    if r.placement == "separate" and not r.workers:
        yield "rollout.workers=0: must be at least 1 with rollout.placement=separate; raise it or use colocated"
    if r.placement == "separate" and r.workers >= case.world_size:
        yield (
            f"rollout.workers={r.workers}: must be fewer than the {case.world_size} ranks, so that some train; "
            "start more processes or lower it"
        )


def _tensor_parallel(case: Case) -> Iterator[str]:
    tp = case.config.parallel.tp
    hints = {
        "num_heads": "lower tp or change the heads",
        "ffn_size": "lower tp or change it",
        "vocab_size": "lower tp or pad the vocabulary",
    }
    for name, remedy in hints.items() if case.model else ():
        value = getattr(case.model, name)
        if value % tp:
            yield f"model.{name}={value}: must be a multiple of parallel.tp={tp}; {remedy}"
    kv_heads = case.model.num_kv_heads if case.model else tp
    if kv_heads % tp and tp % kv_heads:
        yield (
            f"model.num_kv_heads={kv_heads}: must be a multiple of parallel.tp={tp}, or divide it (then each rank "
            "projects to all of them); change tp"
        )
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
    if (found := torch_version()) < ZERO_BUBBLE_TORCH:
        needed = ".".join(map(str, ZERO_BUBBLE_TORCH))
        rule = f"needs torch {needed} or later, which can split any backward, this is {found[0]}.{found[1]}"
        yield f"parallel.schedule={p.schedule}: {rule}; install it or use interleaved_1f1b"
    reasons = {
        "engine.reshard=true": (
            e.backend == "fsdp" and e.reshard,
            "a split backward does not find weights that FSDP2 sharded again",
        ),
        "engine.compile=true": (e.compile, "a compiled block cannot split its backward into two"),
        "engine.precision=fp8": (e.precision == "fp8", "its products give both gradients at once"),
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
    if (sizes := case.sizes) is None:
        return
    block = c.train.micro_batch_seqs * sizes["dp_replicate"] * sizes["dp_shard"]
    if not p.schedule.startswith("interleaved") or block < 1:
        return
    if case.recipe is not None and not case.recipe.fixed_batch:
        yield (
            f"parallel.schedule={p.schedule}: needs equal rounds of microbatches, whose number in {case.command} "
            "follows the lengths of the samples; use 1f1b or zbv"
        )
        return
    if c.train.micro_batch_tokens is not None:
        yield (
            f"parallel.schedule={p.schedule}: needs equal rounds of microbatches, whose number follows the lengths of "
            "rows with train.micro_batch_tokens; use train.micro_batch_seqs, or 1f1b or zbv"
        )
        return
    replayed = c.data.replay_seqs if tunes(case) else 0
    microbatches = (c.train.global_batch_seqs + replayed) // block
    rounds = max(1, microbatches // sizes["pp"])
    if microbatches % rounds:
        yield (
            f"parallel.schedule={p.schedule}: takes the microbatches of a step in equal rounds of at least pp="
            f"{sizes['pp']}, and {microbatches} is not a multiple of {rounds} rounds; make it a multiple of pp by "
            "train.global_batch_seqs or micro_batch_seqs"
        )


def _tokens(case: Case) -> Iterator[str]:
    t, p = case.config.train, case.config.parallel
    if t.micro_batch_tokens is None:
        return
    key = f"train.micro_batch_tokens={t.micro_batch_tokens}"
    if case.recipe is not None and case.recipe.packs_text:
        yield f"{key}: is for rows of unequal length, those of {case.command} are full; use train.micro_batch_seqs"
    elif t.micro_batch_tokens < t.seq_len:
        yield f"{key}: must be at least train.seq_len={t.seq_len}, the longest row; raise it or lower seq_len"
    elif case.config.data.replay_seqs and p.pp > 1:
        yield (
            f"{key}: not with data.replay_seqs and parallel.pp={p.pp}, whose microbatches all have the shape of the "
            "text rows; use train.micro_batch_seqs, or pp=1"
        )


def _batch(case: Case) -> Iterator[str]:
    t = case.config.train
    if (sizes := case.sizes) is None or t.micro_batch_tokens is not None:
        return
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
    if (sizes := case.sizes) is None:
        return
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
    if e.zero_stage == 0 and e.precision != "fp32":
        yield (
            f"engine.precision={e.precision}: drifts at engine.zero_stage=0, without an fp32 master; "
            "set zero_stage=1 or fp32"
        )
    if e.zero_stage == 3 and e.compile:
        yield (
            "engine.compile=true: must be false with engine.zero_stage=3, whose hooks make every layer compile anew; "
            "use zero_stage 1 or 2, or compile=false"
        )
    if e.zero_stage == 3 and e.remat == "selective":
        yield (
            "engine.remat=selective: not with engine.zero_stage=3, which gathers weights within the layers, not twice "
            "in the same way; use full, zero_stage 1 or 2, or engine.backend=fsdp"
        )


def _float8(case: Case) -> Iterator[str]:
    c, m = case.config, case.model
    if c.engine.precision != "fp8" or m is None:
        return
    tp = c.parallel.tp
    sizes = {
        "model.hidden_size": m.hidden_size,
        f"model.ffn_size / parallel.tp={tp}": m.ffn_size // tp,
        f"model.num_heads x head_dim / parallel.tp={tp}": m.num_heads * m.head_dim // tp,
        f"model.num_kv_heads x head_dim / parallel.tp={tp}": m.num_kv_heads * m.head_dim // tp,
        "train.micro_batch_seqs x seq_len / parallel.cp": c.train.micro_batch_seqs * c.train.seq_len // c.parallel.cp,
    }
    for name, size in sizes.items():
        if size % 16:
            yield f"{name} = {size}: must be a multiple of 16 with engine.precision=fp8; change it or use bf16"


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
    if muon and e.backend == "deepspeed" and e.zero_stage == 3:
        yield (
            "optim.name=muon: needs whole matrices, engine.zero_stage=3 gives the optimizer pieces of each; use "
            "engine.backend=fsdp or engine.zero_stage 0 to 2"
        )
    if muon and e.backend == "deepspeed" and e.precision == "fp16":
        yield (
            "engine.precision=fp16: not with optim.name=muon and engine.backend=deepspeed, which have been compared "
            "with one process in fp32 and bf16 only; use these or engine.backend=fsdp"
        )
    if muon and e.offload != "none":
        yield (
            f"engine.offload={e.offload}: must be none with optim.name=muon, whose matrix products would run on the "
            "CPU; use none or optim.name=adamw"
        )


def _replica_check(case: Case) -> Iterator[str]:
    e, steps = case.config.engine, case.config.guard.replica_check_steps
    if (sizes := case.sizes) is None:
        return
    whole = e.backend == "deepspeed" and e.zero_stage < 3
    copies = sizes["dp_replicate"] * (sizes["dp_shard"] * sizes["cp"] if whole else 1)
    if steps and copies == 1:
        yield (
            f"guard.replica_check_steps={steps}: needs data-parallel copies of the weights, on {case.trainers} rank(s) "
            "with these parallel and engine sections there are none; set it to 0"
        )


def fixed_batch(case: Case) -> bool:
    """Holds for recipes whose step has `train.global_batch_seqs` rows."""
    return case.recipe is not None and case.recipe.fixed_batch


def evaluates_on_ranks(case: Case) -> bool:
    """Holds for an evaluation on several ranks, which reads the section parallel; in one process nothing does."""
    return case.command == "eval" and case.world_size > 1


LAYOUT_RULES: Rules = (
    (either(trains, evaluates_on_ranks), _ranks),
    (either(plans, evaluates_on_ranks), _expert_ranks),
    (evaluates_on_ranks, _whole_models),
    (samples, _placement),
    (either(plans, evaluates_on_ranks), _tensor_parallel),
    (either(plans, evaluates_on_ranks), _context_parallel),
    (either(plans, evaluates_on_ranks), _pipeline),
    (plans, _schedule),
    (trains, _rounds),
    (plans, _tokens),
    (fixed_batch, _batch),
    (tunes, _replay),
    (plans, _zero),
    (plans, _float8),
    (plans, _offload),
    (plans, _muon),
    (trains, _replica_check),
)
