"""Checks that attention backends give what sdpa gives, forward on a CPU, with backward on a GPU (marked `gpu`)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import MlaConfig, ModelConfig
from llmtrain.model.attention import attention_mask
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.model.kernels.backends import (
    FLEX_TOKENS,
    Documents,
    attend,
    check_backend,
    documents,
    fastest,
    flex_kernel,
    set_backend,
    usable,
    use_backend,
    visibility,
)
from llmtrain.model.kernels.flex_masks import BLOCK, block_mask, seen_blocks
from llmtrain.model.kernels.sdpa import attention

CPU = torch.device("cpu")
T = 150  # two blocks, the second one not full
SAME = 1e-5  # fp32, another order of sums
WINDOW = 24
Ids = tuple[Tensor | None, Tensor | None, Tensor]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the tracing of each new mask, which flex attention does on a CPU before it computes in plain torch."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def packed(lengths: list[list[int]], width: int) -> Ids:
    """Rows of documents of these lengths, then padding: (segment ids, no branches, positions)."""
    segments, positions = torch.full((len(lengths), width), -1), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, parts in enumerate(lengths):
        at = 0
        for number, length in enumerate(parts):
            segments[row, at : at + length], positions[row, at : at + length] = number, torch.arange(length)
            at += length
        positions[row, at:] = torch.arange(width - at)
    return segments, None, positions


def branched(trunk: int, samples: list[int], width: int) -> Ids:
    """Returns the ids of one group: a trunk and the samples that share it, then padding."""
    segments, branches, positions = torch.full((1, width), -1), *torch.zeros(2, 1, width, dtype=torch.long)
    at = 0
    for branch, length in enumerate([trunk, *samples]):
        part = slice(at, at + length)
        segments[:, part], branches[:, part] = 0, branch
        positions[:, part] = torch.arange(length) + (trunk if branch else 0)
        at += length
    return segments, branches, positions


PACKED = packed([[70, 50, 20], [130, 20]], T)
BRANCHED = branched(40, [30, 60, 10], T)
CAUSAL = (None, None, torch.arange(T).repeat(2, 1))


def heads(rows: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Returns q of 4 heads, k and v of 2."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, width), (2, width), (2, width))
    made = (torch.randn(rows, count, T, size, generator=generator) for count, size in shapes)
    return [x.to(device, dtype) for x in made]


def reference(q: Tensor, k: Tensor, v: Tensor, ids: Ids, window: int | None, softcap: float | None) -> Tensor:
    segments, branches, positions = ids
    segments = torch.zeros_like(positions) if segments is None else segments
    return attention(q, k, v, attention_mask(segments, branches, positions=positions, window=window), softcap)


@pytest.mark.parametrize("ids", [PACKED, BRANCHED, CAUSAL], ids=["packed", "branched", "causal"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (WINDOW, None), (None, 2.0), (WINDOW, 2.0)])
def test_flex_is_sdpa(ids: Ids, window: int | None, softcap: float | None) -> None:
    q, k, v = heads(ids[2].size(0), 16)
    v = v[..., :12]  # values may be narrower than keys
    mask = visibility(*ids, window, ("flex",), softcap is not None)
    out = attend(q, k, v, mask, softcap, flex_kernel(CPU, softcap))
    assert out.shape == (*q.shape[:3], 12)
    assert (out - reference(q, k, v, ids, window, softcap)).abs().max() <= SAME


@st.composite
def rows(draw: st.DrawFn) -> tuple[Ids, int | None]:
    """Draws a width, documents or a group in it, and perhaps a window."""
    width = draw(st.integers(1, 3 * BLOCK + 1))
    cuts = sorted(draw(st.lists(st.integers(0, width), min_size=1, max_size=6)))
    lengths = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
    window = draw(st.none() | st.integers(1, 2 * BLOCK))
    return (branched(lengths[0], lengths[1:], width) if draw(st.booleans()) else packed([lengths], width)), window


@settings(max_examples=40, deadline=None, database=None)
@given(rows())
def test_no_block_is_forgotten_and_whole_ones_are_whole(drawn: tuple[Ids, int | None]) -> None:
    """The kernels look at nothing else (on a CPU flex ignores blocks, so that `test_flex_is_sdpa` would not notice)."""
    (segments, branches, positions), window = drawn
    width = positions.size(1)
    some, every = seen_blocks(segments, branches, positions, window)
    padded = torch.zeros(1, some.size(1) * BLOCK, some.size(1) * BLOCK, dtype=torch.bool)
    padded[:, :width, :width] = attention_mask(segments, branches, positions=positions, window=window)[:, 0]
    tiles = padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    assert not (tiles.any(4).any(2) & ~some).any() and not (every & ~tiles.all(4).all(2)).any()
    assert not (every & ~some).any()


def test_empty_blocks_are_left_out() -> None:
    """Eight documents fill a block each: of 36 blocks below the diagonal 8 are computed."""
    segments, _, positions = packed([[BLOCK] * 8], 8 * BLOCK)
    mask = block_mask(segments, None, positions, None)
    assert mask.kv_num_blocks.tolist() == [[[1] * 8]] and mask.full_kv_num_blocks.sum() == 0
    assert mask.kv_indices[0, 0, :, 0].tolist() == list(range(8)) and mask.shape == (1, 1, 1024, 1024)
    long = block_mask(None, None, torch.arange(8 * BLOCK)[None], None)
    assert long.full_kv_num_blocks.tolist() == [[list(range(8))]]  # below the diagonal no rule is asked
    near = block_mask(None, None, torch.arange(8 * BLOCK)[None], BLOCK)
    assert near.kv_num_blocks.tolist() == [[[1] + [2] * 7]]


def varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: object, **options: object) -> Tensor:
    """Computes flash_attn_varlen_func as it is documented, one sequence at a time. [tokens, heads, head_dim]"""
    (other, longest, longest_k), (left, right) = rest, options["window_size"]
    assert starts.dtype == torch.int32 and other is starts and options["causal"] and right <= 0
    assert longest == longest_k == int(starts.diff().max())
    parts = []
    for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        own = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
        i = torch.arange(b - a)
        seen = (i[:, None] >= i) & ((left == -1) | (i[:, None] - i <= left))
        parts.append(attention(*own, seen[None, None], options["softcap"] or None)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("ids", [PACKED, CAUSAL], ids=["packed", "causal"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (WINDOW, None), (WINDOW, 2.0)])
def test_flash_is_called_as_documented(
    ids: Ids, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents, window and softcap reach the package's function so that it computes what sdpa does."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    q, k, v = heads(2, 16)
    mask = visibility(*ids, window, ("flash",), softcap is not None)
    assert isinstance(mask, Documents)
    assert (attend(q, k, v, mask, softcap) - reference(q, k, v, ids, window, softcap)).abs().max() <= SAME


def test_documents_of_rows() -> None:
    segments, _, positions = packed([[70, 50, 20], [130, 20]], T)
    found = documents(segments, positions, None)
    assert found.starts.tolist() == [0, 70, 120, 140, 150, 280, 300] and found.longest == 130
    whole = documents(None, positions, 5)
    assert whole.starts.tolist() == [0, 150, 300] and (whole.longest, whole.window) == (150, 5)


MODEL = {"num_layers": 2, "hidden_size": 64, "ffn_size": 32, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 61}
SLIDING = {"layer_types": ["sliding", "full"], "sliding_window": WINDOW, "attention_softcap": 5.0}
MLA = {"num_kv_heads": 4, "attention": "mla"}
MLA["mla"] = MlaConfig(q_rank=None, kv_rank=16, nope_head_dim=16, rope_head_dim=8, v_head_dim=16)


def decoder(fields: dict) -> Decoder:
    config = resolve_model(ModelConfig(**{**MODEL, **fields}))
    model = Decoder(config)
    initialize(model, config, seed=0)
    for name, p in model.named_parameters():  # logits of the size of 1
        if p.dim() > 1 and name != "embed.weight":
            p.data *= 5
    return model


@pytest.mark.parametrize("fields", [SLIDING, MLA], ids=["sliding", "latent"])
def test_a_decoder_scores_alike(fields: dict) -> None:
    model = decoder(fields)
    segments, _, positions = PACKED
    ids = torch.randint(61, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids, positions, segments)
        set_backend(model, ("flex",), CPU)
        found = model(ids, positions, segments)
    assert expected.abs().max() > 0.5 and (found - expected).abs().max() <= SAME


@torch.no_grad()
def test_new_masks_need_no_new_graph() -> None:
    """A mask is a new function over new ids in each forward, but a compiler traces it once for each kind of layer."""
    model, counter = decoder(SLIDING), CompileCounter()
    ids = torch.randint(61, (2, T), generator=torch.Generator().manual_seed(1))
    rows = [PACKED, packed([[10, 100, 20], [50, 90]], T)]
    expected = [model(ids, positions, segments) for segments, _, positions in rows]
    set_backend(model, ("flex",), CPU)
    for block in model.layers.values():
        block.compile(backend=counter, fullgraph=True)
    found = [model(ids, positions, segments) for segments, _, positions in rows]
    assert counter.frame_count == 2
    assert all((a - b).abs().max() <= SAME for a, b in zip(found, expected, strict=True))


def test_auto_on_a_cpu_is_sdpa_as_it_was() -> None:
    model = decoder({})
    use_backend(model, "auto", CPU, "bf16")
    assert "visibility" not in vars(model) and "attend" not in vars(model.layers["0"].attention)
    assert usable(model.config, CPU, "bf16") == ("sdpa",)


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ("flex", "engine.attention=flex: its backward is for GPUs only, this is a cpu; set sdpa or auto"),
        ("flash", "engine.attention=flash: it is for GPUs only, this is a cpu; set sdpa or auto"),
    ],
)
def test_refused_on_a_cpu(backend: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}$"):
        use_backend(decoder({}), backend, CPU, "bf16")
    check_backend("sdpa", CPU)


def test_flash_is_refused_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"capability 8\.0 or higher, this is one of 7\.5; set flex"):
        check_backend("flash", torch.device("cuda"))
    check_backend("flex", torch.device("cuda"))


def test_flex_has_no_backward_on_a_cpu() -> None:
    """The missing backward is why flex is refused on a CPU. When this fails, torch has one, and the rule can go."""
    q, k, v = (x.requires_grad_() for x in heads(2, 16))
    mask = visibility(*PACKED, None, ("flex",), False)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        attend(q, k, v, mask, None, flex_kernel(CPU, None))


@pytest.mark.parametrize(
    ("backends", "masked", "branches", "capped", "tokens", "expected"),
    [
        (("sdpa", "flex", "flash"), False, False, False, 4096, "sdpa"),
        (("sdpa", "flex", "flash"), True, False, False, 64, "flash"),
        (("sdpa", "flex", "flash"), False, False, True, 64, "flash"),
        (("sdpa", "flex", "flash"), True, True, False, FLEX_TOKENS, "flex"),
        (("sdpa", "flex", "flash"), True, True, False, FLEX_TOKENS - 1, "sdpa"),
        (("sdpa", "flex"), True, False, False, FLEX_TOKENS, "flex"),
        (("sdpa",), True, False, True, 4096, "sdpa"),
        (("flex",), False, False, False, 64, "flex"),
    ],
)
def test_the_choice_of_auto(
    backends: tuple[str, ...], masked: bool, branches: bool, capped: bool, tokens: int, expected: str
) -> None:
    assert fastest(backends, masked, branches, capped, tokens) == expected


def gpu_cases() -> Iterator[tuple[str, torch.dtype, float]]:
    """Returns the relative error of the whole tensor, forward and each gradient. fp32: sums in another order. bf16
    keeps 8 bits, so both sides lie about 2^-9 from the truth, the backward's several products add up to a few of it."""
    yield "flex", torch.float32, 1e-4
    yield "flex", torch.bfloat16, 2e-2
    yield "flash", torch.bfloat16, 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype", "most"), gpu_cases())
