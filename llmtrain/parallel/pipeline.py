"""Implements pipeline parallelism: cuts the decoder into pipeline stages and runs microbatches through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.arch.pipeline import StagePlan
from llmtrain.parallel.mesh import Mesh
from llmtrain.types import Batch

if TYPE_CHECKING:
    from llmtrain.parallel.schedules import Schedule

Output = Tensor | tuple[Tensor, ...]
"""A head gives a tensor of values [B, T], or what `model.heads.LMHead` lists: (log-probs, entropies, ...)."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of hidden states, by their number in a header


def keep_stage(model: nn.Module, plan: StagePlan, stage: int) -> None:
    """Deletes the modules of other pipeline stages, in place; names stay global. A tied head becomes a second copy."""
    if len(plan.layers) == 1:
        return
    if model.head.weight is model.embed.weight:
        copy = torch.empty_like(model.embed.weight)
        model.head.weight = nn.Parameter(copy, requires_grad=model.embed.weight.requires_grad)
    if stage > 0:
        model.embed = model.position_embed = None
    if stage < len(plan.layers) - 1:
        model.norm = model.head = None
    model.layers = nn.ModuleDict({str(i): model.layers[str(i)] for i in plan.layers[stage]})


def inputs_of(batch: Batch, has_head: bool, scaled: bool | None = None) -> dict[str, Tensor | int]:
    """Returns the keyword arguments of Decoder.forward for a pipeline stage.

    `scaled` says whether to pass the temperature (None: if it is not 1).
    """
    assert (batch.ends is None) == (batch.branch_ids is None), "samples that share tokens have both"
    names = ["positions", "segment_ids", "ends", "experts"] + (["labels", "candidates"] if has_head else [])
    kwargs: dict[str, Tensor | int] = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
    if has_head and (batch.temperature != 1.0 if scaled is None else scaled):
        kwargs["temperature"] = torch.full_like(batch.positions[:, 0], batch.temperature, dtype=torch.float32)
    if has_head and batch.top_k:
        kwargs["top_k"] = batch.top_k
    return kwargs


class Pipeline:
    """Runs microbatches through the pipeline stages. `parts` are this rank's pipeline stages, in ascending order.

    Training follows a schedule of torch; scoring passes all microbatches through one pipeline stage after the other.
    """

    def __init__(self, parts: Sequence[nn.Module], plan: StagePlan, mesh: Mesh) -> None:
        self.plan, self.mesh, self.group = plan, mesh, mesh.groups["pp"]
        self.rank = mesh.coords["pp"]
        self.parts = dict(zip(plan.stages_of(self.rank), parts, strict=True))
        self.schedule: tuple[tuple, Schedule] | None = None
        self.loss: Callable[[Output, int], Tensor] | None = None

    def train(self, batches: Sequence[Batch], loss: Callable[[Output, int], Tensor]) -> None:
        """Runs forward and backward; on the rank with the head `loss(scores, i)` is called for microbatch i."""
        self.loss = loss
        scaled = any(b.temperature != 1.0 for b in batches)
        assert not any(b.top_k for b in batches), "the likeliest tokens are asked for in scoring"
        each = [inputs_of(b, self.mesh.has_head, scaled) for b in batches]
        assert all(e.keys() == each[0].keys() for e in each), "microbatches of one step have the same fields"
        kwargs = {name: torch.cat([e[name] for e in each]) for name in each[0]}  # for every pipeline stage of the rank
        args = [torch.cat([b.input_ids for b in batches])] if self.mesh.has_embedding else []
        last = {"target": torch.arange(len(batches)), "losses": []} if self.mesh.has_head else {}
        self._schedule(batches).step(*args, **kwargs, **last, return_outputs=False)

    def release(self) -> None:
        """Frees the schedule with its buffers for hidden states, and what the last step's loss refers to; on all ranks
        alike. The next step makes a new one."""
        self.schedule = self.loss = None

    def _schedule(self, batches: Sequence[Batch]) -> Schedule:
        """Returns a schedule for this number and shape of microbatches, which fix its buffers; the last one is
        cached."""
        key = (len(batches), tuple(batches[0].input_ids.shape))
        if self.schedule is None or self.schedule[0] != key:
            from llmtrain.parallel.schedules import make_schedule  # torch's pipelining imports its compiler: 2 s

            made = make_schedule(self.parts, self.plan, self.mesh, len(batches), lambda out, i: self.loss(out, int(i)))
            self.schedule = (key, made)
        return self.schedule[1]

    @torch.no_grad()
    def score(self, batches: Sequence[Batch]) -> list[Output] | None:
        """Returns the outputs of the last pipeline stage, None on ranks without it."""
        outputs: list = []
        sending: list[tuple[dist.Work, Tensor]] = []  # the tensors must live until they are sent
        for stage, part in self.parts.items():
            arriving = self._inputs(stage, batches, outputs)
            outputs = []
            for batch, x in zip(batches, arriving, strict=True):
                outputs.append(part(x, **inputs_of(batch, self.mesh.has_head)))
                sending += self._send(stage, outputs[-1], first=len(outputs) == 1)
        for work, _ in sending:
            work.wait()
        return outputs if self.mesh.has_head else None

    def _inputs(self, stage: int, batches: Sequence[Batch], own: Sequence[Tensor]) -> Iterator[Tensor]:
        """Returns the pipeline stage's input for each microbatch; `own` are the outputs of this rank's previous
        pipeline stage."""
        if stage == 0:
            return iter([b.input_ids for b in batches])
        source = self.plan.rank_of(stage - 1)
        return iter(own) if source == self.rank else self._receive(source, len(batches))

    def _receive(self, source: int, count: int) -> Iterator[Tensor]:
        """Yields the tensors that another rank sends.

        All receives are posted first, in the order of the sends: on a pair of ranks that sends in both directions NCCL
        runs one operation after the other.
        """
        header = torch.empty(4, dtype=torch.int64, device=self.mesh.device)
        dist.recv(header, group=self.group, group_src=source)
        *shape, dtype = header.tolist()
        buffers = [torch.empty(shape, dtype=DTYPES[dtype], device=self.mesh.device) for _ in range(count)]
        works = [dist.irecv(buffer, group=self.group, group_src=source) for buffer in buffers]
        for work, buffer in zip(works, buffers, strict=True):
            work.wait()
            yield buffer

    def _send(self, stage: int, x: Tensor | Output, first: bool) -> list[tuple[dist.Work, Tensor]]:
        """Sends to the next pipeline stage, if another rank has it; shape and dtype precede the first microbatch."""
        if stage == len(self.plan.layers) - 1 or (target := self.plan.rank_of(stage + 1)) == self.rank:
            return []
        header = torch.tensor([*x.shape, DTYPES.index(x.dtype)], device=x.device)
        tensors = [header, x.contiguous()] if first else [x.contiguous()]
        return [(dist.isend(tensor, group=self.group, group_dst=target), tensor) for tensor in tensors]
