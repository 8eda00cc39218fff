"""Finds the device that this rank computes on, and says so when torch cannot use the GPU that is there."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import torch

from llmtrain.config.machine import has_gpu

OR_CPU = "or set CUDA_VISIBLE_DEVICES= (empty) to use the CPU"


def rank_device() -> torch.device:
    """Returns the GPU of this rank, or the CPU where there is none. Raises ValueError when this torch was not
    built for a GPU that is there, or there are fewer GPUs than ranks."""
    if not torch.cuda.is_available():
        if has_gpu():
            raise ValueError(f"{_why_not()}; install the torch that fits it (launch/common.sh does), {OR_CPU}")
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(
            f"LOCAL_RANK={local_rank}: this machine has {gpus} GPU(s), and each rank needs one; start fewer ranks, "
            f"{OR_CPU}"
        )
    capability, built = torch.cuda.get_device_capability(local_rank), torch.cuda.get_arch_list()
    if not runs(capability, built):
        name = torch.cuda.get_device_name(local_rank)
        raise ValueError(
            f"{name} (compute capability {capability[0]}.{capability[1]}): torch {torch.__version__} was built for "
            f"{', '.join(built)} only; install one that was built for it, {OR_CPU}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def runs(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Returns whether a GPU runs one of the architectures of a build: machine code (sm_86) of the same major number and
    no higher minor one, or what is compiled when it is loaded (compute_90) for any that is no higher."""
    major, minor = capability
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)\w?", each) for each in built]
    pairs = [(each[1], int(each[2]), int(each[3])) for each in found if each]
    if not pairs:  # AMD
        return True
    return any((kind == "compute" or a == major) and (a, b) <= (major, minor) for kind, a, b in pairs)


def _why_not() -> str:
    if torch.version.cuda is None:
        return f"/dev/nvidia0: this machine has a GPU, and torch {torch.__version__} was built without CUDA"
    return f"/dev/nvidia0: torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}, and finds none"
