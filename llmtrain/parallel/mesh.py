"""Assigns every rank its role and its place on the mesh. The only file that creates process groups."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, ProcessGroup, Store
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.arch.mesh import AXES, mesh_sizes
from llmtrain.config.schema import ParallelConfig, RolloutConfig
from llmtrain.parallel.device import rank_device

START_TIMEOUT = timedelta(minutes=30)  # until the trainers have their model


class Link:
    """Provides collectives over all ranks of the job, trainers and rollout workers, beside every role's own default
    group.

    It is a raw process group: an engine whose barriers use the default group never sees the other role.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.store = store = PrefixStore("link", store)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self.group = dist.ProcessGroupGloo(store, rank, size, timeout)

    def broadcast(self, tensor: Tensor, root: int) -> Tensor:
        """Broadcasts `tensor` of rank `root`, in place."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        self.group.broadcast([tensor], options).wait()
        return tensor

    def broadcast_json(self, value: object, root: int) -> object:
        """Returns the JSON value of rank `root`, on every rank."""
        data = _encode(value).to(self.device) if self.rank == root else None
        size = self.broadcast(torch.tensor([0 if data is None else data.numel()], device=self.device), root)
        if data is None:
            data = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        return _decode(self.broadcast(data, root))

    def all_gather_bytes(self, data: Tensor) -> list[Tensor]:
        """Returns the uint8 tensors, of any length, of all ranks."""
        return _all_gather_bytes(data, self.size, self.device, lambda out, x: self.group.allgather([out], [x]).wait())

    def all_gather_json(self, value: object) -> list:
        """Returns the JSON values of all ranks."""
        return [_decode(part) for part in self.all_gather_bytes(_encode(value))]

    def await_trainers(self, event: str, role: str) -> None:
        """Lets workers wait for an event of the trainers, up to START_TIMEOUT: the timeout of a collective, which is
        shorter, runs from its first caller."""
        if role == "trainer":
            self.store.set(event, "1")
        else:
            self.store.wait([event], START_TIMEOUT)


@dataclass
class SideGroup:
    """Exchanges data between ranks of the own role from another thread than the training's: collectives of two threads
    in one group would meet the wrong partners. Over gloo, on GPUs too."""

    rank: int
    size: int
    group: ProcessGroup

    def all_gather_json(self, value: object) -> list:
        """Returns the value of every rank, as `Mesh.all_gather_json` does."""
        return [_decode(part) for part in self.all_gather_bytes(_encode(value))]

    def all_gather_bytes(self, data: Tensor) -> list[Tensor]:
        """Returns the tensor of every rank, as `Mesh.all_gather_bytes` does."""
        return _all_gather_bytes(data, self.size, torch.device("cpu"), partial(dist.all_gather, group=self.group))


@dataclass
class Mesh:
    """Holds this rank's place. `rank` and `size` count the ranks of the own role. `groups` holds a group for each axis,
    and `dp` (dp_replicate x dp_shard: who has other rows), `grad` (dp x cp: over whom gradients are summed), `shard`
    (dp_shard x cp: over whom states are sharded), `ep` (a part of `shard`), `expert_grad` and `expert_shard` (the ranks
    of `grad` and `shard` that have the same experts), `model` (pp x tp), `replica` (all but dp_replicate: who has one
    copy of the whole state together), `ends` (the ranks with the embedding and the head of the own pipeline; None on
    others)."""

    role: str  # trainer | rollout
    rank: int
    size: int
    device: torch.device
    sizes: dict[str, int]
    coords: dict[str, int]
    groups: dict[str, ProcessGroup] = field(default_factory=dict)
    link: Link | None = None
    num_trainers: int = 1
    head_pp: int = 0  # the pp coordinate of the rank with the head
    ep: int = 1  # ranks among which the experts of a layer are divided

    @property
    def dp_size(self) -> int:
        return self.sizes["dp_replicate"] * self.sizes["dp_shard"]

    @property
    def dp_rank(self) -> int:
        return self.coords["dp_replicate"] * self.sizes["dp_shard"] + self.coords["dp_shard"]

    @property
    def grad_size(self) -> int:
        return self.dp_size * self.sizes["cp"]

    @property
    def ep_rank(self) -> int:
        return dist.get_rank(self.groups["ep"]) if self.ep > 1 else 0

    @property
    def has_embedding(self) -> bool:
        return self.coords["pp"] == 0

    @property
    def has_head(self) -> bool:
        return self.coords["pp"] == self.head_pp

    @property
    def tp_group(self) -> ProcessGroup | None:
        """Returns the group of tensor parallelism, None when there is nothing to share."""
        return self.groups["tp"] if self.sizes["tp"] > 1 else None

    def fsdp_mesh(self, experts: bool = False) -> DeviceMesh:
        """Returns the `shard` group as torch's FSDP2 takes it; with copies `dp_replicate` x `shard`. For `experts` it
        is the part that has the same ones."""
        prefix = "expert_" if experts else ""
        shard, device = self.groups[f"{prefix}shard"], self.device.type
        if self.sizes["dp_replicate"] == 1:
            return DeviceMesh.from_group(shard, device)
        groups = [self.groups["dp_replicate"], shard]
        members = dist.get_process_group_ranks(self.groups[f"{prefix}grad"])
        ranks = torch.tensor(members).view(self.sizes["dp_replicate"], -1)
        return DeviceMesh.from_group(groups, device, ranks, mesh_dim_names=("dp_replicate", "shard"))

    def barrier(self) -> None:
        """Waits for all ranks of the own role."""
        dist.barrier()

    def all_gather_bytes(self, data: Tensor) -> list[Tensor]:
        """Returns the uint8 tensors, of any length, of all ranks of the own role."""
        return _all_gather_bytes(data, self.size, self.device, dist.all_gather)

    def all_gather_json(self, value: object) -> list:
        """Returns the JSON values of all ranks of the own role. Floats survive exactly."""
        return [_decode(part) for part in self.all_gather_bytes(_encode(value))]

    def side_group(self, timeout_s: int, ranks: Sequence[int] | None = None) -> SideGroup:
        """Returns a new group of these ranks of the own role, None = of all, in which they are counted from 0 (a
        collective of all); of use to its members alone."""
        members = list(range(self.size)) if ranks is None else list(ranks)
        group = dist.new_group(members, backend="gloo", timeout=timedelta(seconds=timeout_s))
        return SideGroup(members.index(self.rank) if self.rank in members else -1, len(members), group)

    def leaders(self) -> list[int]:
        """Returns the first rank of each machine, as the launcher numbers those of a machine (LOCAL_RANK), of the own
        role (a collective). Rank 0 is always one."""
        local = self.all_gather_json(int(os.environ.get("LOCAL_RANK", "0")))
        return [rank for rank, number in enumerate(local) if number == 0 or rank == 0]

    def table(self) -> str:
        """Returns one line a rank, for the log at start."""
        rows = [f"{'rank':>5} {'role':8} " + " ".join(f"{axis:>12}" for axis in AXES)]
        for rank in range(self.num_trainers):
            coords = _coords(rank, self.sizes)
            rows.append(f"{rank:>5} {'trainer':8} " + " ".join(f"{coords[axis]:>12}" for axis in AXES))
        total = self.link.size if self.link else self.size
        rows += [f"{rank:>5} rollout" for rank in range(self.num_trainers, total)]
        return "\n".join(rows)


def init_mesh(parallel: ParallelConfig, rollout: RolloutConfig | None, timeout_s: int) -> Mesh:
    """Joins the job: roles, default group, axes. `rollout` is given only for recipes that sample.

    Raises ValueError when the ranks do not fit the mesh.
    """
    timeout = timedelta(seconds=timeout_s)
    device = rank_device()
    store, rank, size = _rendezvous(timeout)
    workers = rollout.workers if rollout is not None and rollout.placement == "separate" else 0
    num_trainers = size - workers
    sizes = mesh_sizes(parallel, num_trainers)
    role = "trainer" if rank < num_trainers else "rollout"
    role_rank, role_size = (rank, num_trainers) if role == "trainer" else (rank - num_trainers, workers)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(role, store),
        rank=role_rank,
        world_size=role_size,
        timeout=timeout,
    )
    link = Link(store, rank, size, timeout, device) if workers else None
    if role == "trainer":
        return trainer_mesh(sizes, device, timeout, link, parallel.schedule, parallel.ep)
    coords = dict.fromkeys(AXES, 0)
    return Mesh(role, role_rank, role_size, device, sizes, coords, link=link, num_trainers=num_trainers)


def trainer_mesh(
    sizes: dict[str, int],
    device: torch.device,
    timeout: timedelta,
    link: Link | None = None,
    schedule: str = "1f1b",
    ep: int = 1,
) -> Mesh:
    """Returns the mesh over the default group's ranks (a collective)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    head_pp = 0 if schedule == "zbv" else sizes["pp"] - 1
    groups = _axis_groups(sizes, rank, size, head_pp, ep, timeout)
    return Mesh("trainer", rank, size, device, sizes, _coords(rank, sizes), groups, link, size, head_pp, ep)


