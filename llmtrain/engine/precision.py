"""Defines the number formats of the compute, and the loss scale that fp16 needs."""

from __future__ import annotations

import torch

from llmtrain.config.machine import cpu_flags, multiplies_bf16
from llmtrain.config.schema import EngineConfig
from llmtrain.observe.log import log

START_SCALE = 2.0**16
FP8_CAPABILITY = (8, 9)
MIN_SCALE = 1.0  # at this scale an overflow is the model's own

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def compute_dtype(precision: str) -> torch.dtype:
    """Returns the dtype of weights and activations that `engine.precision` names; masters and optimizer state are
    always fp32. (fp8 is the format of the products within blocks, see parallel.float8.)"""
    return DTYPES[precision]


def check_device(precision: str, device: torch.device) -> None:
    """Raises ValueError when the device cannot multiply in this precision; logs it when the device is slow in it."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if precision == "fp8" and capability < FP8_CAPABILITY:
        found = f"a GPU of {capability[0]}.{capability[1]}" if device.type == "cuda" else f"a {device.type}"
        raise ValueError(
            f"engine.precision=fp8: needs a GPU of compute capability 8.9 or higher (Ada, Hopper), this is {found}; "
            "use bf16"
        )
    if precision == "bf16" and device.type == "cpu" and not multiplies_bf16(cpu_flags()):
        log("engine.precision=bf16: this CPU has no instructions for it and is several times faster in fp32; use auto")


class LossScaler:
    """Keeps small fp16 gradients from becoming zero: the loss is multiplied by `scale` and the gradient divided by it
    (arXiv 1710.03740, 3.2). Other precisions: scale 1.

    Without `engine.loss_scale` the scale moves as in torch.amp.GradScaler: halved at an overflow, doubled after
    `engine.loss_scale_window` steps without one.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.dynamic = config.precision == "fp16" and config.loss_scale is None
        self.scale = (config.loss_scale or START_SCALE) if config.precision == "fp16" else 1.0
        self.window, self.clean_steps = config.loss_scale_window, 0

    def explains(self, overflow: bool) -> bool:
        """Takes note of a step, with the same answer on all ranks. True: the scale was too large; it is smaller now,
        and this update is left out."""
        if not self.dynamic or (overflow and self.scale <= MIN_SCALE):
            return False
        self.clean_steps = 0 if overflow else self.clean_steps + 1
        if overflow:
            self.scale /= 2
        elif self.clean_steps == self.window:
            self.scale, self.clean_steps = self.scale * 2, 0
        return overflow

    def state(self) -> dict[str, float]:
        """Returns what a checkpoint holds of the scale; empty where nothing moves."""
        return {"loss_scale": self.scale, "clean_steps": self.clean_steps} if self.dynamic else {}

    def load(self, state: dict[str, float]) -> None:
        """Goes on with a state from a checkpoint; that of another precision says nothing."""
        if self.dynamic and state:
            self.scale, self.clean_steps = float(state["loss_scale"]), int(state["clean_steps"])
