"""Computes what a microbatch leaves behind for its backward pass, and the logits of a chunk."""

from __future__ import annotations

import math

from llmtrain.arch.parameters import has_experts
from llmtrain.arch.pipeline import StagePlan
from llmtrain.arch.resolve import chunk_tokens
from llmtrain.config.ramp import microbatch_tokens
from llmtrain.config.schema import Config, ModelConfig, ParallelConfig


def kept_on(rank: int, plan: StagePlan, parallel: ParallelConfig, accumulation: float | None) -> float:
    """Returns the layers of a pipeline rank times the microbatches that it holds of each. Under 1F1B it holds a
    microbatch for each rank from itself on; interleaved, what the forwards before its first backward leave (arXiv
    2104.04473, section 2.2), first stages first."""
    sizes = [len(plan.layers[stage]) for stage in plan.stages_of(rank)]
    most = math.inf if accumulation is None else math.ceil(accumulation)
    if plan.schedule == "1f1b":
        return sizes[0] * min(plan.pp - rank, most)
    if plan.schedule != "interleaved_1f1b":
        return sum(sizes) * in_flight(parallel, accumulation)
    forwards = min(2 * (plan.pp - rank) - 1 + (len(sizes) - 1) * plan.pp, most * len(sizes))
    turns, left = divmod(int(forwards), plan.pp)
    return plan.pp * sum(sizes[turn % len(sizes)] for turn in range(turns)) + left * sizes[turns % len(sizes)]


def in_flight(parallel: ParallelConfig, accumulation: float | None) -> float:
    """Returns how many microbatches the schedule lets the fullest pipeline rank hold activations of at a time."""
    most = parallel.pp
    if parallel.schedule == "interleaved_1f1b":  # P (v + 1) - 1 chunks of 1 / v, arXiv 2104.04473, 2.2.2
        most += (parallel.pp - 1) / parallel.virtual_stages
    return most if accumulation is None else min(most, math.ceil(accumulation))


def kept_activations(model: ModelConfig, tp: int, sequence_parallel: bool, remat: str) -> float:
    """Returns the values a token that one block keeps with recomputation.

    Full: its input. Selective: the inputs of attention and feed-forward layer and, sharded, q, k, v, attention's output
    and the results of the products in front of the activation.
    """
    hidden = model.hidden_size / (tp if sequence_parallel else 1)
    if remat == "full":
        return hidden
    return 2 * hidden + (attention_values(model) + (2 if model.gated else 1) * inner_width(model)) / tp


def block_activations(model: ModelConfig, tp: int, sequence_parallel: bool) -> float:
    """Returns the values a token that one block keeps without recomputation.

    They are its input and the norm's output, twice (whole on each rank without sequence parallelism), and, sharded: q,
    k, v, attention's output, gate, up, silu(gate) and their product. SwiGLU and grouped K/V replace the paper's GELU
    and full heads; there is no dropout, and attention scores are recomputed, not kept.
    """
    outside = 4 * model.hidden_size / (tp if sequence_parallel else 1)
    return outside + (attention_values(model) + (4 if model.gated else 2) * inner_width(model) + copies(model)) / tp


def gathered_inputs(model: ModelConfig, tp: int, sequence_parallel: bool) -> float:
    """Returns the values a token of the normed inputs of attention and feed-forward layer that sequence parallelism
    gathers and a block keeps whole for the gradients of the weights, less their shards, which `block_activations`
    counts. (arXiv 2205.05198 gathers them again in the backward.)"""
    return 2 * model.hidden_size * (1 - 1 / tp) if sequence_parallel else 0.0


def backward_values(model: ModelConfig, tp: int) -> float:
    """Returns the values a token of the gradients that meet all activations in the backward of a block: of the
    feed-forward layer's product, of both of its factors, and of its output."""
    return (3 if model.gated else 2) * inner_width(model) / tp + model.hidden_size


def attention_values(model: ModelConfig) -> int:
    """Returns the number of values of q, k, v and the output in all heads, a token; with latent attention also the
    latents."""
    assert model.head_dim is not None
    if model.mla is None:
        return 2 * model.head_dim * (model.num_heads + model.num_kv_heads)
    latents = (model.mla.q_rank or 0) + model.mla.kv_rank
    return 2 * model.num_heads * (model.head_dim + model.mla.v_head_dim) + latents


def inner_width(model: ModelConfig) -> float:
    """Returns the inner width of the feed-forward layers that a token passes, on average over the blocks."""
    e = model.moe
    if e is None:
        return model.ffn_size
    sparse = sum(has_experts(model, layer) for layer in range(model.num_layers)) / model.num_layers
    return sparse * (e.top_k * e.expert_ffn_size + e.shared_ffn_size) + (1 - sparse) * model.ffn_size


def copies(model: ModelConfig) -> float:
    """Returns the number of values in the copies of a token's hidden state, one for each of its experts."""
    if model.moe is None:
        return 0.0
    sparse = sum(has_experts(model, layer) for layer in range(model.num_layers)) / model.num_layers
    return sparse * model.moe.top_k * model.hidden_size


def logits_bytes(config: Config, model: ModelConfig, mesh: dict[str, int]) -> int:
    """Returns the bytes of one chunk of logits and its gradient on the last pipeline stage, on a GPU: fp32 if not
    compiled."""
    if model.head == "scalar":
        return 0
    rows, tokens = model.vocab_size // mesh["tp"], microbatch_tokens(config.train)
    value = 2 if config.engine.compile and config.engine.precision != "fp32" else 4
    return 2 * value * min(tokens // mesh["cp"], chunk_tokens(config.engine, rows, gpu=True)) * rows
