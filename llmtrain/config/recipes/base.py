"""Describes an algorithm to the rest of the package, without torch: one `Recipe` for each.

The command line, the stages of a run, the rules, the planner, resuming, the report and the docs read these
descriptions; none of them names an algorithm. docs/recipes.md tells how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from llmtrain.config.schema import Config, Section

SIDES = 2  # of each game of `rollout.environment.game`

Panel = tuple[str, Mapping[str, str]]
"""Holds (title of a plot, {key of metrics.jsonl: name of its line})."""


class StepSize(NamedTuple):
    """Says how much a step takes, for the planner and the rules."""

    tokens: int  # at the start of a run; the most there can be if it samples
    seqs: int | None  # rows; None = follows the lengths of what is sampled
    words: str  # for `llmtrain plan`
    prompts: int = 0  # that are sampled together
    rounds: int = 1  # of sampling, one after the other
    sample_tokens: int = 0  # the most that a sample has behind its prompt


def fixed_rows(config: Config) -> StepSize:
    """Returns the size of a step of `train.global_batch_seqs` rows of `train.seq_len` tokens."""
    t = config.train
    tokens = t.global_batch_seqs * t.seq_len
    return StepSize(tokens, t.global_batch_seqs, f"{t.global_batch_seqs} x {t.seq_len} tokens = {tokens:,} a step")


def episode_rows(config: Config) -> int:
    """Returns the rows to train on that an episode gives at most: one, or one of each side of a game, or of each turn
    where turns may begin new rows; an agent's or environment's own number is `plan.episode_rows`. A completion that
    stands alone is one row."""
    environment, said = config.rollout.environment, config.plan.episode_rows
    if environment is None:
        return (said or 1) if config.rollout.agent is not None else 1
    sides = SIDES if environment.game else 1
    return said or (max(sides, environment.max_turns) if environment.rewritten == "new_row" else sides)


def rows_of(config: Config, prompts: int) -> int:
    """Returns the rows to train on that so many prompts give at most."""
    return prompts * config.rollout.group_size * episode_rows(config)


def sample_tokens(config: Config) -> int:
    """Returns the most tokens that a sample has behind its prompt, or an episode in all of its rows."""
    r, row = config.rollout, episode_rows(config) * config.train.seq_len
    if r.agent is not None:
        return row
    return r.max_new_tokens if r.environment is None else min(r.max_new_tokens * r.environment.max_turns, row)


def sampled(config: Config, prompts: int, updates: int, rounds: int = 1) -> StepSize:
    """Returns the size of a step that samples `rollout.group_size` completions of each prompt, or episodes, in at most
    so many rounds of as many prompts."""
    r, each, rows = config.rollout, sample_tokens(config), episode_rows(config)
    tokens = rounds * prompts * r.group_size * each
    samples = f"{r.group_size} samples" + (f" of {rows} rows" if rows > 1 else "")
    shape = f"{rounds * prompts} prompts x {samples} x {each} tokens"
    words = f"at most {shape} = {tokens:,} a step, in {updates} updates"
    return StepSize(tokens, None, words, prompts, rounds, each)


def paired(config: Config) -> StepSize:
    """Returns the size of a step of `train.global_batch_seqs` preference pairs, each at most a row."""
    t = config.train
    tokens = t.global_batch_seqs * t.seq_len
    return StepSize(tokens, None, f"at most {t.global_batch_seqs} pairs x {t.seq_len} tokens = {tokens:,} a step")


def frozen_reference(config: Config, wanted: bool) -> tuple[str, ...]:
    """Returns the reference among a recipe's `other_models` if it is `wanted`; that of LoRA is the policy without its
    adapters, and no model of its own."""
    return ("a frozen reference",) if wanted and config.model.lora is None else ()


MismatchForm = Literal["auto", "off", "truncate", "mask", "mask_seqs"]
"""How a generator whose numbers are not the trainer's is corrected for, see `llmtrain/losses/mismatch.py`."""