@pytest.mark.parametrize("ids", [PACKED, BRANCHED, CAUSAL], ids=["packed", "branched", "causal"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (WINDOW, None), (WINDOW, 2.0)])
def test_forward_and_backward_on_a_gpu(
    backend: str, dtype: torch.dtype, most: float, ids: Ids, window: int | None, softcap: float | None
) -> None:
    if backend == "flash" and (ids[1] is not None or importlib.util.find_spec("flash_attn") is None):
        pytest.skip("flash-attn is not installed, or the row has branches")
    device = torch.device("cuda")
    ids = tuple(None if x is None else x.to(device) for x in ids)
    inputs = [x.requires_grad_() for x in heads(ids[2].size(0), 64, dtype, "cuda")]
    mask = visibility(*ids, window, (backend,), softcap is not None)
    found = attend(*inputs, mask, softcap, flex_kernel(device, softcap) if backend == "flex" else None)
    # against fp32: sdpa in bf16 has errors of its own
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = reference(*exact, ids, window, softcap)
    grad = torch.randn_like(expected)
    pairs = [(found.float(), expected)]
    pairs += zip(
        torch.autograd.grad(found, inputs, grad.to(dtype)), torch.autograd.grad(expected, exact, grad), strict=True
    )
    for one, other in pairs:
        assert (one.float() - other).norm() <= most * other.norm()
