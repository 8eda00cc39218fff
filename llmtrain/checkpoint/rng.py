"""Converts the random state of one process to JSON and back."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict:
    """Returns the random state of python, numpy, torch and, where there is one, the current CUDA device."""
    version, numbers, gauss_next = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": [version, list(numbers), gauss_next],
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _hex(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict) -> None:
    """Restores what `random_state` returned. A CUDA state is ignored where there is no CUDA."""
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(_unhex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unhex(state["cuda"]))


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
