"""Computes what a rank holds while it samples from a whole model, and how long it takes: natively, or with a server.

The native generator has the model, a KV cache for the sequences that it decodes together, one forward over prompts
and, on a CPU, the larger weights once more (`model.kernels.packed`). A vLLM server has the model, and
`rollout.vllm.cache_gib` for as many sequences as fit; what its forwards take is not known. A token reads weights and
cache once, or computes, where that takes longer; before, prompts are computed, each once for its group. Lengths are the
longest there can be.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from llmtrain.arch.adapters import without_adapters
from llmtrain.arch.attention import cache_row, round_up
from llmtrain.arch.hardware import peak_flops
from llmtrain.arch.parameters import layer_shapes
from llmtrain.arch.resolve import active_parameter_count, parameter_count
from llmtrain.config.plan import HardwareConfig
from llmtrain.config.recipes import Recipe
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.scaling.activations import block_activations
from llmtrain.scaling.parts import value_bytes
from llmtrain.scaling.steptime import REACHED

PREFILL_TOKENS = 8192  # prompt tokens in one forward of the generator, as `rollout.native` has it
LEAST_WEIGHTS = 2**18  # of a product that is packed, as `model.kernels.packed` has it
JOINED = re.compile(r"\.(?:([qkv])|gate|up)$")  # modules that are packed as one product: q, k, v; gate and up
GIB = 2**30
SERVER_BYTES = 3_000_000_000  # of a vLLM server on a CPU beside model and cache, as docs/rollouts/vllm.md says

Turn = dict[str, int]
"""Maps the parts of a rank's memory to bytes."""


@dataclass(frozen=True)
class Asked:
    """Says what one rank is asked to sample, `times` one after the other: `samples` of each prompt, with at most
    `new_tokens` in rows of `row_tokens`."""

    prompts: int
    samples: int
    new_tokens: int
    row_tokens: int
    times: int = 1


@dataclass(frozen=True)
class Sampler:
    """Holds who samples on a rank, and what. `model` is resolved; `hardware`: None where it is not known."""

    config: Config
    model: ModelConfig
    asked: Asked
    hardware: HardwareConfig | None

    @property
    def value(self) -> int:
        """Returns the bytes of a weight."""
        return value_bytes(self.config.engine)

    @property
    def whole(self) -> ModelConfig:
        """Returns the model that samples, whose adapters are merged."""
        return without_adapters(self.model)

    @property
    def served(self) -> bool:
        """Tells whether a vLLM server samples."""
        return self.config.rollout.generator == "vllm"

    @property
    def on_cpu(self) -> bool:
        return self.hardware is not None and self.hardware.device == "cpu"

    def slots(self) -> int:
        """Returns the sequences that are decoded together. Raises ValueError where a server's cache holds not one."""
        asked = self.asked
        most = min(self.config.rollout.max_batch_seqs, asked.prompts * asked.samples)
        if not self.served:
            return most
        cache_gib, row = self.config.rollout.vllm.cache_gib, self._cache_bytes(1)
        if cache_gib * GIB < row:
            raise ValueError(
                f"rollout.vllm.cache_gib={cache_gib:g}: must hold a row of {asked.row_tokens} tokens, "
                f"{row / GIB:.3g} GiB; raise it, or lower train.seq_len"
            )
        return min(most, int(cache_gib * GIB) // row)

    def memory(self) -> Turn:
        """Returns what is there while it samples, by part."""
        slots, whole = self.slots(), self.whole
        weights = {"generator": self.value * parameter_count(whole)}
        if self.served:
            server = {"server": SERVER_BYTES} if self.on_cpu else {}
            return {**weights, **server, "KV cache": int(self.config.rollout.vllm.cache_gib * GIB)}
        row = self.asked.row_tokens
        tokens = min(max(PREFILL_TOKENS, row), slots * row)  # a longer prompt has a forward of its own
        prompts = int(self.value * tokens * block_activations(whole, 1, False)) + 2 * 4 * slots * whole.vocab_size
        packed = {"packed weights": packed_bytes(whole, self.value)} if self.on_cpu else {}
        return {**weights, **packed, "KV cache": self._cache_bytes(slots), "prompts": prompts}

    def resting(self) -> Turn:
        """Returns what is left of that while the rank does something else: the native generator keeps its model, a
        server nothing on a GPU, and all on a CPU."""
        held = self.memory()
        if self.served:
            return held if self.on_cpu else {}
        return {"generator": held["generator"]}

    def seconds(self, hardware: HardwareConfig) -> float:
        """Returns the seconds until all is sampled."""
        rate = peak_flops(hardware, self.config.engine.precision) * (hardware.reached_share or REACHED)
        asked, slots, flops = self.asked, self.slots(), 2 * active_parameter_count(self.whole)

        def token(rows: int) -> float:
            cache = kv_cache_bytes(self.model, rows, asked.row_tokens, self.value)
            read = self.value * parameter_count(self.whole) + cache
            return max(read / (hardware.memory_gb_per_s * 1e9), rows * flops / rate)

        rounds, rest = divmod(asked.prompts * asked.samples, slots)
        tokens = rounds * token(slots) + (token(rest) if rest else 0.0)
        prompt_tokens = asked.prompts * max(0, asked.row_tokens - asked.new_tokens)
        return asked.times * (asked.new_tokens * tokens + prompt_tokens * flops / rate)

    def _cache_bytes(self, slots: int) -> int:
        return kv_cache_bytes(self.model, slots, round_up(self.asked.row_tokens), self.value)


def sampler_in_step(
    config: Config, model: ModelConfig, recipe: Recipe, ranks: int, hardware: HardwareConfig | None
) -> Sampler | None:
    """Returns what samples in a step on each of `ranks` that do, None where nothing is sampled, or taken from a record;
    prompts are dealt out with all their samples."""
    size, r = recipe.step_size(config), config.rollout
    if not recipe.samples or r.replay is not None:
        return None
    asked = Asked(-(-size.prompts // ranks), r.group_size, size.sample_tokens, config.train.seq_len, size.rounds)
    return Sampler(config, model, asked, hardware)


def kv_cache_bytes(model: ModelConfig, seqs: int, tokens: int, value: int) -> int:
    """Returns the bytes of the KV cache of `seqs` sequences of at most `tokens`. `model` is resolved."""
    rows = (cache_row(model, layer, tokens) for layer in range(model.num_layers))
    return seqs * value * sum(row.heads * (row.key_dim + row.value_dim) * row.tokens for row in rows)


def packed_bytes(model: ModelConfig, value: int) -> int:
    """Returns the bytes of the weights that the native generator keeps once more on a CPU: those of products of at
    least LEAST_WEIGHTS, the experts' apart. `model` is resolved, without adapters."""
    sizes: Counter[str] = Counter({"head": model.vocab_size * model.hidden_size})
    for layer in range(model.num_layers):
        for name, shape in layer_shapes(model, layer).items():
            module = name.removesuffix(".weight")
            if len(shape) == 2 and not module.endswith("router"):
                product = JOINED.sub(lambda found: ".qkv" if found[1] else ".gate_up", module)
                sizes[f"{layer}.{product}"] += math.prod(shape)
    return value * sum(size for size in sizes.values() if size >= LEAST_WEIGHTS)
