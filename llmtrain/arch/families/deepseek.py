"""Defines the families DeepSeek V2 and V3 (arXiv 2405.04434, 2412.19437).

They have multi-head latent attention, many small experts beside a shared one that every token takes, and dense first
layers; V3 also has multi-token prediction.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from llmtrain.arch.families.base import (
    LLAMA_MODULES,
    Disk,
    Family,
    HfConfig,
    common_fields,
    common_hf,
    demand,
    number,
    plain_disk,
)
from llmtrain.config.schema import MlaConfig, ModelConfig, MoeConfig, RopeScaling

LAYER = "model.layers.*"
ATTENTION = {
    "q": "q_proj",
    "q_a": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b": "q_b_proj",
    "kv_a": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "kv_b": "kv_b_proj",
    "o": "o_proj",
}
EXPERTS = {part: f"{LAYER}.mlp.experts.#.{part}_proj.weight" for part in ("gate", "up", "down")}
MODULES = {
    **{name: theirs for name, theirs in LLAMA_MODULES.items() if ".attention." not in name},
    **{f"layers.*.attention.{ours}": f"{LAYER}.self_attn.{theirs}" for ours, theirs in ATTENTION.items()},
    "layers.*.feedforward.router": f"{LAYER}.mlp.gate",
    "layers.*.feedforward.router.bias": f"{LAYER}.mlp.gate.e_score_correction_bias",
    **{f"layers.*.feedforward.experts.{ours}": theirs for ours, theirs in EXPERTS.items()},
    **{f"layers.*.feedforward.shared.{part}": f"{LAYER}.mlp.shared_experts.{part}_proj" for part in EXPERTS},
}
MTP_MODULES = {  # on disk they are numbered after the layers
    "mtp.*.hidden_norm": f"{LAYER}.hnorm",
    "mtp.*.embed_norm": f"{LAYER}.enorm",
    "mtp.*.proj": f"{LAYER}.eh_proj",
    "mtp.*.norm": f"{LAYER}.shared_head.norm",
}
SHARED = {"embed.weight": "embed_tokens.weight", "head.weight": "shared_head.head.weight"}
COPIES = tuple(rf"model\.layers\.\d+\.{re.escape(theirs)}" for theirs in SHARED.values())
COMPUTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "moe_layer_freq": (1, None),
}


# Reading config.json


def v2_from_hf(config: HfConfig) -> dict[str, Any]:
    """Returns the fields of ModelConfig. Raises ValueError for options that the decoder does not implement."""
    methods = ("greedy", "group_limited_greedy")
    demand(config, {"norm_topk_prob": (False, None), "scoring_func": ("softmax", None), "topk_method": methods})
    limited = config.get("topk_method") == "group_limited_greedy"
    groups = {key: number(config, theirs) for key, theirs in GROUPS.items()} if limited else {}
    experts = {"num_experts": 64, "top_k": None, "expert_ffn_size": 1407, "shared": 2, "scale": 1.0, "first_dense": 0}
    return _fields(config, 2048, MoeConfig(**_experts(config, **experts), normalize=False, **groups))


def v3_from_hf(config: HfConfig) -> dict[str, Any]:
    """Returns the fields of ModelConfig. Raises ValueError for options that the decoder does not implement.

    Multi-token prediction modules are not among them: `model.mtp_layers` asks for those.
    """
    demand(config, {"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)})
    defaults = {"num_groups": 8, "top_groups": 4}
    groups = {key: number(config, theirs, default=defaults[key]) for key, theirs in GROUPS.items()}
    experts = {"num_experts": 256, "top_k": 8, "expert_ffn_size": 2048, "shared": 1, "scale": 2.5, "first_dense": 3}
    normalize = config.get("norm_topk_prob", True)
    moe = MoeConfig(
        **_experts(config, **experts), **groups, gate="sigmoid", selection_bias=True, normalize=bool(normalize)
    )
    fields = _fields(config, 4096, moe)
    demand(config, {"head_dim": (fields["mla"].rope_head_dim,)})  # transformers rotates by it where it is given
    return {**fields, "rope_interleaved": config.get("rope_interleave", True)}


GROUPS = {"num_groups": "n_group", "top_groups": "topk_group"}


def _experts(
    config: HfConfig,
    num_experts: int,
    top_k: int | None,
    expert_ffn_size: int,
    shared: int,
    scale: float,
    first_dense: int,
) -> dict[str, Any]:
    """Returns fields of MoeConfig; the other arguments are the defaults of the family's config class for missing
    keys."""
    width = number(config, "moe_intermediate_size", default=expert_ffn_size)
    dense = min(config.get("first_k_dense_replace", first_dense) or 0, number(config, "num_hidden_layers"))
    return {
        "num_experts": number(config, "n_routed_experts", default=num_experts),
        "top_k": number(config, "num_experts_per_tok", default=top_k),
        "expert_ffn_size": width,
        "shared_ffn_size": width * number(config, "n_shared_experts", default=shared),
        "dense_layers": list(range(dense)),
        "scale": config.get("routed_scaling_factor", scale),
    }


def _fields(config: HfConfig, max_positions: int, moe: MoeConfig) -> dict[str, Any]:
    demand(config, {**COMPUTED, "num_key_value_heads": (number(config, "num_attention_heads"), None)})
    mla = MlaConfig(
        q_rank=config.get("q_lora_rank", 1536),
        kv_rank=number(config, "kv_lora_rank", default=512),
        nope_head_dim=number(config, "qk_nope_head_dim", default=128),
        rope_head_dim=number(config, "qk_rope_head_dim", default=64),
        v_head_dim=number(config, "v_head_dim", default=128),
    )
    demand(config, {"qk_head_dim": (mla.nope_head_dim + mla.rope_head_dim,)})
    return {**common_fields(config, max_positions), "mla": mla, "moe": moe}


# Writing config.json


def v2_to_hf(model: ModelConfig) -> HfConfig:
    """Returns the content of config.json."""
    moe = model.moe or MoeConfig()
    method = "greedy" if moe.num_groups == 1 else "group_limited_greedy"
    return {**_hf(model, moe), "architectures": ["DeepseekV2ForCausalLM"], "mlp_bias": False, "topk_method": method}


def v3_to_hf(model: ModelConfig) -> HfConfig:
    """Returns the content of config.json."""
    own = {"topk_method": "noaux_tc", "num_nextn_predict_layers": model.mtp_layers}
    own |= {"rope_interleave": model.rope_interleaved, "architectures": ["DeepseekV3ForCausalLM"]}
    return {**_hf(model, model.moe or MoeConfig()), **own}


def _hf(model: ModelConfig, e: MoeConfig) -> HfConfig:
    a = model.mla or MlaConfig()
    return {
        **common_hf(model),
        "first_k_dense_replace": len(e.dense_layers),
        "head_dim": a.rope_head_dim,  # the rotated part only, as transformers defines it
        "kv_lora_rank": a.kv_rank,
        "moe_intermediate_size": e.expert_ffn_size,
        "moe_layer_freq": 1,
        "n_group": e.num_groups,
        "n_routed_experts": e.num_experts,
        "n_shared_experts": e.shared_ffn_size // e.expert_ffn_size,
        "norm_topk_prob": e.normalize,
        "num_experts_per_tok": e.top_k,
        "q_lora_rank": a.q_rank,
        "qk_nope_head_dim": a.nope_head_dim,
        "qk_rope_head_dim": a.rope_head_dim,
        "routed_scaling_factor": e.scale,
        "scoring_func": e.gate,
        "topk_group": e.top_groups,
        "v_head_dim": a.v_head_dim,
    }


# Tensors


def v3_disk(family: Family, name: str, model: ModelConfig) -> Disk:
    """Returns the place of a parameter. Multi-token prediction modules are stored as layers after the last one, each
    with a copy of the embedding and the head."""
    further = range(model.num_layers, model.num_layers + model.mtp_layers)
    if name in SHARED:
        return replace(
            plain_disk(family, name, model), copies=tuple(f"model.layers.{i}.{SHARED[name]}" for i in further)
        )
    found = re.fullmatch(r"mtp\.(\d+)\.(block\.)?(.*)", name)
    if found is None:
        return plain_disk(family, name, model)
    depth, block, rest = found.groups()
    return plain_disk(family, f"{'layers' if block else 'mtp'}.{model.num_layers + int(depth)}.{rest}", model)


def v3_left_out(name: str, model: ModelConfig) -> bool:
    """Returns whether a tensor belongs to a multi-token prediction module beyond the first `model.mtp_layers`."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found.group(1)) >= model.num_layers + model.mtp_layers


