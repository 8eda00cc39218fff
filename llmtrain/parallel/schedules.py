"""Builds schedules of torch.distributed.pipelining over the pipeline stages of one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti

from llmtrain.arch.pipeline import StagePlan
from llmtrain.model.router import Router
from llmtrain.parallel.mesh import Mesh

Schedule = Schedule1F1B | PipelineScheduleMulti

SCHEDULES = {
    "1f1b": Schedule1F1B,  # arXiv 2104.04473, section 2.2.1
    "interleaved_1f1b": ScheduleInterleaved1F1B,  # section 2.2.2
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,  # arXiv 2401.10241, section 2
    "zbv": ScheduleZBVZeroBubble,  # section 6
}


class PipelinePart(PipelineStage):
    """Wraps a pipeline stage of torch and discards routing counts of the shape inference.

    Before the first step torch infers shapes from a forward and backward on made-up values, in which routers count
    loads.
    """

    def _post_metadata_inference_cleanup(self) -> None:
        super()._post_metadata_inference_cleanup()
        for module in self.submod.modules():
            if isinstance(module, Router):
                module.counts.reset()


def make_schedule(
    parts: Mapping[int, nn.Module],
    plan: StagePlan,
    mesh: Mesh,
    microbatches: int,
    loss: Callable[[tuple[Tensor, Tensor], Tensor], Tensor],
) -> Schedule:
    """Returns the schedule of `parts`, this rank's pipeline stages by number.

    `loss` is called with (output of the head, number of the microbatch).
    """
    stages = [
        PipelinePart(part, stage, len(plan.layers), mesh.device, group=mesh.groups["pp"])
        for stage, part in parts.items()
    ]
    stage_or_stages = stages[0] if plan.schedule == "1f1b" else stages
    return SCHEDULES[plan.schedule](stage_or_stages, microbatches, loss_fn=loss, scale_grads=False)
