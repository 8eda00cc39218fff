"""Computes the most bytes that a rank holds at a time in a step: what lives all the while, and what meets.

Gradients come while activations go, so that not everything is there at once. The fullest of these moments counts:

    forward   of the last microbatch in flight: activations, and under ZeRO stage 3 weights that arrive
    head      backward of the head: activations, logits, the gradient of the head as it adds up over chunks
    block     backward of the last block: activations, the gradients of its feed-forward layer's inner values
    last      backward of the first block of the first microbatch: nearly all gradients, what other microbatches hold
    update    gradients, and DeepSpeed's flat copies of them

In all but the last two there are gradients of earlier microbatches, whole, where more are trained than are in flight.
The plan's parts are those of the fullest moment of the pipeline rank that holds most; tests/parity/peak_test.py holds
their sum to the peak of torch's allocator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from llmtrain.arch.parameters import head_rows, numel
from llmtrain.arch.pipeline import StagePlan, plan_stages
from llmtrain.config.ramp import microbatch_tokens
from llmtrain.config.schema import Config, ModelConfig, ParallelConfig
from llmtrain.scaling.activations import (
    backward_values,
    block_activations,
    gathered_inputs,
    kept_activations,
    kept_on,
    logits_bytes,
)
from llmtrain.scaling.attention import attention_bytes
from llmtrain.scaling.parts import optimizer_groups, rank_adapters, rank_shapes, stage_units, value_bytes
from llmtrain.scaling.states import States, state_bytes

PREFETCH = 50_000_000  # elements: DeepSpeed's stage3_prefetch_bucket_size, of which it gathers as many at once


@dataclass(frozen=True)
class Memory:
    """Holds bytes of a rank at one moment of a step."""

    moment: str
    weights: int
    gradients: int  # as the update reads them
    optimizer: int
    buffers: int  # gathered weights, whole gradients before they are reduced, copies
    activations: int
    attention: int  # masks, and what context parallelism adds to the activations
    logits: int  # and what the head's backward takes beside them

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "moment")


def rank_states(
    config: Config, model: ModelConfig, parallel: ParallelConfig, accumulation: float | None
) -> list[States]:
    """Returns the model states of each pipeline rank; None: of several microbatches."""
    microbatches = 2 if accumulation is None else accumulation
    ranks = range(parallel.pp)
    return [state_bytes(model, parallel, config.engine, config.optim.name, microbatches, rank) for rank in ranks]


def fullest_memory(
    config: Config,
    model: ModelConfig,
    parallel: ParallelConfig,
    accumulation: float | None,
    states: Sequence[States],
) -> Memory:
    """Returns the fullest moment of the pipeline rank that holds most; `states` are those of each."""
    found = (
        each
        for rank, held in enumerate(states)
        for each in Rank(config, model, parallel, accumulation, rank, held).moments()
    )
    return max(found, key=lambda memory: memory.total)


@dataclass(frozen=True)
class Rank:
    """Computes the moments of one pipeline rank. `model` is resolved and `parallel.dp_shard` is not -1."""

    config: Config
    model: ModelConfig
    parallel: ParallelConfig
    accumulation: float | None
    pp_rank: int
    states: States

    @property
    def value(self) -> int:
        """Returns the bytes of a weight or activation in the compute precision."""
        return value_bytes(self.config.engine)

    @property
    def tokens(self) -> int:
        """Returns the tokens of a microbatch on this rank."""
        return microbatch_tokens(self.config.train) // self.parallel.cp

    def moments(self) -> Iterator[Memory]:
        """Yields what is there at each moment."""
        plan, s, own = plan_stages(self.model, self.parallel), self.states, self.whole_weights()
        layers = kept_on(self.pp_rank, plan, self.parallel, self.accumulation)
        meets = self.meets_gradients(plan)
        reduced, whole = (s.gradients, s.unreduced) if meets else (0, 0)
        yield self._moment("forward", reduced, own.gathered + own.arriving + whole, self._held(layers, True), layers)
        if plan.rank_of(len(plan.layers) - 1) == self.pp_rank and self.model.head == "lm":
            kept = self._held(layers, False)
            yield self._moment("head", reduced, own.at_head + whole, kept, layers, self.head_bytes())
        first = whole if meets or self.model.lora else self.value * self.head_elements(plan)
        computed = self._held(layers, True) + self._backward()
        yield self._moment("block", reduced, own.gathered + first, computed, layers)
        others = layers - sum(len(plan.layers[stage]) for stage in plan.stages_of(self.pp_rank)) + 1
        left = max(0, s.gradients + s.unreduced - own.to_come)
        computed = self._held(max(1, others), True) + self._backward()
        yield self._moment("last", min(left, s.gradients), own.late + max(0, left - s.gradients), computed, 1)
        yield self._moment("update", s.gradients, own.copied, 0, 0)

    def meets_gradients(self, plan: StagePlan) -> bool:
        """Tells whether the forward of a microbatch follows the backward of another: there are more than the rank holds
        activations of."""
        if self.accumulation is None:
            return True
        count, stages = math.ceil(self.accumulation), len(plan.layers) // plan.pp
        if plan.schedule == "1f1b":
            return count > min(plan.pp - self.pp_rank, count)
        if plan.schedule == "interleaved_1f1b":
            return count * stages > 2 * (plan.pp - self.pp_rank) - 1 + (stages - 1) * plan.pp
        return count > 1

    def head_elements(self, plan: StagePlan) -> int:
        """Returns the elements of this rank's part of the head, 0 where it has none."""
        if plan.rank_of(len(plan.layers) - 1) != self.pp_rank:
            return 0
        return head_rows(self.model) // (self.parallel.tp if self.model.head == "lm" else 1) * self.model.hidden_size

    def head_bytes(self) -> int:
        """Returns what the backward of the head takes: a chunk of logits with its gradient (in fp32 in its place), the
        weight's gradient in fp32 and a chunk's part of it, hidden states and their gradient."""
        mesh = {"cp": self.parallel.cp, "tp": self.parallel.tp}
        chunk = logits_bytes(self.config, self.model, mesh) // (2 if self.value == 4 else 1)
        elements = self.model.vocab_size // self.parallel.tp * self.model.hidden_size
        return chunk + (4 + self.value) * elements + 2 * self.value * self.tokens * self.model.hidden_size

    def whole_weights(self) -> Whole:
        """Returns the weights that are whole at the moments, and what else passes."""
        return whole_bytes(self.config, self.model, self.parallel, self.pp_rank, self.states)

    def _held(self, layers: float, computing: bool) -> int:
        """Returns the activations of so many layers, one of which is whole with recomputation where it is computed."""
        p, remat = self.parallel, self.config.engine.remat
        block = block_activations(self.model, p.tp, p.sequence_parallel)
        block += gathered_inputs(self.model, p.tp, p.sequence_parallel)
        if remat == "none":
            return int(self.tokens * self.value * layers * block)
        kept = kept_activations(self.model, p.tp, p.sequence_parallel, remat)
        return int(self.tokens * self.value * ((layers - computing) * kept + computing * block))

    def _backward(self) -> int:
        return int(self.tokens * self.value * backward_values(self.model, self.parallel.tp))

    def _moment(
        self, name: str, gradients: int, buffers: int, activations: int, layers: float, logits: int = 0
    ) -> Memory:
        s, p = self.states, self.parallel
        mesh = {"pp": p.pp, "cp": p.cp, "tp": p.tp}
        attention = attention_bytes(self.config, self.model, mesh, layers) if layers else 0
        return Memory(name, s.weights, gradients, s.optimizer, buffers, activations, attention, logits)