def init(name: str, shape: tuple[int, ...], model: ModelConfig) -> float:
    """Returns the standard deviation, the same for all weights at any depth (V2, section 3.1.2; V3, section 4.2)."""
    return 0.006


# Presets


def _yarn(mscale: float) -> RopeScaling:
    """Returns the YaRN scaling from 4,096 positions to 40 times as many."""
    return RopeScaling(type="yarn", factor=40, original_max_positions=4096, mscale=mscale, mscale_all_dim=mscale)


def _preset(layers: int, hidden: int, ffn: int, heads: int, vocab: int, mscale: float) -> dict[str, Any]:
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_size": ffn, "num_heads": heads, "num_kv_heads": heads}
    rest = {"vocab_size": vocab, "max_positions": 163840, "rope_scaling": _yarn(mscale), "tie_embeddings": False}
    return {**shape, **rest}


V2_LITE_EXPERTS = MoeConfig(
    num_experts=64,
    top_k=6,
    expert_ffn_size=1408,
    shared_ffn_size=2816,
    dense_layers=[0],
    normalize=False,
    balance="aux",
    aux_coef=0.001,
)
V2_EXPERTS = V2_LITE_EXPERTS.model_copy(
    update={
        "num_experts": 160,
        "expert_ffn_size": 1536,
        "shared_ffn_size": 3072,
        "scale": 16.0,
        "num_groups": 8,
        "top_groups": 3,
        "aux_coef": 0.003,
    }
)
V3_EXPERTS = MoeConfig(
    num_experts=256,
    top_k=8,
    expert_ffn_size=2048,
    shared_ffn_size=2048,
    dense_layers=[0, 1, 2],
    gate="sigmoid",
    scale=2.5,
    num_groups=8,
    top_groups=4,
    selection_bias=True,
    balance="bias+aux",
    aux_coef=0.0001,
)
V2_PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": {**_preset(27, 2048, 10944, 16, 102400, 0.707), "mla": MlaConfig(), "moe": V2_LITE_EXPERTS},
    "deepseek-v2": {**_preset(60, 5120, 12288, 128, 102400, 0.707), "moe": V2_EXPERTS},
}
V3_PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {**_preset(61, 7168, 18432, 128, 129280, 1.0), "moe": V3_EXPERTS},
}

