"""Muon against torch.optim.Muon, and cut over ranks against one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from llmtrain.config.schema import EngineConfig, ModelConfig, OptimConfig, ParallelConfig
from llmtrain.engine import muon
from llmtrain.engine.muon import newton_schulz
from llmtrain.engine.optim import build_optimizer, state_keys
from llmtrain.engine.zero import ZeroEngine
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.parallel.mesh import Mesh, init_mesh, shutdown
from llmtrain.parallel.placement import Placement
from llmtrain.parallel.plan import parallelize
from llmtrain.types import Batch

SHAPES = {"q": (24, 24), "k": (8, 24), "v": (8, 24), "gate": (40, 24), "down": (24, 40)}


def matrices() -> torch.nn.ParameterDict:
    torch.manual_seed(1)
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()})
    model["norm"] = torch.nn.Parameter(torch.ones(24))
    for name, p in model.items():
        p.placement = Placement(f"layers.0.{name}", tuple(p.shape))
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_equal_to_torch(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch iterates in bf16 always; made to keep fp32 it is the same to rounding."""
    ours, theirs = matrices(), matrices()
    config = OptimConfig(name="muon", lr=0.02, weight_decay=0.1)
    optimizer = build_optimizer(ours, config)
    settings = {"lr": config.lr, "weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon([theirs[name] for name in SHAPES], momentum=config.muon_momentum, **settings)
    monkeypatch.setattr(muon, "_dtype", lambda device: dtype)
    for step in range(3):
        for name in SHAPES:
            ours[name].grad = torch.randn(SHAPES[name]) * 10.0 ** (step - 1)
            theirs[name].grad = ours[name].grad.clone()
        optimizer.step()
        keep = torch.Tensor.clone if dtype == torch.float32 else torch.Tensor.bfloat16
        with mock.patch.object(torch.Tensor, "bfloat16", keep):
            reference.step()
        for name in SHAPES:
            moved = (theirs[name] - matrices()[name]).norm()
            assert (ours[name] - theirs[name]).norm() < tolerance * moved, (step, name)


def test_an_update_by_hand() -> None:
    """Singular values of the orthogonalised gradient are near 1, its vectors are the gradient's own."""
    torch.manual_seed(0)
    gradient = torch.randn(2, 12, 30) * torch.tensor([1e-3, 1e3]).view(2, 1, 1)
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    for matrices in (gradient, gradient.mT):
        found = newton_schulz(matrices)
        assert found.shape == matrices.shape
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.3
    core = u.mT @ newton_schulz(gradient) @ vt.mT
    assert (core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    assert not newton_schulz(torch.zeros(1, 3, 5)).any()  # and no NaN


def test_first_update_has_adamw_size() -> None:
    """0.2 sqrt(max(rows, cols)) of an orthogonal matrix has RMS 0.2, before weight decay."""
    model = matrices()
    before = {name: p.detach().clone() for name, p in model.items()}
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=1.0, weight_decay=0.0))
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    for name in SHAPES:
        assert float((model[name].detach() - before[name]).square().mean().sqrt()) == pytest.approx(0.2, rel=0.25), name


