"""Implements the engine on DeepSpeed: ZeRO stages 0-3 (arXiv 1910.02054). The only file that imports deepspeed; written
for 0.19.8.

DeepSpeed holds the parameters, the optimizer state and the data-parallel reduction. The microbatch loop, the pipeline
schedule, the denominators and, at ZeRO stage 0, clipping are ours. `docs/architecture.md` says why each odd-looking
line is here; tests/parity holds them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime import compiler
from deepspeed.runtime import engine as runtime_engine
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llmtrain.arch.pipeline import plan_stages
from llmtrain.config.schema import EngineConfig, OptimConfig, ParallelConfig
from llmtrain.engine import zero_state
from llmtrain.engine.auxiliary import buffer_fragments, finish_auxiliary, load_buffers, start_auxiliary
from llmtrain.engine.base import Admit, FragmentReader, LossFn
from llmtrain.engine.clip import clip_gradients, owns
from llmtrain.engine.memory import keep_freed_memory
from llmtrain.engine.movable import Movable
from llmtrain.engine.optim import build_optimizer, learning_rate, set_learning_rate
from llmtrain.engine.precision import LossScaler, compute_dtype
from llmtrain.engine.step import admitted, backward, full_weights, sum_tied_gradients
from llmtrain.engine.tally import Tally, stop_if_not_finite
from llmtrain.model.decoder import Decoder
from llmtrain.model.experts import Experts
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import Pipeline
from llmtrain.parallel.plan import (
    compile_blocks,
    fill_buffers,
    materialize_each,
    parameters_of,
    trained_of,
)
from llmtrain.parallel.scoring import score
from llmtrain.types import Batch, Fragment, Scores, StepStats, WeightSource

EXPERTS = "experts"  # DeepSpeed's name for the ranks with the same experts


def deepspeed_config(engine: EngineConfig, grad_clip: float) -> dict:
    """Returns what DeepSpeed is told. Its own accumulation is 1: one `train_step` is one step."""
    zero: dict = {"stage": engine.zero_stage}
    if engine.offload == "nvme":
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": engine.offload_path}
    elif engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload == "params":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": grad_clip if engine.zero_stage else 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # Muon; tests/parity has tested it
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {
            "enabled": engine.precision in ("bf16", "fp8"),
            "check_grad_overflow": False,
        },  # `train_step` has looked
        "fp16": {"enabled": engine.precision == "fp16", "loss_scale": 1.0},  # the scale is ours, see `train_step`
    }


class Mpu:
    """Tells DeepSpeed its groups.

    Its rank methods answer 1 everywhere, so that DeepSpeed counts a parameter in the gradient norm exactly when
    `param.tensor_model_parallel` is set: `ZeroEngine` sets that on one owner of each piece (DeepSpeed's own rule
    miscounts under pipeline parallelism).
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.mesh.groups["model"]

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.sizes["pp"] * self.mesh.sizes["tp"]

    def get_model_parallel_rank(self) -> int:
        return 1

    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.mesh.sizes["tp"]

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        return self.mesh.groups["tp"]

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.mesh.sizes["pp"]

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:
        return self.mesh.groups["pp"]

    def get_data_parallel_group(self) -> ProcessGroup:
        return self.mesh.groups["grad"]

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.grad_size

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.mesh.groups["grad"])


