"""Defines the keys of the section plan, and those of a file that describes hardware."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from llmtrain.config.section import Section, UserPath

Rate = Annotated[float, Field(gt=0.0, le=1e15)]
"""A figure of hardware; far above this, times would be zero."""


class HardwareConfig(Section):
    """Describes a GPU and how it is joined to others. Bandwidths are of one GPU in one direction."""

    name: str  # as `llmtrain plan` prints it
    bf16_tflops: Rate  # peak of dense matrix products, 1e12 a second
    fp8_tflops: Rate | None = None  # the same in fp8; null = there is no fp8
    fp32_tflops: Rate | None = None  # the same in fp32, not TF32; null = as in bf16
    reached_share: float | None = Field(None, gt=0.0, le=1.0)  # of these in training; null = that of docs/plan.md
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: the native generator keeps its weights twice
    memory_gb: Rate  # 1e9 bytes
    memory_gb_per_s: Rate  # 1e9 bytes a second between memory and cores
    node_gb_per_s: Rate | None = None  # to the other GPUs of a node; null = not known
    network_gb_per_s: Rate | None = None  # to other nodes; null = not known
    gpus_per_node: PositiveInt = 8  # joined without the network
    watts: Rate | None = None  # limit of one GPU; null = no energy is told
    source: str = ""  # where these figures are from


class PlanConfig(Section):
    """Configures what `llmtrain plan` counts time, energy and dollars for; see docs/plan.md."""

    hardware: UserPath | None = None  # a100, h100, h200, b200, or a file of these keys; null = no time is told
    gpus: PositiveInt | None = None  # ranks of a single stage; null = WORLD_SIZE, else as few as the mesh takes
    episode_rows: PositiveInt | None = None  # rows that an episode gives at most; null = see docs/plan.md
    reserve_gb: float = Field(4.0, ge=0.0)  # of each GPU for the CUDA context, NCCL's buffers and fragmentation
    price_per_gpu_hour: float | None = Field(None, gt=0.0, le=1e9)  # dollars; null = no costs are told
    gpu_mttf_hours: float | None = Field(None, gt=0.0, le=1e9)  # mean, until one GPU fails and stops all; null = never
    restart_s: float = Field(600.0, ge=0.0, le=1e9)  # from a failure until the job trains again
    save_s: float = Field(30.0, gt=0.0, le=1e9)  # pause of the job for a checkpoint
    power_factor: float = Field(1.0, ge=1.0, le=100.0)  # energy with servers and cooling, over that of the GPUs
