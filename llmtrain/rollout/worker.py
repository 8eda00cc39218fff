"""Implements generators that span ranks: each rank answers its share of the prompts, every trainer gets all
rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from llmtrain.parallel.mesh import Link, Mesh
from llmtrain.rollout.generator import Generator, Weights
from llmtrain.rollout.wire import pack, unpack
from llmtrain.types import Group, Prompt, Sampling

Answer = Callable[[Sequence[Prompt], Sampling], list[Group]]
"""Takes what `Generator.generate` takes, and returns what it returns."""
ROOT = 0  # the trainer whose requests and weights are broadcast


class ColocatedGenerator:
    """Generates on the trainers, which take turns at it: every rank holds a whole generator beside its part of the
    trained model."""

    def __init__(self, local: Generator, mesh: Mesh, answer: Answer | None = None) -> None:
        """`answer` calls `local.generate` and does more; None = it alone."""
        self.local, self.mesh, self.answer = local, mesh, answer or local.generate

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Returns all groups, on every trainer (a collective; all pass the same prompts). The cache is freed while they
        train."""
        rank, size = self.mesh.rank, self.mesh.size
        self.local.wake()
        mine = self.answer(prompts[rank::size], sampling)
        self.local.sleep()
        return _merge(self.mesh.all_gather_bytes(_packed(mine, prompts, rank, size)), prompts)

    def load_weights(self, weights: Weights, version: int) -> None:
        """Loads `weights`, the engine's collective iterator, whole on every rank."""
        self.local.load_weights(weights, version)

    def checksums(self) -> list[dict[str, str]]:
        """Returns those of every rank, on every trainer (a collective)."""
        return list(chain.from_iterable(self.mesh.all_gather_json(self.local.checksums())))

    def sleep(self) -> None:
        self.local.sleep()

    def wake(self) -> None:
        self.local.wake()

    def close(self) -> None:
        self.local.close()


class RemoteGenerator:
    """Generates on rollout workers in the same job, behind the link. Every call is a collective over trainers and
    workers."""

    def __init__(self, link: Link, num_trainers: int) -> None:
        self.link, self.num_trainers = link, num_trainers

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Returns all groups, on every trainer; all pass the same prompts."""
        self.link.broadcast_json({"command": "generate", **request_of(prompts, sampling)}, ROOT)
        parts = self.link.all_gather_bytes(pack({}))
        return _merge(parts[self.num_trainers :], prompts)

    def load_weights(self, weights: Weights, version: int) -> None:
        """Broadcasts the weights tensor by tensor: no rank holds the model twice."""
        self.link.broadcast_json({"command": "load_weights", "version": version}, ROOT)
        for name, tensor in weights:
            head = {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            self.link.broadcast_json(head, ROOT)
            self.link.broadcast(tensor.contiguous(), ROOT)
        self.link.broadcast_json(None, ROOT)

    def checksums(self) -> list[dict[str, str]]:
        """Returns those that every worker computes of what it holds, on every trainer."""
        self.link.broadcast_json({"command": "checksums"}, ROOT)
        return list(chain.from_iterable(self.link.all_gather_json(None)[self.num_trainers :]))

    def sleep(self) -> None:
        self.link.broadcast_json({"command": "sleep"}, ROOT)

    def wake(self) -> None:
        self.link.broadcast_json({"command": "wake"}, ROOT)

    def close(self) -> None:
        """Lets the workers leave."""
        self.link.broadcast_json({"command": "close"}, ROOT)


def serve(link: Link, generator: Generator, worker: int, num_workers: int, answer: Answer | None = None) -> None:
    """Runs a rollout worker, which obeys the trainers until they close. `answer` is as in ColocatedGenerator."""
    answer = answer or generator.generate
    while True:
        request = link.broadcast_json(None, ROOT)
        match request["command"]:
            case "generate":
                prompts, sampling = asked_by(request)
                mine = answer(prompts[worker::num_workers], sampling)
                link.all_gather_bytes(_packed(mine, prompts, worker, num_workers))
            case "load_weights":
                generator.load_weights(_receive(link), request["version"])
            case "checksums":
                link.all_gather_json(generator.checksums())
            case "sleep":
                generator.sleep()
            case "wake":
                generator.wake()
            case "close":
                generator.close()
                return


def request_of(prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, Any]:
    """Returns what is asked of a generator, as JSON."""
    return {"prompts": [asdict(p) for p in prompts], "sampling": asdict(sampling)}


def asked_by(request: Mapping[str, Any]) -> tuple[list[Prompt], Sampling]:
    """Returns what `request_of` was given."""
    asked = request["sampling"]
    stops = {name: tuple(asked[name]) for name in ("stop_ids", "stop_strings")}
    return [Prompt(**p) for p in request["prompts"]], Sampling(**{**asked, **stops})


def _receive(link: Link) -> Iterator[tuple[str, Tensor]]:
    while (head := link.broadcast_json(None, ROOT)) is not None:
        tensor = torch.empty(head["shape"], dtype=getattr(torch, head["dtype"]), device=link.device)
        yield head["name"], link.broadcast(tensor, ROOT)


def _packed(groups: Sequence[Group], prompts: Sequence[Prompt], rank: int, size: int) -> Tensor:
    """Returns the groups of `prompts[rank::size]` as bytes, under their numbers in `prompts`."""
    return pack({n * size + rank: group for n, group in enumerate(groups)}, [p.ids for p in prompts])


def _merge(parts: Sequence[Tensor], prompts: Sequence[Prompt]) -> list[Group]:
    """Returns the groups of all ranks in the order of the prompts."""
    ids = [p.ids for p in prompts]
    found = {number: group for part in parts for number, group in unpack(part, ids).items()}
    return [found[number] for number in range(len(prompts))]
