"""Defines the keys of the section ladder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints

from llmtrain.config.section import Count, Section

Name = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$", max_length=60)]
"""A name that is a part of a directory's."""
Option = Annotated[str, StringConstraints(pattern=r"^[^\n\r]*$")]


class LadderSizeConfig(Section):
    """Describes one size of a ladder: a shape, laid over the section model, or `params`, from which a shape follows."""

    name: Name | None = None  # a part of its runs' names; null = <num_layers>x<hidden_size>
    params: PositiveFloat | None = None  # parameters as ladder.params counts; the shape follows, see docs/scaling.md
    num_layers: Count | None = None  # blocks; null, here and below = as in the section model
    hidden_size: PositiveInt | None = None  # width of the residual stream
    ffn_size: PositiveInt | None = None  # inner width of the feed-forward layer
    num_heads: PositiveInt | None = None  # query heads
    num_kv_heads: PositiveInt | None = None  # key and value heads
    head_dim: PositiveInt | None = None  # width of a head
    lr: PositiveFloat | None = None  # lr.by sizes: its highest learning rate


class LadderBudgetConfig(Section):
    """Describes one budget of compute, which each of its sizes spends once."""

    flops: PositiveFloat  # of a run: 6 x parameters x tokens
    sizes: list[str] | None = None  # names of the sizes that spend it; null = all


class LadderLrConfig(Section):
    """Says which learning rate a size has. The last one, `optim.min_lr`, keeps its ratio to `optim.lr`."""

    by: Literal["mup", "power", "sizes", "same"] = "mup"  # model.mup; coefficient x N^exponent; size's lr; optim.lr
    coefficient: PositiveFloat | None = None  # by power: the learning rate of one parameter
    exponent: float | None = None  # by power, as -0.25


class LadderBatchConfig(Section):
    """Says how many tokens a step has: coefficient x FLOPs^exponent of the run's budget, in whole microbatches."""

    coefficient: PositiveFloat | None = None  # tokens; null = train.global_batch_seqs for all
    exponent: float | None = None  # as 0.3271 (arXiv 2401.02954)


class LadderConfig(Section):
    """Configures `llmtrain ladder`: trains sizes at budgets of compute, and fits scaling laws to their held-out losses;
    see docs/scaling.md."""

    sizes: list[LadderSizeConfig] = Field([], max_length=200)  # models that are trained
    budgets: list[LadderBudgetConfig] = Field([], max_length=200)  # each size of a budget is one run
    params: Literal["all", "non_embedding"] = "all"  # the N of 6 N D and of the laws; without: embeddings and head
    aspect: PositiveFloat = 32.0  # hidden_size / num_layers of sizes that are given by params
    lr: LadderLrConfig = LadderLrConfig()  # the highest learning rate by size
    batch: LadderBatchConfig = LadderBatchConfig()  # tokens a step by budget
    warmup_share: float = Field(0.05, ge=0.0, lt=1.0)  # share of a run's steps in which lr rises; then optim.schedule
    min_steps: PositiveInt = 50  # runs of fewer steps are refused
    max_epochs: PositiveFloat = 4.0  # times that a run may see any source; more is refused, more than 1 is told
    ranks: PositiveInt = 1  # processes of one run, under torchrun on one machine
    executor: Literal["local", "slurm"] = "local"  # processes here, or one array job over the missing runs
    workers: PositiveInt = 1  # runs at a time
    slurm: dict[Name, Option | int] = Field({})  # options of sbatch, as {partition: gpu, time: "4:00:00", gpus: 1}
    flops_per_s: PositiveFloat | None = None  # speed for the estimated times; null = that of runs that are done