class Mismatch(NamedTuple):
    """Holds what the keys `mismatch`, `mismatch_cap`, `mismatch_low` and `mismatch_high` of a recipe ask for."""

    form: MismatchForm  # never auto
    cap: float
    low: float
    high: float


def mismatch_of(config: Config, name: str) -> Mismatch:
    """Returns the correction that the section of the recipe asks for. The native generator in fp32 computes the
    trainer's numbers; in fewer bits its log-probs differ from those of the trainer, whose kernels round otherwise, and
    those of older weights do by all that was learned since."""
    s, r = getattr(config, name), config.rollout
    same_numbers = config.engine.precision == "fp32" and r.generator == "native" and r.max_staleness == 0
    auto = "off" if same_numbers else "truncate"
    return Mismatch(auto if s.mismatch == "auto" else s.mismatch, s.mismatch_cap, s.mismatch_low, s.mismatch_high)


class Passes(NamedTuple):
    """Says how often a step goes through what it trains on, for the planner: rows, each at most `train.seq_len` tokens.
    Forwards without gradients are in shares of these rows: 0.5 = half of them are scored once."""

    seqs: int  # samples, pairs or rows that an epoch takes, at most
    epochs: int = 1
    minibatches: int = 1  # updates of an epoch
    policy: float = 0.0  # forwards of the policy; of its own frozen start too, where that is the base of its adapters
    frozen: float = 1.0  # of each reference and teacher that is a model of its own
    critics: float = 0.0  # of each critic, beside its updates, which are as many as the policy's


def old_scores(mismatch: Mismatch, epochs: int, minibatches: int) -> float:
    """Returns the share of the samples of a step that the policy scores before its updates, for the correction of a
    generator: all but those of the first update, whose weights are still those."""
    if mismatch.form == "off":
        return 0.0
    return 1.0 if epochs > 1 else 1 - 1 / minibatches


Rule = Callable[[Config], Iterator[str]]
"""Yields a line `key=value: rule; remedy` for each violation."""


def whole_minibatches(name: str) -> Rule:
    """Returns the rule that the prompts of a step of the recipe divide into its minibatches."""

    def rule(config: Config) -> Iterator[str]:
        section = getattr(config, name)
        if section.prompts_per_step % section.minibatches:
            yield (
                f"{name}.prompts_per_step={section.prompts_per_step}: must be a multiple of "
                f"{name}.minibatches={section.minibatches}; change one of them"
            )

    return rule


def mismatch_bounds(name: str) -> Rule:
    """Returns the rule that the bounds within which a token or sequence of the recipe is kept have something between
    them."""

    def rule(config: Config) -> Iterator[str]:
        low, high = getattr(config, name).mismatch_low, getattr(config, name).mismatch_high
        if low >= high:
            yield f"{name}.mismatch_low={low:g}: must be below {name}.mismatch_high={high:g}; lower it"

    return rule


def no_spikes(name: str, loss: str) -> Rule:
    """Returns the rule that the loss of the recipe, which behaves as `loss` says, is not watched for spikes."""

    def rule(config: Config) -> Iterator[str]:
        if config.guard.spike != "off":
            yield f"guard.spike={config.guard.spike}: must be off in {name}, whose loss {loss}; remove it"

    return rule


def without_effect(config: Config, name: str, keys: Sequence[str], why: str, remedy: str) -> Iterator[str]:
    """Yields a line for each of these keys of a section that is not at its default, as nothing reads it here: `why`.

    A resolved document has every key written out, so that a default does not count as set.
    """
    section = getattr(config, name)
    for key in keys:
        value = getattr(section, key)
        if value != type(section).model_fields[key].default:
            shown = f"{value:g}" if isinstance(value, float) else value
            yield f"{name}.{key}={shown}: {why}; remove it, or {remedy}"


def waiting_reference(name: str, used: Callable[[Config], bool]) -> Rule:
    """Returns the rule that a reference which is to wait in host memory is a model of its own."""

    def rule(config: Config) -> Iterator[str]:
        if getattr(config, name).reference_waits and (config.model.lora is not None or not used(config)):
            why = "with model.lora it is the policy without its adapters" if used(config) else "there is none"
            yield f"{name}.reference_waits=true: needs a reference with weights of its own; {why}; remove it"

    return rule


