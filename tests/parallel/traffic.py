"""Counts what collectives move, by axis: below torch, DeepSpeed and our own code, where all of them pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.parallel.mesh import Mesh

KINDS = {  # names of the dispatcher's operations; receives count at their senders
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "send": "send",
}
Key = tuple[str, str]
"""A key is (axis, kind); the axis is a name of `Mesh.groups`, the first of those with the same ranks, or `world`."""


class Traffic(TorchDispatchMode):
    """Counts in `with Traffic(mesh) as traffic: engine.train_step(...)`; then `traffic.bytes["tp", "all_reduce"]`.

    Bytes are those of the whole message: what an all-gather returns, what a reduce-scatter, an all-to-all, an
    all-reduce, a broadcast or a send takes. (A ring moves an all-reduce twice, the others once, less 1/ranks.)
    Groups of one rank move nothing and are left out.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.axes: dict[str, str] = {}
        for name, group in mesh.groups.items():
            if group is not None:
                self.axes.setdefault(group.group_name, name if group.size() > 1 else "")
        self.bytes: dict[Key, int] = defaultdict(int)
        self.calls: dict[Key, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the operation; notes it if it is a collective."""
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        kind = KINDS.get(name.partition(".")[0]) if namespace in ("c10d", "_c10d_functional") else None
        axis = self._axis(args) if kind else ""
        if kind and axis:
            self.bytes[axis, kind] += max(map(_bytes, (*args, out)))
            self.calls[axis, kind] += 1
        return out

    def _axis(self, args: tuple) -> str:
        """Returns the axis of the group among the arguments: an object, or (functional collectives) its name, which
        comes last."""
        boxed = next((a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())), None)
        name = args[-1] if boxed is None else ProcessGroup.unbox(boxed).group_name
        return self.axes.get(name, "world")


def _bytes(value: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(value) if isinstance(x, Tensor))
