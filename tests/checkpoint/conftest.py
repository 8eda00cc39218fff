"""Provides a stand-in engine over a plain decoder, cut by synthetic layouts, and ranks that are threads."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from llmtrain.checkpoint.reshard import piece
from llmtrain.checkpoint.save import save_checkpoint
from llmtrain.config.schema import ModelConfig
from llmtrain.engine.base import FragmentReader
from llmtrain.model.decoder import Decoder, init_tensor
from llmtrain.types import Address, Fragment

KEYS = ("weight", "exp_avg", "exp_avg_sq")
CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, ffn_size=24, num_heads=4, num_kv_heads=2, vocab_size=32, tie_embeddings=True
)
COLUMN = ("embed.weight", "head.weight", "q.weight", "k.weight", "v.weight", "gate.weight", "up.weight")
ROW = ("o.weight", "down.weight")


@dataclass(frozen=True)
class Layout:
    pp: int = 1
    tp: int = 1
    dp: int = 1

    @property
    def size(self) -> int:
        return self.pp * self.tp * self.dp


@dataclass
class FakeEngine:
    """Owns what `rank` of `layout` would; its fragments are cut from the global values `tensors[name][key]`."""

    layout: Layout
    rank: int
    tensors: dict[str, dict[str, Tensor]]
    loaded: list[Fragment] = field(default_factory=list)
    step: int = 0

    def addresses(self) -> Iterator[Address]:
        pp, rest = divmod(self.rank, self.layout.tp * self.layout.dp)
        tp, dp = rest % self.layout.tp, rest // self.layout.tp
        for index, (name, keys) in enumerate(self.tensors.items()):
            shape = tuple(keys["weight"].shape)
            tp_dim = 0 if name.endswith(COLUMN) else 1 if name.endswith(ROW) else None
            if index % self.layout.pp != pp or (tp_dim is None and tp):
                continue
            numel = math.prod(shape) // (1 if tp_dim is None else self.layout.tp)
            part = -(-numel // self.layout.dp)
            start = min(dp * part, numel)
            yield Address(name, shape, tp_dim, tp, self.layout.tp, start, min(part, numel - start))

    def fragments(self) -> Iterator[Fragment]:
        for a in self.addresses():
            if a.numel:
                yield Fragment(a, {key: piece(full, a) for key, full in self.tensors[a.name].items()})

    def load_fragments(self, read: FragmentReader, step: int) -> None:
        self.loaded = [Fragment(a, read(a)) for a in self.addresses()]
        self.step = step


class ThreadGroup:
    """Stands for one rank of an in-process group."""

    def __init__(self, rank: int, size: int, board: list, barrier: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.barrier = rank, size, board, barrier

    def all_gather_json(self, value: object) -> list:
        self.board[self.rank] = json.dumps(value)
        self.barrier.wait(20)
        values = [json.loads(text) for text in self.board]
        self.barrier.wait(20)
        return values


def run_ranks(size: int, action: Callable[[ThreadGroup], object]) -> list:
    """Runs `action` on `size` ranks at once; returns the result, or the exception, of each."""
    board, barrier = [None] * size, threading.Barrier(size)

    def one(rank: int) -> object:
        try:
            return action(ThreadGroup(rank, size, board, barrier))
        except (Exception, SystemExit) as e:
            return e

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def make_tensors(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Returns weights and optimizer state of a plain decoder; every element is different from every other."""
    shapes = {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {
            "weight": init_tensor(name, shape, config, seed) + torch.randn(shape, generator=generator),
            "exp_avg": torch.randn(shape, generator=generator),
            "exp_avg_sq": torch.rand(shape, generator=generator),
        }
        for name, shape in shapes.items()
    }


def shapes_of(tensors: dict[str, dict[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that the model should hold."""
    return {name: tuple(keys["weight"].shape) for name, keys in tensors.items()}


def save(directory: object, tensors: dict, layout: Layout, step: int, keep: int = 3) -> list:
    """Saves on all ranks of a layout; returns the result, or the exception, of each."""

    def action(group: ThreadGroup) -> str:
        engine = FakeEngine(layout, group.rank, tensors)
        return save_checkpoint(str(directory), engine, {"step": step, "note": "hello"}, group, keep, shapes_of(tensors))

    return run_ranks(layout.size, action)


@pytest.fixture
def fake() -> SimpleNamespace:
    """Returns the helpers above: tests in importlib mode cannot import this file."""
    return SimpleNamespace(
        CONFIG=CONFIG,
        KEYS=KEYS,
        Layout=Layout,
        FakeEngine=FakeEngine,
        run_ranks=run_ranks,
        tensors=make_tensors,
        shapes=shapes_of,
        save=save,
    )
