"""Computes the phases of a run whose batch and row length grow, purely from configuration and step number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmtrain.config.schema import Config, ModelConfig, RopeScaling, TrainConfig


@dataclass(frozen=True)
class Phase:
    """Describes consecutive steps with one batch size and row length.

    Example: Phase(first_step=10, first_token=5120, global_batch_seqs=8, seq_len=64) takes 512 tokens a step, and step
    12 begins with token 6144 of the run.
    """

    first_step: int  # counted from 0
    first_token: int  # of the whole run: tokens in all steps before
    global_batch_seqs: int
    seq_len: int
    rope_theta: float | None = None  # None = as the model section says
    rope_scaling: RopeScaling | None = None  # None = as the model section says

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_seqs * self.seq_len

    def token_at(self, step: int) -> int:
        """Returns the number of tokens of the run before `step`, which lies in this phase or directly after it."""
        return self.first_token + (step - self.first_step) * self.tokens_per_step


def phases(train: TrainConfig) -> tuple[Phase, ...]:
    """Returns the phases of the `train.steps` steps, in order.

    An entry of a ramp holds from the first step that begins with `from_tokens` tokens or more. Where several take
    effect at one step, all apply, and the last one wins where they set the same key.
    """
    table = [Phase(0, 0, train.global_batch_seqs, train.seq_len)]
    for entry in sorted([*train.batch_ramp, *train.seq_ramp], key=lambda entry: entry.from_tokens):
        last = table[-1]
        steps = max(0, -(-(entry.from_tokens - last.first_token) // last.tokens_per_step))
        if steps == 0:
            table.pop()
        changed = {name: value for name, value in entry if name != "from_tokens" and value is not None}
        begins = last.first_step + steps
        table.append(replace(last, first_step=begins, first_token=last.token_at(begins), **changed))
    return tuple(phase for phase in table if phase.first_step < train.steps)


def phase_at(train: TrainConfig, step: int) -> Phase:
    """Returns the phase of a step."""
    return next(phase for phase in reversed(phases(train)) if phase.first_step <= step)


def total_tokens(train: TrainConfig) -> int:
    """Returns the number of tokens of the whole run."""
    return phase_at(train, train.steps - 1).token_at(train.steps)


def longest_row(train: TrainConfig) -> int:
    """Returns the tokens of the longest row: the unit of the data order, which shorter rows split into equal pieces.

    It does not depend on `steps`, so a longer run takes the same samples.
    """
    return max([train.seq_len, *(entry.seq_len for entry in train.seq_ramp)])


def microbatch_tokens(train: TrainConfig) -> int:
    """Returns the most tokens of one forward on one rank: rows of text have `train.micro_batch_seqs`, everything else
    at most `train.micro_batch_tokens` where that is given."""
    return max(train.micro_batch_tokens or 0, train.micro_batch_seqs * longest_row(train))


def with_rope(model: ModelConfig, phase: Phase) -> ModelConfig:
    """Returns the model with the RoPE of the phase."""
    changed = {"rope_theta": phase.rope_theta, "rope_scaling": phase.rope_scaling}
    return model.model_copy(update={name: value for name, value in changed.items() if value is not None})


def trained_model(model: ModelConfig, train: TrainConfig, steps: int) -> ModelConfig:
    """Returns the model as it is after `steps` steps, with the RoPE of the last of them. `model` is resolved."""
    return with_rope(model, phase_at(train, min(max(0, steps - 1), train.steps - 1)))


def with_phase(config: Config, phase: Phase) -> Config:
    """Returns the configuration as if the whole run were this phase."""
    shape = {"global_batch_seqs": phase.global_batch_seqs, "seq_len": phase.seq_len}
    train = config.train.model_copy(update={**shape, "batch_ramp": [], "seq_ramp": []})
    return config.model_copy(update={"train": train})


def ramp_faults(train: TrainConfig) -> Iterator[str]:
    """Yields what is wrong with the ramps themselves, one line each: `key=value: rule; remedy`."""
    for name in ("batch_ramp", "seq_ramp"):
        starts = [entry.from_tokens for entry in getattr(train, name)]
        if starts != sorted(set(starts)):
            yield f"train.{name}: from_tokens={starts}: must rise from entry to entry; sort them"
    longest = longest_row(train)
    for seq_len in sorted({train.seq_len, *(entry.seq_len for entry in train.seq_ramp)}):
        if longest % seq_len:
            yield (
                f"train.seq_len={seq_len}: must divide the longest row of train.seq_ramp={longest}, of which shorter "
                "rows are pieces; change one of them"
            )
    for phase in phases(train):
        if train.seq_ramp and phase.tokens_per_step % longest:
            yield (
                f"train.global_batch_seqs={phase.global_batch_seqs}: from token {phase.first_token} a step has "
                f"{phase.global_batch_seqs} x {phase.seq_len} = {phase.tokens_per_step} tokens: must be a multiple of "
                f"the longest row, {longest}, so that every phase starts with a whole one; change the batch"
            )
