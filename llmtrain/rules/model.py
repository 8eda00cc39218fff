"""Checks the model's shape and what its parts go with. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator

from llmtrain.arch.families import family_of
from llmtrain.arch.parameters import layer_type
from llmtrain.arch.resolve import fields_from_directory
from llmtrain.config.recipes import JUDGES, names_of, planned_recipes
from llmtrain.config.schema import ModelConfig
from llmtrain.rules.case import Case, Rules, command, either, plans, samples, trains, tunes


def _heads(case: Case) -> Iterator[str]:
    m = case.model
    if m is None:
        return
    head_dim = m.mla.rope_head_dim if m.mla else m.head_dim
    assert m.head_dim is not None and head_dim is not None
    derived = case.config.model.head_dim is None and m.attention == "gqa"
    if derived and m.head_dim * m.num_heads != m.hidden_size and not (m.init_from or m.preset):
        yield f"model.hidden_size={m.hidden_size}: must be a multiple of num_heads={m.num_heads}; or set model.head_dim"
    if head_dim % 2 and m.positions == "rope":
        yield f"model.head_dim={head_dim}: must be even, RoPE rotates pairs; change hidden_size or num_heads"
    if m.num_heads % m.num_kv_heads:
        yield f"model.num_heads={m.num_heads}: must be a multiple of num_kv_heads={m.num_kv_heads}; change one of them"


def _latent(case: Case) -> Iterator[str]:
    m = case.model
    if m is None or (m.attention == "gqa" and m.mla is None):
        return
    if m.mla is None or m.attention == "gqa":
        yield f"model.attention={m.attention}: model.mla goes with attention: mla, and only with it; set both"
        return
    if m.num_kv_heads != m.num_heads:
        yield (
            f"model.num_kv_heads={m.num_kv_heads}: must be num_heads={m.num_heads} with attention: mla, which has a "
            "key for each; remove it or set it so"
        )
    unfit = {"qk_norm": m.qk_norm, "qkv_bias": m.qkv_bias, "o_bias": m.o_bias, "layer_types": m.layer_types}
    unfit |= {"attention_softcap": m.attention_softcap, "attention_scale": m.attention_scale}
    for name, value in unfit.items():
        if value:
            yield f"model.{name}={value}: not with attention: mla, no published model has both; remove it"
    if m.positions == "learned":
        yield "model.positions=learned: not with attention: mla, which rotates a part of its heads; use rope"


def _fields(case: Case) -> Iterator[str]:
    m = case.model
    if m is None:
        return
    if m.norm_bias and m.norm != "layer":
        yield "model.norm_bias=true: an RMSNorm has no bias; set model.norm=layer or norm_bias=false"
    if m.norm_offset and m.norm != "rms":
        yield "model.norm_offset=true: goes with model.norm=rms; set that or norm_offset=false"
    if "sliding" in (m.layer_types or ()) and m.sliding_window is None:
        yield "model.layer_types: has sliding layers, which need model.sliding_window; set it, in tokens"
    if m.rope_theta_sliding is not None and not m.layer_types:
        yield f"model.rope_theta_sliding={m.rope_theta_sliding:g}: no layer is sliding; remove it or set layer_types"


def _experts(case: Case) -> Iterator[str]:
    m, ep = case.model, case.config.parallel.ep
    e = None if m is None else m.moe
    if m is None or e is None:
        if ep > 1:
            yield f"parallel.ep={ep}: the model has no experts; set parallel.ep=1 or choose a model with model.moe"
        return
    if e.top_k > e.num_experts:
        yield f"model.moe.top_k={e.top_k}: must be at most num_experts={e.num_experts}; lower it"
    if e.num_experts % e.num_groups or e.top_groups > e.num_groups:
        yield (
            f"model.moe.num_groups={e.num_groups}: must divide num_experts={e.num_experts}, and top_groups="
            f"{e.top_groups} be at most num_groups; change them"
        )
    elif e.num_experts >= e.top_k > e.num_experts // e.num_groups * e.top_groups:
        yield f"model.moe.top_k={e.top_k}: the top_groups={e.top_groups} groups hold fewer experts; raise top_groups"
    elif e.gate == "sigmoid" and e.num_groups > 1 and e.num_experts == e.num_groups:
        yield (
            f"model.moe.num_groups={e.num_groups}: with gate: sigmoid the two best experts of a group count, and a "
            "group has one; use fewer groups"
        )
    if outside := [layer for layer in e.dense_layers if not 0 <= layer < m.num_layers]:
        yield f"model.moe.dense_layers: {outside[0]} is no layer of 0 .. {m.num_layers - 1}; remove it"
    if "bias" in e.balance and not e.selection_bias:
        yield (
            f"model.moe.balance={e.balance}: moves model.moe.selection_bias, which is off; set selection_bias=true, or "
            "aux"
        )
    if not m.gated or m.ffn_bias:
        what = f"model.gated={m.gated}, ffn_bias={m.ffn_bias}"
        yield f"{what}: with model.moe they are true and false, no published model has others; remove them"
    pieces = ep * case.config.parallel.tp
    if e.num_experts % pieces:
        yield (
            f"model.moe.num_experts={e.num_experts}: must be a multiple of parallel.ep x tp = {pieces}, whole experts "
            "lie on a rank; change one of them"
        )
    if m.block == "parallel":
        yield "model.block=parallel: not with model.moe, no published model has both; use sequential"


def _further_tokens(case: Case) -> Iterator[str]:
    """Refuses what multi-token prediction does not go with."""
    m, p = case.model, case.config.parallel
    if m is None or not m.mtp_layers:
        return
    refused, without = f"model.mtp_layers={m.mtp_layers}: not with ", "; set model.mtp_layers=0, or "
    if tunes(case):
        trained_by = names_of(lambda recipe: recipe.packs_text)
        yield f"{refused}{case.command}, only {trained_by} trains them; set model.mtp_layers=0, which leaves them out"
    if p.pp > 1:
        reason = "its modules need embedding and head on one pipeline stage"
        yield f"{refused}parallel.pp={p.pp}, {reason}{without}parallel.pp=1"
    if p.cp > 1:
        yield f"{refused}parallel.cp={p.cp}, the next tokens may lie on another rank{without}parallel.cp=1"
    if m.positions == "learned":
        yield f"{refused}model.positions=learned, which are added to embeddings{without}model.positions=rope"
    if m.lora is not None:
        yield f"{refused}model.lora, their weights would not be trained{without}remove model.lora"
    if case.command == "export" and "mtp.*.proj" not in family_of(m.family).modules:
        yield f"{refused}model.family={m.family} on disk, which has no names for them; set model.mtp_layers=0"


def _scalar_head(case: Case) -> Iterator[str]:
    """Refuses what a scalar head is not shown with, and what needs a language model."""
    m, tp = case.model, case.config.parallel.tp
    wanted = case.recipe.head if case.recipe is not None else None
    trained = next(iter(planned_recipes(case.config)), None) if case.command == "plan" else case.recipe
    if trained is not None and trained.head == "scalar" and m is not None and m.head != "scalar":
        yield f"model.head={m.head}: {trained.name} trains a model with one number a position; set model.head=scalar"
    if m is None or m.head != "scalar":
        return
    if case.command in ("eval", *JUDGES) or wanted == "lm":
        yield (
            f"model.head=scalar: {case.command} needs log-probs of tokens, this head gives one number a position; set "
            "model.head=lm, or model.init_from to a language model"
        )
    unfit = {
        f"model.mtp_layers={m.mtp_layers}": (m.mtp_layers > 0, "its modules predict tokens; set mtp_layers=0"),
        "model.lora": (m.lora is not None, "adapters would leave a new head untrained; remove model.lora"),
        "model.mup": (m.mup is not None, "has no rule for it; export the model, and start from the exported one"),
    }
    for name, (found, remedy) in unfit.items():
        if found:
            yield f"{name}: not with model.head=scalar, {remedy}"
    if case.command == "export" and family_of(m.family).classifier is None:
        yield (
            f"model.head=scalar: not with model.family={m.family} on disk, of which transformers has no classifier; "
            "keep the run directory instead"
        )
    if m.hidden_size % tp:
        yield (
            f"model.hidden_size={m.hidden_size}: must be a multiple of parallel.tp={tp} with model.head=scalar, which "
            "is divided along it; lower tp"
        )


def _growth(case: Case) -> Iterator[str]:
    """Refuses a vocabulary larger than that of the weights it starts from, where the new rows would not be trained."""
    m = case.model
    if m is None or m.init_from is None or not os.path.isdir(m.init_from):
        return
    rows = fields_from_directory(m.init_from, case.earlier)["vocab_size"]
    measured = not trains(case) and not case.own_run  # the run of the document has trained its new rows
    if m.vocab_size > rows and (measured or samples(case) or m.lora is not None):
        which = "with model.lora" if m.lora is not None else f"in {case.command}"
        trained_by = names_of(lambda recipe: not recipe.samples)
        yield (
            f"model.vocab_size={m.vocab_size}: must be the {rows} of {m.init_from} {which}, new rows are trained by "
            f"{trained_by} with all weights; remove it (and vocab_multiple), or do that first"
        )


def sliding_layers(model: ModelConfig) -> bool:
    """Tells whether any layer sees only a window."""
    return any(layer_type(model, layer) == "sliding" for layer in range(model.num_layers))


def _ring(case: Case) -> Iterator[str]:
    m, p = case.model, case.config.parallel
    if m is None or p.cp == 1 or p.context != "ring":
        return
    reason = "the ring knows no {}; set parallel.context=allgather or alltoall"
    if sliding_layers(m):
        yield f"model.sliding_window={m.sliding_window}: not with parallel.context=ring, {reason.format('window')}"
    if m.attention_softcap is not None:
        cap = m.attention_softcap
        yield f"model.attention_softcap={cap:g}: not with parallel.context=ring, {reason.format('cap')}"


def _mup(case: Case) -> Iterator[str]:
    m = case.model
    if m is None or m.mup is None:
        return
    unfit = {
        "model.lora": (m.lora is not None, "export the model, and put adapters on the exported one"),
        "model.attention=mla": (m.attention == "mla", "the paper has no rule for latents; remove model.mup"),
        "model.mtp_layers": (m.mtp_layers > 0, "set mtp_layers=0"),
        "model.scale_embeddings=true": (m.scale_embeddings, "its factor grows with the width; set it to false"),
        "optim.name=muon": (
            trains(case) and case.config.optim.name == "muon",
            "whose update has a scale by shape of its own; use adamw",
        ),
    }
    for name, (found, remedy) in unfit.items():
        if found:
            yield f"model.mup.base_hidden={m.mup.base_hidden}: not with {name}, {remedy}"
    if m.mup.base_head_dim is not None and m.attention_scale is not None:
        yield f"model.mup.base_head_dim={m.mup.base_head_dim}: model.attention_scale is set too; remove one of the two"


MODEL_RULES: Rules = (
    (either(plans, command("eval", "export", *JUDGES)), _scalar_head),
    (either(plans, command("eval", "export", *JUDGES)), _heads),
    (either(plans, command("eval", "export", *JUDGES)), _latent),
    (either(plans, command("eval", "export", *JUDGES)), _fields),
    (either(plans, command("eval", "export", *JUDGES)), _experts),
    (either(trains, command("export")), _further_tokens),
    (either(plans, command("eval", "export", *JUDGES)), _mup),
    (either(trains, command("eval", "export", *JUDGES)), _growth),
    (plans, _ring),
)
