"""Rematerialisation: the same gradients from fewer bytes, and no matrix product twice unless all is recomputed."""

from __future__ import annotations

import gc
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.parallel.remat import compile_block, remat_blocks
from llmtrain.scaling.activations import kept_activations

MODEL = ModelConfig(num_layers=3, hidden_size=64, ffn_size=192, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=64)
ROWS, WIDTH = 2, 64
LINEARS = 7  # of a block: q, k, v, o, gate, up, down


class Watch(TorchDispatchMode):
    """Bytes of all storages made inside that are still alive, and the number of matrix products."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages, self.products = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = op(*args, **(kwargs or {}))
        self.products += op is torch.ops.aten.mm.default
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.storages[storage] = 0 if storage.data_ptr() in self.weights else storage.nbytes()
        return out

    def live_bytes(self) -> int:
        gc.collect()
        return sum(self.storages.values())


def trained(kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], float, int]:
    """(gradients, bytes a block keeps after the forward, matrix products of the backward).

    Two depths are run, so that what a block keeps stands alone.
    """
    kept = []
    for num_layers in (1, MODEL.num_layers):
        config = MODEL.model_copy(update={"num_layers": num_layers})
        model = Decoder(config)
        initialize(model, config, 0)
        model.to(dtype)
        if kind != "none":
            remat_blocks(model, kind)
        ids = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) % MODEL.vocab_size
        with Watch(model) as watch:
            logits = model(ids, torch.arange(WIDTH).expand(ROWS, WIDTH))
            kept.append(watch.live_bytes())
            watch.products = 0
            logits.float().square().sum().backward()
    block_bytes = (kept[1] - kept[0]) / (MODEL.num_layers - 1)
    return {name: p.grad for name, p in model.named_parameters()}, block_bytes, watch.products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_gradients_from_fewer_bytes(dtype: torch.dtype) -> None:
    plain, selective, full = (trained(kind, dtype) for kind in ("none", "selective", "full"))
    for other in (selective, full):
        for name, gradient in plain[0].items():
            assert torch.equal(gradient, other[0][name]), name
    never = {"is_eager_cpu_fp32": lambda x: False}
    with patch.multiple("llmtrain.model.kernels.eager", **never), patch.multiple("llmtrain.model.rope", **never):
        of_torch = trained("none", dtype)[1]
    assert of_torch > 1.9 * selective[1] > 6 * full[1]
    assert plain[1] < 0.95 * of_torch if dtype == torch.float32 else plain[1] == of_torch  # see model.kernels.eager
    twice = 2 * (LINEARS * MODEL.num_layers + 1)
    assert plain[2] == selective[2] == twice
    assert full[2] == twice + (LINEARS - 1) * MODEL.num_layers  # all but the last product, which nobody reads


def test_the_planner_counts_what_is_kept() -> None:
    """In fp32, with fused attention, whose normalizer is not counted."""
    for kind in ("selective", "full"):
        values = kept_activations(MODEL, 1, True, kind)
        assert trained(kind, torch.float32)[1] == pytest.approx(4 * ROWS * WIDTH * values, rel=0.01), kind


def test_what_is_recomputed_whole_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the recomputation torch would compile nothing, and say nothing."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Decoder(MODEL)
    initialize(model, MODEL, 0)
    remat_blocks(model, "full")
    for block in model.layers.values():
        compile_block(block)
    ids = torch.arange(16).view(2, 8)
    model(ids, torch.arange(8).expand(2, 8)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one for all blocks
    assert not torch._dynamo.utils.counters["graph_break"]