FIELDS: dict[str, Any] = {
    "attention": "mla",
    "mla": MlaConfig(q_rank=1536),
    "norm_eps": 1e-6,
    "rope_interleaved": True,
    "tie_embeddings": False,
}
V2 = Family(
    name="deepseek-v2",
    fields={**FIELDS, "moe": MoeConfig(shared_ffn_size=128, normalize=False)},
    presets=V2_PRESETS,
    model_type="deepseek_v2",
    aliases={"num_experts": "n_routed_experts"},
    classifier="DeepseekV2ForSequenceClassification",
    from_hf=v2_from_hf,
    to_hf=v2_to_hf,
    modules=MODULES,
    init=init,
)
V3 = Family(
    name="deepseek-v3",
    fields={**FIELDS, "moe": MoeConfig(shared_ffn_size=128, gate="sigmoid", selection_bias=True, balance="bias")},
    presets=V3_PRESETS,
    model_type="deepseek_v3",
    aliases={"num_local_experts": "n_routed_experts"},
    classifier="DeepseekV3ForSequenceClassification",
    from_hf=v3_from_hf,
    to_hf=v3_to_hf,
    modules=MODULES | MTP_MODULES,
    disk=v3_disk,
    ignored=COPIES,
    left_out=v3_left_out,
    init=init,
)