@dataclass(frozen=True)
class Recipe:
    """Describes an algorithm. Its loop is `main`, a function of the configuration, which is imported when it starts.

    Example: Recipe("sft", "train on the answers of demonstrations", "llmtrain.recipes.sft:main")
    """

    name: str  # the command, and the section of the document if it has one
    summary: str  # for `llmtrain --help`
    main: str  # module:function
    section: type[Section] | None = None  # its keys, under `name`; each with a default
    rules: tuple[Rule, ...] = ()
    step_size: Callable[[Config], StepSize] = fixed_rows
    passes: Callable[[Config], Passes] | None = None  # None: all that it samples, or the rows of a step, once
    same: tuple[str, ...] = ()  # keys that must stay when a run goes on, beside those of all recipes
    packs_text: bool = False  # trains on the text of data.sources, with ramps and objectives; else on data.train
    starts_trained: bool = False  # model.init_from must be set
    samples: bool = False  # has a generator: the sections rollout and rewards, rollout workers
    head: Literal["lm", "scalar"] = "lm"  # of the model that it trains (model.head)
    branches: bool = False  # rows hold several samples of a prompt (Batch.ends)
    judges_rows: bool = False  # has the section rewards without `samples`: they judge rows that are given
    judged: bool = True  # with rewards: at least one must be named; else they are only recorded
    other_models: Callable[[Config], tuple[str, ...]] = lambda config: ()  # models beside the policy, for the planner
    weights: Callable[[Config], Mapping[str, str]] = lambda config: {}
    """Maps keys to directories of models that it reads beside `model.init_from`: they must be there, fit the layout,
    and stay what they are while a run goes on."""
    values: tuple[str, ...] = ()  # such keys of models with a scalar head, which without a directory have its own body
    variant: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    """Returns the fields of this description that a document changes (it samples with one value of a key, and not with
    another)."""
    plots: Mapping[str, tuple[Panel, ...]] = field(default_factory=dict, hash=False)  # of the report, by file suffix
    moved: Mapping[str, Callable[[Any], tuple[str, Any]]] = field(default_factory=dict, hash=False)
    """Maps keys that this section had in earlier versions to functions from their value to (key, value) today."""

    def of(self, config: Config) -> Recipe:
        """Returns the description as a document makes it, see `variant`."""
        changes = self.variant(config)
        return replace(self, **changes) if changes else self

    def passes_of(self, config: Config) -> Passes:
        """Returns how often a step goes through what it trains on."""
        if self.passes is not None:
            return self.passes(config)
        size = self.step_size(config)
        return Passes(rows_of(config, size.rounds * size.prompts) if self.samples else config.train.global_batch_seqs)

    @property
    def reads_rewards(self) -> bool:
        """Says whether the section rewards counts."""
        return self.samples or self.judges_rows

    @property
    def fixed_batch(self) -> bool:
        """Says whether a step has a number of rows that the document gives."""
        return self.step_size is fixed_rows


SAMPLING_PLOTS: Mapping[str, tuple[Panel, ...]] = {
    "rl": (
        ("Mean reward", {"reward_mean": "reward"}),
        ("KL, nats a token", {"kl": "to the reference", "kl_old": "from the sampling policy"}),
        ("Entropy, nats a token", {"entropy": "entropy"}),
        ("Response length, tokens", {"response_tokens_mean": "mean"}),
    )
}
"""Holds the plots of a recipe that samples from the policy that it trains."""

PAIR_PLOTS: Mapping[str, tuple[Panel, ...]] = {
    "pairs": (
        (
            "Share of pairs whose better answer has the higher reward",
            {"accuracy": "trained", "held_out_accuracy": "held out"},
        ),
        ("Rewards", {"chosen_reward": "chosen", "rejected_reward": "rejected"}),
    )
}
"""Holds the plots of a recipe that trains on preference pairs."""
