"""Computes what attention holds beyond the activations of a plain block: masks, and copies of context parallelism.

With q, kv the values a token of queries (as many as of the output) and of keys and values on a tensor-parallel rank,
T / cp tokens of a row on each context-parallel rank, a layer has, in values a token:

                 kept for the backward         more, while it is computed
    allgather    (cp - 1) kv                   2 cp kv: keys and values on their way, or their gradients
    alltoall     q + (copies - 1) kv           2 q + 2 copies kv: gradients before and after the exchange
    ring         nothing                       kv, and in fp32 3 kv + q: a shard that arrives, and the gradients of
                                               own, leaving and arriving shards and of the queries

`copies`: how often alltoall repeats K/V heads. Not counted are the scores of one tile, which ring computes on a GPU:
1,024 x 1,024 for each head, in fp32, about four times; and scores that sdpa stores with a softcap.
"""

from __future__ import annotations

import math

from llmtrain.arch.attention import head_widths, masks_whole_rows
from llmtrain.config.ramp import longest_row, microbatch_tokens
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.scaling.parts import value_bytes


def attention_bytes(config: Config, model: ModelConfig, mesh: dict[str, int], layers: float) -> int:
    """Returns the bytes beyond `plan.activation_bytes`; `layers` keep theirs for the backward, unless recomputed."""
    tokens = microbatch_tokens(config.train) // mesh["cp"]
    kept, passing = copies_in_values(config, model, mesh)
    held = layers if config.engine.remat == "none" else 1
    return int(tokens * (held * kept * value_bytes(config.engine) + passing)) + mask_bytes(config, model, mesh, held)


def copies_in_values(config: Config, model: ModelConfig, mesh: dict[str, int]) -> tuple[float, float]:
    """Returns (values a token that each layer keeps, bytes a token of the one that is computed)."""
    cp, tp, value = mesh["cp"], mesh["tp"], value_bytes(config.engine)
    if cp == 1:
        return 0.0, 0.0
    heads = max(1, model.num_kv_heads // tp)
    keys, values = head_widths(model)
    q, kv = model.num_heads / tp * values, heads * (keys + values)
    if config.parallel.context == "allgather":
        return (cp - 1) * kv, 2 * cp * kv * value
    if config.parallel.context == "ring":
        return 0.0, kv * value + (3 * kv + model.num_heads / tp * keys) * 4
    copied = math.lcm(heads, cp) // heads * kv
    return q + copied - kv, 2 * (q + copied) * value


def mask_bytes(config: Config, model: ModelConfig, mesh: dict[str, int], layers: float) -> int:
    """Returns the bytes of masks of whole rows: bool for each kind of layer, and as numbers for each layer."""
    cp, T, context = mesh["cp"], longest_row(config.train), config.parallel.context
    windowed = model.sliding_window is not None
    halves = cp > 1 and context == "allgather"  # whose queries lie at the end of their keys
    masked = config.data.mask_documents or windowed or halves
    if not masked or (cp > 1 and context == "ring") or not masks_whole_rows(model, config.engine.attention, T):
        return 0
    kinds = len(set(model.layer_types or ["full"]))
    scores = microbatch_tokens(config.train) * T // (cp if halves else 1)
    return int(scores * (kinds + layers * value_bytes(config.engine)))