@dataclass(frozen=True)
class Whole:
    """Holds bytes that are there at some moments alone."""

    gathered: int  # whole weights while blocks are computed
    at_head: int  # the same while the head has its backward
    late: int  # the same while the first block has its backward
    arriving: int  # in the forward: weights on their way
    copied: int  # in the update
    to_come: int  # gradients that are not there yet while the first block has its backward


def whole_bytes(config: Config, model: ModelConfig, parallel: ParallelConfig, pp_rank: int, states: States) -> Whole:
    """Returns what `Whole` lists, of one pipeline rank.

    FSDP2 has those outside blocks and, of blocks, the one that is computed and the next; while the head is, the next
    alone. ZeRO stage 3 keeps what is used again and frees a block behind its backward. It gathers up to PREFETCH
    elements into one buffer, from which it copies the parameters; what is looked up first it gathers alone.
    """
    engine, value = config.engine, value_bytes(config.engine)
    stages = plan_stages(model, parallel).stages_of(pp_rank)
    units = [unit for stage in stages for unit in stage_units(model, parallel, stage)]
    block = value * max(map(numel, units[:-1]))
    coming = 0 if model.lora else value * (numel(units[0]) + (numel(units[-1][:1]) if 0 in stages else 0))
    gathered = states.gathered
    if engine.backend == "fsdp":
        resharded = engine.reshard and parallel.pp == 1
        return Whole(gathered, gathered - block if resharded else gathered, gathered, 0, 0, coming)
    if engine.zero_stage == 3:
        lookup = value * numel(units[-1][:1]) if 0 in stages else 0
        ranks = parallel.dp_replicate * parallel.dp_shard * parallel.cp
        arriving = min(max(0, gathered - lookup), PREFETCH * value) if ranks > 1 else 0
        return Whole(gathered, gathered, min(gathered, block), arriving, 0, coming)
    return Whole(gathered, gathered, gathered, 0, gathered + _flat(config, model, parallel, pp_rank), coming)


def _flat(config: Config, model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> int:
    """Returns the bytes of the gradients that DeepSpeed's stages 1 and 2 put one behind the other for the update, of
    the largest group of the optimizer: in the compute precision, and then in fp32."""
    engine = config.engine
    if engine.zero_stage not in (1, 2) or engine.offload != "none":
        return 0
    shapes = rank_shapes(model, parallel, pp_rank) if model.lora is None else rank_adapters(model, parallel, pp_rank)
    ranks = parallel.dp_replicate * parallel.dp_shard * parallel.cp
    largest = max(map(numel, optimizer_groups(shapes)))
    return -(-largest // ranks) * (4 if engine.precision == "fp32" else 6)
