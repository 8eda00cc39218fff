"""Measures what this machine computes and moves, as hardware for `llmtrain plan`."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import yaml

from llmtrain.config.machine import fast_precision
from llmtrain.config.plan import HardwareConfig
from llmtrain.config.schema import ParallelConfig
from llmtrain.parallel.device import rank_device
from llmtrain.parallel.mesh import init_mesh, shutdown

REACHED = 0.8  # of the best product here, by the products of a training step: by assumption
ROUNDS = 5  # the fastest counts
TIMEOUT_S = 120


def measure(path: str) -> HardwareConfig:
    """Returns the hardware of this rank and, on rank 0, writes it to `path`; started on several ranks, with the links
    between them.

    Raises ValueError when there is a file already, or no directory for it.
    """
    if os.path.exists(path):
        raise ValueError(f"{path}: is there already; remove it or give another name")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"{path}: its directory does not exist; make it, or give another name")
    device, ranks = rank_device(), int(os.environ.get("WORLD_SIZE", "1"))
    links = _links(device) if ranks > 1 else {}
    hardware = HardwareConfig(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        bf16_tflops=product_tflops(device, torch.bfloat16),
        fp32_tflops=product_tflops(device, torch.float32),
        reached_share=REACHED,
        device="cuda" if device.type == "cuda" else "cpu",
        memory_gb=memory_gb(device, ranks),
        memory_gb_per_s=memory_rate(device),
        gpus_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        source=f"llmtrain doctor --measure on {ranks} ranks, {fast_precision()} is fast here",
        **links,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        with open(path, "x", encoding="utf-8") as file:
            yaml.safe_dump(hardware.model_dump(exclude_none=True), file, sort_keys=False)
    return hardware


def fastest_s(work: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of the fastest of ROUNDS calls, after one that does not count."""
    seconds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the rate of the product of two square matrices, in 1e12 FLOPs a second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / fastest_s(lambda: a @ b, device) / 1e12


def memory_rate(device: torch.device) -> float:
    """Returns the rate at which a large tensor is read and written, in 1e9 bytes a second."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest_s(lambda: target.copy_(source), device) / 1e9


def memory_gb(device: torch.device, ranks: int) -> float:
    """Returns the memory of the GPU, or this rank's part of the machine's, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks / 1e9


def _links(device: torch.device) -> dict[str, float]:
    """Returns the bandwidth of an all-reduce over all ranks as that of the slowest link of a ring: in a node where they
    are in one, else between nodes (then within a node is not known)."""
    mesh = init_mesh(ParallelConfig(), None, TIMEOUT_S)
    try:
        data = torch.ones(2**28 if device.type == "cuda" else 2**22, device=device)
        seconds = fastest_s(lambda: dist.all_reduce(data), device)
        rate = 2 * (mesh.size - 1) / mesh.size * data.nbytes / seconds / 1e9
    finally:
        shutdown()
    one_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == mesh.size
    return {"node_gb_per_s" if one_node else "network_gb_per_s": rate}