def test_each_expert_is_a_matrix_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update of [experts, rows, columns] is that of as many matrices, in parts or at once; a router is one."""
    torch.manual_seed(3)
    value, gradient = torch.randn(5, 12, 8), [torch.randn(5, 12, 8) for _ in range(3)]
    shapes = {"layers.0.feedforward.experts.up": (5, 12, 8), "layers.0.feedforward.router.weight": (5, 8)}
    config = OptimConfig(name="muon", lr=0.02, weight_decay=0.1)
    for numel in (muon.STACK_NUMEL, 200):  # of all experts together, and two at a time
        monkeypatch.setattr(muon, "STACK_NUMEL", numel)
        whole = torch.nn.ParameterDict({"e": value.clone(), "r": torch.randn(5, 8)})
        for p, (name, shape) in zip(whole.values(), shapes.items(), strict=True):
            p.placement = Placement(name, shape)
        each = torch.nn.ParameterDict({str(i): value[i].clone() for i in range(5)})
        for i, p in enumerate(each.values()):
            p.placement = Placement(f"layers.0.{i}", (12, 8))
        for model in (whole, each):
            model["norm"] = torch.nn.Parameter(torch.ones(8))
            model["norm"].placement = Placement("norm.weight", (8,))
        optimizers = [build_optimizer(model, config) for model in (whole, each)]
        assert [p.muon for p in whole.values()] == [True, True, False]
        for grad in gradient:
            whole["e"].grad, whole["r"].grad = grad.clone(), torch.randn(5, 8)
            for i in range(5):
                each[str(i)].grad = grad[i].clone()
            for optimizer in optimizers:
                optimizer.step()
        assert state_keys(whole["e"]) == ("momentum",) and optimizers[0].state[whole["e"]]["momentum"].shape == (
            5,
            12,
            8,
        )
        assert torch.allclose(whole["e"], torch.stack([each[str(i)] for i in range(5)]), atol=1e-6)
        assert (whole["e"] - value).norm() > 0.1


def test_resume_is_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and both kinds of state, through fragments into a fresh engine and back into one that has gone on."""
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    mesh = init_mesh(ParallelConfig(), None, 60)
    try:
        engine = small_engine(mesh)
        losses = [step(engine) for _ in range(3)]
        saved = {f.address: {k: v.clone() for k, v in f.tensors.items()} for f in engine.fragments()}
        keys = {a.name: set(tensors) - {"weight"} for a, tensors in saved.items()}
        assert keys["layers.0.attention.q.weight"] == {"momentum"}
        assert keys["embed.weight"] == keys["norm.weight"] == {"exp_avg", "exp_avg_sq"}
        further = [step(engine) for _ in range(2)]
        for other in (engine, small_engine(mesh)):
            other.load_fragments(saved.__getitem__, 3)
            assert [step(other) for _ in range(2)] == further
        assert further[-1] < losses[0] - 0.1  # it learns the one batch
    finally:
        shutdown()


def small_engine(mesh: Mesh) -> ZeroEngine:
    config = ModelConfig(num_layers=2, hidden_size=16, ffn_size=24, num_heads=2, num_kv_heads=1, vocab_size=32)
    parallel, settings = ParallelConfig(), EngineConfig(zero_stage=0, precision="fp32")
    shapes = parameter_shapes(config)
    parts = parallelize(config, mesh, parallel, settings)
    optim = OptimConfig(name="muon", lr=0.02, min_lr=0.01, warmup_steps=2)
    source = lambda name: init_tensor(name, shapes[name], config, 0)  # noqa: E731
    return ZeroEngine(parts, source, mesh, parallel, settings, optim, 5)


def step(engine: ZeroEngine) -> float:
    ids = torch.arange(16).view(2, 8)
    batch = Batch(ids, ids + 1, torch.ones(2, 8, dtype=torch.bool), torch.arange(8).expand(2, 8))
    return engine.train_step([batch], token_loss, torch.tensor(16.0)).loss


@pytest.mark.timeout(120)
def test_two_ranks_are_one_process(forked: Callable) -> None:
    """Tensor parallel, replicated, FSDP2 shards of unequal size: weights after 4 updates."""
    check(forked, 2)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_four_ranks_are_one_process(forked: Callable) -> None:
    check(forked, 4)


def check(run: Callable, ranks: int) -> None:
    result = run(ranks, Path(__file__).with_name("muon_worker.py"), str(ranks), timeout_s=100)
    assert result.returncode == 0, result.stdout[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == 4, result.stdout[-3000:]
    for line in lines:
        assert len(line["errors"]) == ranks and max(line["errors"]) < 1e-5, line  # fp32 rounding, in another order
