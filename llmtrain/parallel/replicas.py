"""Checks that ranks that should hold the same weights hold the same bits: a flipped bit raises no error by itself."""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.parallel.mesh import Mesh

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # element size -> integer type of that size
CHUNK = 2**20  # elements converted to 64 bits at a time
FACTOR = 6364136223846793005  # odd: no chunk's difference is lost (Knuth's multiplier)

Finding = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A finding is (parameter, ranks whose bits differ from most, all ranks compared); without a majority all differ."""


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Returns a checksum of the bits of a tensor, int64 [], on its device.

    It is a sum weighted by position, modulo 2^64, so exact in any order. The weights are odd: one flipped bit, or one
    changed element, always changes it.
    """
    words = tensor.detach().contiguous().flatten().view(WORDS[tensor.element_size()])
    weights = torch.arange(1, 2 * min(CHUNK, words.numel()) + 1, 2, device=tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in words.split(CHUNK) if words.numel() else ():
        total = total * FACTOR + (chunk * weights[: chunk.numel()]).sum()
    return total


def differing(replicas: Iterable[tuple[str, str, Tensor]], mesh: Mesh) -> list[str]:
    """Returns a line for each parameter (`Engine.replicas`) with a bit that differs within its group, naming ranks and
    hosts.

    The lines are equal on all trainers; a collective of them. The majority decides who is wrong; without one, as with
    two copies, all are named.
    """
    sums: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
    for group, name, tensor in replicas:
        if dist.get_world_size(mesh.groups[group]) > 1:
            sums[group].append((name, checksum(tensor)))
    found = [finding for group, each in sums.items() for finding in _compare(each, mesh, group)]
    reports = mesh.all_gather_json([socket.gethostname(), found])
    hosts = [host for host, _ in reports]
    distinct = dict.fromkeys((name, tuple(odd), tuple(ranks)) for _, rows in reports for name, odd, ranks in rows)
    return [_describe(finding, hosts) for finding in distinct]


def _compare(sums: list[tuple[str, Tensor]], mesh: Mesh, group: str) -> list[Finding]:
    members = mesh.groups[group]
    own = torch.stack([value for _, value in sums])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(members))]
    dist.all_gather(parts, own, group=members)
    columns = torch.stack(parts, dim=1).tolist()
    ranks = tuple(dist.get_process_group_ranks(members))
    return [
        (name, tuple(ranks[i] for i in odd_ones(column)), ranks)
        for (name, _), column in zip(sums, columns, strict=True)
        if len(set(column)) > 1
    ]


def odd_ones(values: list[int]) -> list[int]:
    """Returns the positions that differ from the majority; all, where no value has more than half. [7, 7, 5] -> [2]."""
    value, count = Counter(values).most_common(1)[0]
    return [i for i, v in enumerate(values) if v != value or 2 * count <= len(values)]


def _describe(finding: Finding, hosts: list[str]) -> str:
    name, odd, ranks = finding
    named = ", ".join(f"{rank} ({hosts[rank]})" for rank in odd)
    if len(odd) < len(ranks):
        return f"rank {named}: other bits of {name} than most of its {len(ranks)} copies"
    return f"ranks {named}: different bits of {name}, which should be equal, and no majority says which is wrong"
