"""Describes the GPUs that a plan may name. Peaks are those of dense products; datasheets print them with sparsity,
twice as high."""

from __future__ import annotations

import json
import os

from pydantic import ValidationError

from llmtrain.config.document import ConfigError, read_document
from llmtrain.config.explain import explain
from llmtrain.config.plan import HardwareConfig

HARDWARE: dict[str, HardwareConfig] = {
    "a100": HardwareConfig(
        name="A100 SXM 80 GB",
        bf16_tflops=312,
        fp32_tflops=19.5,
        memory_gb=80,
        memory_gb_per_s=2039,
        node_gb_per_s=300,
        network_gb_per_s=25,
        watts=400,
        source="A100 datasheet (NVLink 600 GB/s in both directions); DGX A100: 200 Gb/s InfiniBand a GPU",
    ),
    "h100": HardwareConfig(
        name="H100 SXM 80 GB",
        bf16_tflops=989.4,
        fp8_tflops=1978.9,
        fp32_tflops=66.9,
        memory_gb=80,
        memory_gb_per_s=3350,
        node_gb_per_s=450,
        network_gb_per_s=50,
        watts=700,
        source="H100 datasheet (NVLink 900 GB/s in both directions); DGX H100, Grand Teton: 400 Gb/s a GPU",
    ),
    "h200": HardwareConfig(
        name="H200 SXM 141 GB",
        bf16_tflops=989.4,
        fp8_tflops=1978.9,
        fp32_tflops=66.9,
        memory_gb=141,
        memory_gb_per_s=4800,
        node_gb_per_s=450,
        network_gb_per_s=50,
        watts=700,
        source="H200 datasheet (NVLink 900 GB/s in both directions); DGX H200: 400 Gb/s a GPU",
    ),
    "b200": HardwareConfig(
        name="B200 SXM 180 GB",
        bf16_tflops=2250,
        fp8_tflops=4500,
        fp32_tflops=75,
        memory_gb=180,
        memory_gb_per_s=8000,
        node_gb_per_s=900,
        network_gb_per_s=50,
        watts=1000,
        source="DGX B200 datasheet (NVLink 1.8 TB/s in both directions): 400 Gb/s a GPU",
    ),
}


def hardware_of(name: str) -> HardwareConfig:
    """Returns the hardware of this name, or what a YAML file says.

    Raises ConfigError for a name that is neither, with one line for each fault of a file.
    """
    if name in HARDWARE:
        return HARDWARE[name]
    if not os.path.isfile(name):
        known = ", ".join(HARDWARE)
        raise ConfigError(f"plan.hardware={name}: is neither known nor a file; choose one of {known}, or measure it")
    document = read_document(name, ())
    try:
        return HardwareConfig.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(HardwareConfig, document, f, ()) for f in error.errors())) from None


def peak_flops(hardware: HardwareConfig, precision: str) -> float:
    """Returns the peak of dense matrix products in a compute precision, in FLOPs a second.

    Raises ValueError where the hardware does not compute in it.
    """
    if precision == "fp8" and hardware.fp8_tflops is None:
        raise ValueError(f"engine.precision=fp8: {hardware.name} has no fp8; use bf16, or other plan.hardware")
    tflops = {"fp8": hardware.fp8_tflops, "fp32": hardware.fp32_tflops}.get(precision) or hardware.bf16_tflops
    return tflops * 1e12
