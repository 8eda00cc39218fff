"""Finds out, without torch, what this machine computes quickly."""

from __future__ import annotations

import netrc
import os
import re
from importlib.metadata import version
from urllib.parse import urlsplit

# x86: what oneDNN, torch's library for matrix products on a CPU, requires; without it bf16 runs in a plain loop
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
ENOUGH = ({"avx_ne_convert"}, {"bf16"})  # x86 without AVX-512, ARM


def fast_precision() -> str:
    """Returns bf16 on a GPU and on a CPU that multiplies it quickly, else fp32.

    A CPU with AVX2 alone takes about six times as long for a matrix product in bf16.
    """
    return "bf16" if has_gpu() or multiplies_bf16(cpu_flags()) else "fp32"


def torch_version() -> tuple[int, int]:
    """Returns the version of the installed torch, as (2, 13)."""
    major, minor = version("torch").split(".")[:2]
    return int(major), int(minor)


def has_gpu() -> bool:
    """Returns whether there is an NVIDIA GPU that CUDA_VISIBLE_DEVICES does not hide."""
    return os.path.exists("/dev/nvidia0") and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def multiplies_bf16(flags: set[str]) -> bool:
    """Returns whether a CPU with these instructions is quick in bf16."""
    return flags >= AVX512 or any(flags >= needed for needed in ENOUGH)


def cpu_flags(path: str = "/proc/cpuinfo") -> set[str]:
    """Returns the instructions of the first core, as Linux names them; empty where it does not list them."""
    if not os.path.exists(path):
        return set()
    with open(path, encoding="utf-8") as file:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", file.read(), re.M)
    return set(found[1].split()) if found else set()


def has_wandb_key() -> bool:
    """Returns whether there is a key for Weights & Biases: WANDB_API_KEY, or what `wandb login` wrote into ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        found = netrc.netrc(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(found and found[2])