class ZeroEngine(Movable):
    """Implements engine.base.Engine. `parts` are this rank's pipeline stages, from parallel.plan.parallelize."""

    def __init__(
        self,
        parts: list[Decoder],
        source: WeightSource,
        mesh: Mesh,
        parallel: ParallelConfig,
        config: EngineConfig,
        optim: OptimConfig,
        total_steps: int,
    ) -> None:
        self.parts, self.mesh, self.config, self.optim, self.total_steps = parts, mesh, config, optim, total_steps
        self.device = mesh.device
        self.plan, self.step = plan_stages(parts[0].config, parallel), 0
        self.admit: Admit = stop_if_not_finite
        self.scaler = LossScaler(config)
        check_machine(config, mesh)
        _prepare_deepspeed(mesh, config.zero_stage, parts[0].config.lora is None)
        originals = self._take_in(source)
        model = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, optim, mesh, experts=EXPERTS),
            model_parameters=trained_of(parts),
            mpu=Mpu(mesh),
            config=deepspeed_config(config, optim.grad_clip),
        )
        if mesh.ep > 1:
            zero_state.count_experts(self.engine, mesh)
        if mesh.grad_size == 1 and config.zero_stage in (1, 2) and config.offload == "none":
            zero_state.take_gradients_as_they_are(self.engine)
        if config.precision == "fp32" and config.zero_stage in (1, 2) and config.offload == "none":
            zero_state.masters_are_weights(self.engine)
        zero_state.set_masters(self.engine, originals)
        if mesh.device.type == "cpu":
            keep_freed_memory()
        if config.compile:
            compile_blocks(parts)
        self.pipeline = Pipeline(parts, self.plan, mesh) if mesh.sizes["pp"] > 1 else None

    def train_step(
        self, microbatches: Sequence[Batch], loss: LossFn, denominator: Tensor, position: int | None = None
    ) -> StepStats:
        """See Engine. Raises ValueError at ZeRO stage 0 when an engine was built on another mesh since."""
        self.require_here()
        self._require_own_mesh()
        lr = learning_rate(self.step if position is None else position, self.optim, self.total_steps)
        set_learning_rate(self.engine.optimizer.param_groups, lr)
        tally = Tally(float(denominator))
        # DeepSpeed averages over these ranks, and divides by the loss scale; this undoes both
        scale = self.scaler.scale * self.mesh.grad_size / tally.denominator
        start_auxiliary(self.parts, scale)
        if self.config.precision == "fp16":
            self.engine.optimizer.override_loss_scale(self.scaler.scale)

        def scaled(scores: Scores, batch: Batch, i: int) -> Tensor:
            return tally.add(i, *loss(scores, batch)) * scale

        with self._accumulate():
            backward(self.parts, self.pipeline, self.mesh, microbatches, scaled)
            held = getattr(self.engine.optimizer, "get_gradient_for_reduction", lambda p: p.grad)
            sum_tied_gradients(self.parts, self.mesh, held)
        norm = self._reduce_gradients_stage0()
        broken = tally.reduce(self.mesh, gradient_finite=zero_state.gradients_finite(self.engine))
        if not admitted(self.scaler, tally, broken, self.admit):
            zero_state.drop_gradients(self.engine)
            tally.metrics |= finish_auxiliary(self.parts, self.mesh, tally.denominator, taken=False)
            return StepStats(tally.loss, math.nan, lr, tally.metrics)
        self.engine.step()
        self.step += 1
        tally.metrics |= finish_auxiliary(self.parts, self.mesh, tally.denominator, taken=True)
        norm = float(self.engine.get_global_grad_norm()) if norm is None else norm
        return StepStats(tally.loss, norm, lr, tally.metrics)

    def score(self, microbatches: Sequence[Batch]) -> list[Scores]:
        """See Engine."""
        self.require_here()
        return score(self.parts, self.pipeline, self.mesh, microbatches)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine. Every rank must exhaust it."""
        self.require_here()
        return full_weights(self.parts, self.plan, self.mesh, compute_dtype(self.config.precision), self._gather)

    def fragments(self) -> Iterator[Fragment]:
        """See Engine."""
        self.require_here()
        yield from zero_state.fragments(self.engine, self.mesh)
        yield from buffer_fragments(self.parts, self.mesh)

    def load_fragments(self, read: FragmentReader, step: int) -> None:
        """See Engine."""
        self.require_here()
        zero_state.load(self.engine, self.mesh, read, step)
        load_buffers(self.parts, read)
        self.step = step

    def extra_state(self) -> dict[str, float]:
        """See Engine."""
        return self.scaler.state()

    def load_extra_state(self, state: dict[str, float]) -> None:
        """See Engine."""
        self.scaler.load(state)

    def replicas(self) -> Iterator[tuple[str, str, Tensor]]:
        """See Engine. The pieces of ZeRO stage 3 have no copies over the data-parallel ranks."""
        self.require_here()
        for p in parameters_of(self.parts):
            held = p.ds_tensor if self.config.zero_stage == 3 else p.detach()
            if self.config.zero_stage < 3:
                yield "expert_grad" if p.placement.expert else "grad", p.placement.name, held
            if p.placement.tp_dim is None:
                yield "tp", p.placement.name, held

    def held(self) -> Iterator[Tensor]:
        """See Movable."""
        yield from parameters_of(self.parts)
        yield from zero_state.held(self.engine)

    def scratch(self) -> list[Tensor]:
        """See Movable."""
        return zero_state.scratch(self.engine)

    def _require_own_mesh(self) -> None:
        """Raises ValueError at ZeRO stage 0 when an engine was built on another mesh since. There DeepSpeed asks for
        its groups at every step, and what it asks is the object of the engine that was built last: gradients would be
        summed over other ranks, without a word."""
        if self.config.zero_stage == 0 and groups.mpu.mesh is not self.mesh:
            raise ValueError(
                "engine.zero_stage=0: engines on different meshes of one job need a stage of 1 to 3, or "
                "engine.backend=fsdp; use one of these, or one mesh"
            )

    def _take_in(self, source: WeightSource) -> dict[nn.Parameter, Tensor]:
        """Reads the weights into the modules; at ZeRO stage 3 each is divided among the ranks before the next one is
        read. Returns the fp32 values of what is trained, at ZeRO stage 3 this rank's pieces of them, where DeepSpeed
        gets rounded ones."""
        originals, dtype = {}, compute_dtype(self.config.precision)
        for p in materialize_each(self.parts, self.mesh, source):
            p.tensor_model_parallel = owns(p, self.mesh.coords["tp"])  # who counts it in the norm, see Mpu
            if p.placement.expert:  # reduced over the ranks that have it; the second pair is read at ZeRO stage 3
                p.allreduce, p.group_name = False, EXPERTS
                p.ds_zero_placement_family, p.ds_zero_partition_group_name = "autoep_expert", EXPERTS
            original = p.detach()
            if self.config.zero_stage == 3:
                p.data = original.to(dtype)
                self._divide(p)
                original = zero_state.own_piece(p, original)
            if dtype != torch.float32 and p.requires_grad:
                originals[p] = original
        fill_buffers(self.parts, self.mesh, source)
        return originals

    def _divide(self, p: nn.Parameter) -> None:
        """Divides a parameter among the ranks, as `deepspeed.initialize` does with all parameters at once."""
        deepspeed.zero.Init(
            module=nn.ParameterList([p]),
            data_parallel_group=self.mesh.groups["expert_grad" if p.placement.expert else "grad"],
            config_dict_or_path=deepspeed_config(self.config, self.optim.grad_clip),
            mpu=Mpu(self.mesh),
        )

    def _accumulate(self) -> contextlib.AbstractContextManager:
        """Returns a context in which gradients stay on this rank; at its end they are reduced once. (ZeRO stage 0 has
        no such context.)"""
        return self.engine.coalesce_grad_reduction() if self.config.zero_stage else contextlib.nullcontext()

    def _reduce_gradients_stage0(self) -> float | None:
        """Averages and clips at ZeRO stage 0, where DeepSpeed neither averages by itself nor reports a norm. Returns
        the norm before clipping, None at other ZeRO stages."""
        if self.config.zero_stage:
            return None
        self.engine.allreduce_gradients()
        everything, model = parameters_of(self.parts), self.mesh.groups["model"]
        return clip_gradients(everything, self.optim.grad_clip, self.mesh, model, experts_apart=True)[0]

    def _gather(self, p: nn.Parameter) -> Tensor:
        """Returns a parameter joined from its ZeRO-3 partitions, or else a copy of it as it is."""
        context = deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext()
        with context:
            return p.detach().clone()


def check_machine(config: EngineConfig, mesh: Mesh) -> None:
    """Raises ValueError when this machine lacks what DeepSpeed needs for `config`."""
    if config.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ValueError(
            f"engine.precision=fp16: DeepSpeed finds no fp16 arithmetic on this {mesh.device.type}; use bf16, or "
            "engine.backend=fsdp"
        )
    if config.offload == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "engine.offload=nvme: needs libaio with its headers and a C++ compiler, DeepSpeed builds its disk reader "
            "with them at the first start; install libaio-dev, or use engine.offload=optimizer"
        )


def _import_muon() -> None:
    """Imports DeepSpeed's own Muon with compilation switched off: to ask whether our optimizer is that one DeepSpeed
    imports it, and with it all that compiles."""
    with patch.object(compiler, "compile", lambda: lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def _prepare_deepspeed(mesh: Mesh, zero_stage: int, trains_experts: bool) -> None:
    """Makes the process-wide settings that `initialize` reads."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # its calls, which torch 2.13 warns of every time
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated", FutureWarning)
    _import_muon()
    groups.mpu = None  # an earlier engine of this process
    # The class by which DeepSpeed knows that there are groups of experts; ZeRO stage 3 refuses it, and needs it not.
    runtime_engine.MoE = Experts if mesh.ep > 1 and zero_stage < 3 and trains_experts else type(None)
    groups._EXPERT_PARALLEL_GROUP = {EXPERTS: mesh.groups["ep"]} if mesh.ep > 1 else {}
    groups._EXPERT_DATA_PARALLEL_GROUP = {EXPERTS: mesh.groups["expert_grad"]} if mesh.ep > 1 else {}
    os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher; DeepSpeed insists on it
    if mesh.device.type == "cpu":
        # It would compile a shared-memory collective with g++; a build that is killed leaves a lock that hangs all
        # later runs. gloo does the work.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    if mesh.sizes["pp"] > 1:
        # A debug check over all ranks: pipeline stages, which prefetch different parameters, would wait for ever.
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda *args, **kwargs: None