def shutdown() -> None:
    """Leaves the job in order."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _rendezvous(timeout: timedelta) -> tuple[Store, int, int]:
    """Returns store, rank and size: the launcher's, or those of a job of one process that opens no socket."""
    if "RANK" not in os.environ:
        return HashStore(), 0, 1
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: nothing listens on a public interface
    store, rank, size = _launcher_store(timeout)
    # The agent's store keeps the keys of the attempt before a restart.
    return PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store), rank, size


def _launcher_store(timeout: timedelta) -> tuple[Store, int, int]:
    """Raises ValueError when another program listens where rank 0 must, RuntimeError when nobody answers there."""
    try:
        return next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        place = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}"
        words = " ".join(str(error).split())
        if "EADDRINUSE" in words:
            raise ValueError(f"{place}: the port is taken on this machine; set a free one, on all ranks") from None
        raise RuntimeError(f"{place}: rank 0 does not answer there: {words[:200]}") from None


def _coords(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    coords = {}
    for axis in reversed(AXES):
        rank, coords[axis] = divmod(rank, sizes[axis])
    return coords


def _axis_groups(
    sizes: dict[str, int], rank: int, num_trainers: int, head_pp: int, ep: int, timeout: timedelta
) -> dict[str, ProcessGroup | None]:
    """Returns the groups of this rank. Each is created by its members alone, so a start costs the same on any number of
    ranks; axes with the same ranks share one."""
    varying = {axis: (axis,) for axis in AXES}
    varying |= {"dp": ("dp_replicate", "dp_shard"), "grad": ("dp_replicate", "dp_shard", "cp")}
    varying |= {"shard": ("dp_shard", "cp"), "model": ("pp", "tp"), "replica": ("pp", "dp_shard", "cp", "tp")}
    members = {name: _neighbours(sizes, rank, num_trainers, axes) for name, axes in varying.items()}
    members["ep"] = expert_ranks(members["shard"], rank, ep)
    own = members["shard"].index(rank) % ep
    members["expert_shard"] = members["shard"][own::ep]
    members["expert_grad"] = members["grad"][own::ep]
    made: dict[tuple[int, ...], ProcessGroup] = {}
    for ranks in members.values():
        if tuple(ranks) not in made:
            made[tuple(ranks)] = dist.new_group(ranks, timeout, use_local_synchronization=True)
    groups = {name: made[tuple(ranks)] for name, ranks in members.items()}
    ends = [r for r in members["pp"] if _coords(r, sizes)["pp"] in (0, head_pp)]
    # A rank between the ends makes one for itself: torch's name of a group holds how many its rank has made before.
    group = dist.new_group(ends if rank in ends else [rank], timeout, use_local_synchronization=True)
    return groups | {"ends": group if rank in ends else None}


def expert_ranks(shard: list[int], rank: int, ep: int) -> list[int]:
    """Returns the `ep` neighbours in the shard group among which a layer's experts are divided."""
    assert len(shard) % ep == 0, f"ep={ep} over {len(shard)} ranks"
    first = shard.index(rank) // ep * ep
    return shard[first : first + ep]


def _neighbours(sizes: dict[str, int], rank: int, num_trainers: int, axes: tuple[str, ...]) -> list[int]:
    """Returns the ranks that differ from `rank` only in `axes`, itself among them."""
    here = _coords(rank, sizes)
    fixed = [axis for axis in AXES if axis not in axes]
    everyone = ((r, _coords(r, sizes)) for r in range(num_trainers))
    return [r for r, coords in everyone if all(coords[axis] == here[axis] for axis in fixed)]


def _all_gather_bytes(
    data: Tensor, size: int, device: torch.device, all_gather: Callable[[list[Tensor], Tensor], None]
) -> list[Tensor]:
    counts = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(size)]
    all_gather(counts, torch.tensor([data.numel()], device=device))
    width = max(int(count) for count in counts)
    padded = torch.zeros(width, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data.to(device)
    parts = [torch.empty_like(padded) for _ in range(size)]
    all_gather(parts, padded)
    return [part[: int(count)].cpu() for part, count in zip(parts, counts, strict=True)]


def _encode(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: Tensor) -> object:
    return json.loads(bytes(data.cpu().numpy()))
