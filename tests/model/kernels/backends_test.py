"""Checks that attention backends give what sdpa gives, forward on a CPU, with backward on a GPU (marked `gpu`)."""

from __future__ import annotations

import importlib.util
import itertools
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
from llmtrain.model.kernels import backends
from llmtrain.model.kernels.backends import (
    FLEX_TOKENS,
    TILE_TOKENS,
    Documents,
    Kernels,
    attend,
    check_backend,
    documents,
    fastest,
    flex_kernel,
    kernels_of,
    make_kernels,
    set_kernels,
    visibility,
)
from llmtrain.model.kernels.flex_masks import BLOCK, block_mask, seen_blocks
from llmtrain.model.kernels.sdpa import attention
from llmtrain.model.kernels.tile_plan import Tiles
from llmtrain.parallel.zigzag import places, spans

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
    """Rows of documents of these lengths, then padding: (segment ids, no ends, positions)."""
    segments, positions = torch.full((len(lengths), width), -1), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, parts in enumerate(lengths):
        at = 0
        for number, length in enumerate(parts):
            segments[row, at : at + length], positions[row, at : at + length] = number, torch.arange(length)
            at += length
        positions[row, at:] = torch.arange(width - at)
    return segments, None, positions


def treed(nodes: list[tuple[int, int]], width: int) -> Ids:
    """Returns (segment ids, ends, positions) of a tree, then padding; `nodes`: (depth, tokens) of each, depth first."""
    segments, ends, positions = torch.full((1, width), -1), *torch.full((2, 1, width), width)
    starts, tokens = [0], {}  # tokens up to the end of the last node of each depth
    for depth, length in nodes:
        part = slice(starts[-1], starts[-1] + length)
        before = tokens.get(depth - 1, 0)
        segments[:, part], positions[:, part] = 0, torch.arange(before, before + length)
        tokens[depth] = before + length
        starts.append(part.stop)
    for i, (depth, _) in enumerate(nodes):
        stop = next((j for j in range(i + 1, len(nodes)) if nodes[j][0] <= depth), len(nodes))
        ends[:, starts[i] : starts[i + 1]] = starts[stop]
    positions[:, starts[-1] :] = 0
    return segments, ends, positions


def branched(trunk: int, samples: list[int], width: int) -> Ids:
    """Returns those of one group: a trunk and the samples that share it, then padding."""
    return treed([(0, trunk), *((1, length) for length in samples)], width)


PACKED = packed([[70, 50, 20], [130, 20]], T)
BRANCHED = branched(40, [30, 60, 10], T)
TREED = treed([(0, 40), (1, 10), (2, 9), (2, 21), (3, 5), (1, 40), (2, 1), (1, 14)], T)
CAUSAL = (None, None, torch.arange(T).repeat(2, 1))


def only(backend: str, softcap: float | None = None, device: torch.device = CPU) -> Kernels:
    flex = flex_kernel(device, softcap) if backend == "flex" else None
    return Kernels((backend,), softcap, softcap is not None, flex)


def heads(rows: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Returns q of 4 heads, k and v of 2."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, width), (2, width), (2, width))
    made = (torch.randn(rows, count, T, size, generator=generator) for count, size in shapes)
    return [x.to(device, dtype) for x in made]


def reference(q: Tensor, k: Tensor, v: Tensor, ids: Ids, window: int | None, softcap: float | None) -> Tensor:
    segments, ends, positions = ids
    segments = torch.zeros_like(positions) if segments is None else segments
    return attention(q, k, v, attention_mask(segments, ends, positions=positions, window=window), softcap)


@pytest.mark.parametrize("ids", [PACKED, TREED, CAUSAL], ids=["packed", "tree", "causal"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (WINDOW, None), (None, 2.0), (WINDOW, 2.0)])
def test_flex_is_sdpa(ids: Ids, window: int | None, softcap: float | None) -> None:
    q, k, v = heads(ids[2].size(0), 16)
    v = v[..., :12]  # values may be narrower than keys
    kernels = only("flex", softcap)
    out = attend(q, k, v, visibility(*ids, window, kernels), kernels)
    expected = reference(q, k, v, ids, window, softcap)
    assert out.shape == (*q.shape[:3], 12)
    assert (out - expected).abs().max() <= SAME
    mask = visibility(*ids, window, kernels, spans(0, 2, T // 2 - 1))  # of some of the queries
    asked = places(0, 2, T // 2 - 1, CPU)
    assert (attend(q[:, :, asked], k, v, mask, kernels) - expected[:, :, asked]).abs().max() <= SAME


def drawn_nodes(draw: st.DrawFn, lengths: list[int]) -> list[tuple[int, int]]:
    """Draws the depths of the nodes of a tree: each is a child of the one before, or of one above that."""
    depths = [0]
    for _ in lengths[1:]:
        depths.append(draw(st.integers(1, depths[-1] + 1)))
    return list(zip(depths, lengths, strict=True))


@st.composite
def rows(draw: st.DrawFn) -> tuple[Ids, int | None]:
    """Draws a width, documents or a tree in it, and perhaps a window."""
    width = draw(st.integers(1, 3 * BLOCK + 1))
    cuts = sorted(draw(st.lists(st.integers(0, width), min_size=1, max_size=6)))
    lengths = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
    window = draw(st.none() | st.integers(1, 2 * BLOCK))
    return (treed(drawn_nodes(draw, lengths), width) if draw(st.booleans()) else packed([lengths], width)), window


@settings(max_examples=40, deadline=None, database=None)
@given(rows(), st.booleans())
def test_no_block_is_forgotten_and_whole_ones_are_whole(drawn: tuple[Ids, int | None], part: bool) -> None:
    """The kernels look at nothing else (on a CPU flex ignores blocks, so that `test_flex_is_sdpa` would not notice)."""
    (segments, ends, positions), window = drawn
    width = positions.size(1)
    queries = torch.arange(width)[width // 3 :: 2] if part else None
    some, every = seen_blocks(segments, ends, positions, window, queries)
    mask = attention_mask(segments, ends, queries, positions=positions, window=window)[:, 0]
    padded = torch.zeros(1, some.size(1) * BLOCK, some.size(2) * BLOCK, dtype=torch.bool)
    padded[:, : mask.size(1), :width] = mask
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
    (key_starts, longest, longest_k), (left, right) = rest, options["window_size"]
    assert starts.dtype == key_starts.dtype == torch.int32 and options["causal"] and right <= 0
    assert (longest, longest_k) == (int(starts.diff().max()), int(key_starts.diff().max()))
    parts, bounds = [], (starts.tolist(), key_starts.tolist())
    for (a, c), (b, d) in itertools.pairwise(zip(*bounds, strict=True)):
        own = [x[start:stop].transpose(0, 1)[None] for x, start, stop in ((q, a, b), (k, c, d), (v, c, d))]
        i, j = torch.arange(d - c - (b - a), d - c), torch.arange(d - c)  # the last query sees the last key
        seen = (i[:, None] >= j) & ((left == -1) | (i[:, None] - j <= left))
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
    kernels = only("flash", softcap)
    mask, expected = visibility(*ids, window, kernels), reference(q, k, v, ids, window, softcap)
    assert isinstance(mask, Documents)
    assert (attend(q, k, v, mask, kernels) - expected).abs().max() <= SAME
    for rank in range(3):  # some of the queries
        mask, asked = visibility(*ids, window, kernels, spans(rank, 3, T // 3)), places(rank, 3, T // 3, CPU)
        assert (attend(q[:, :, asked], k, v, mask, kernels) - expected[:, :, asked]).abs().max() <= SAME


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
        set_kernels(model, make_kernels(model.config, ("flex",), CPU))
        found = model(ids, positions, segments)
    assert expected.abs().max() > 0.5 and (found - expected).abs().max() <= SAME


@torch.no_grad()
def test_new_masks_need_no_new_graph() -> None:
    """A mask is a new function over new ids in each forward, but a compiler traces it once for each kind of layer."""
    torch._dynamo.reset()  # graphs of other tests in this process count towards the compiler's limit for a block
    model, counter = decoder(SLIDING), CompileCounter()
    ids = torch.randint(61, (2, T), generator=torch.Generator().manual_seed(1))
    rows = [PACKED, packed([[10, 100, 20], [50, 90]], T)]
    expected = [model(ids, positions, segments) for segments, _, positions in rows]
    set_kernels(model, make_kernels(model.config, ("flex",), CPU))
    for block in model.layers.values():
        block.compile(backend=counter, fullgraph=True)
    found = [model(ids, positions, segments) for segments, _, positions in rows]
    assert counter.frame_count == 2
    assert all((a - b).abs().max() <= SAME for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("fields", [{}, SLIDING, MLA], ids=["plain", "sliding", "latent"])
def test_short_rows_on_a_cpu_are_computed_as_a_decoder_does(backend: str, fields: dict) -> None:
    model = decoder(fields)
    ids = torch.randint(61, (2, T), generator=torch.Generator().manual_seed(1))
    expected = [model(ids, given[2], given[0]) for given in (PACKED, CAUSAL)]
    set_kernels(model, kernels_of(model.config, backend, CPU, "bf16"))
    found = [model(ids, given[2], given[0]) for given in (PACKED, CAUSAL)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("fields", [{}, SLIDING, MLA], ids=["plain", "sliding", "latent"])
def test_long_rows_on_a_cpu_are_computed_by_tiles(fields: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter's gradient; tokens of padding have other states, which nobody reads."""
    model = decoder(fields)
    ids = torch.randint(61, (2, T), generator=torch.Generator().manual_seed(1))
    real = torch.tensor([140, 130])[:, None] > torch.arange(T)
    segments, _, positions = packed([[70, 50, 20], [130]], T)
    results = []
    for least in (T + 1, T):
        monkeypatch.setattr(backends, "TILE_TOKENS", least)
        set_kernels(model, kernels_of(model.config, "auto", CPU, "fp32"))
        masks = [view.mask for view in model.views(torch.float32, positions, segments, None, None).values()]
        assert all(isinstance(mask, Tiles) == (least == T) for mask in masks)
        out = model(ids, positions, segments)[real]
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= SAME * expected.norm()


def test_rows_of_tiles_need_no_new_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TILE_TOKENS", T)
    model, counter = decoder({}), CompileCounter()
    set_kernels(model, kernels_of(model.config, "auto", CPU, "fp32"))
    block = model.layers["0"]
    block.compile(backend=counter)
    ids = torch.randint(61, (2, T), generator=torch.Generator().manual_seed(1))
    graphs = []
    for lengths in ([[70, 50, 20], [130]], [[10, 100, 20], [50, 90]], [[1] * 90, [7, 8]]):
        segments, _, positions = packed(lengths, T)
        model(ids, positions, segments).sum().backward()
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] == graphs[2]


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ("flex", "engine.attention=flex: its backward is for GPUs only, this is a cpu; set sdpa or auto"),
        ("flash", "engine.attention=flash: it is for GPUs only, this is a cpu; set sdpa or auto"),
    ],
)
def test_refused_on_a_cpu(backend: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}$"):
        kernels_of(decoder({}).config, backend, CPU, "bf16")
    check_backend("sdpa", CPU)


def test_flash_is_refused_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"capability 8\.0 or higher, this is one of 7\.5; set flex"):
        check_backend("flash", torch.device("cuda"))
    check_backend("flex", torch.device("cuda"))


def test_flex_has_no_backward_on_a_cpu() -> None:
    """The missing backward is why flex is refused on a CPU. When this fails, torch has one, and the rule can go."""
    q, k, v = (x.requires_grad_() for x in heads(2, 16))
    kernels = only("flex")
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        attend(q, k, v, visibility(*PACKED, None, kernels), kernels)


@pytest.mark.parametrize(
    ("names", "masked", "branches", "unfused", "tokens", "expected"),
    [
        (("sdpa", "flex", "flash"), False, False, False, 4096, "sdpa"),
        (("sdpa", "flex", "flash"), True, False, False, 64, "flash"),
        (("sdpa", "flex", "flash"), False, False, True, 64, "flash"),
        (("sdpa", "flex", "flash"), True, True, False, FLEX_TOKENS, "flex"),
        (("sdpa", "flex", "flash"), True, True, False, FLEX_TOKENS - 1, "sdpa"),
        (("sdpa", "flex"), True, False, False, FLEX_TOKENS, "flex"),
        (("sdpa",), True, False, True, 4096, "sdpa"),
        (("sdpa", "tiles"), True, False, False, TILE_TOKENS - 1, "sdpa"),
        (("sdpa", "tiles"), True, True, False, TILE_TOKENS, "tiles"),
        (("sdpa", "tiles"), False, False, False, TILE_TOKENS, "sdpa"),
        (("sdpa", "tiles"), False, False, True, TILE_TOKENS, "tiles"),
        (("flex",), False, False, False, 64, "flex"),
    ],
)
def test_the_choice_of_auto(
    names: tuple[str, ...], masked: bool, branches: bool, unfused: bool, tokens: int, expected: str
) -> None:
    assert fastest(names, masked, branches, unfused, tokens) == expected


def gpu_cases() -> Iterator[tuple[str, torch.dtype, float]]:
    """Returns the relative error of the whole tensor, forward and each gradient. fp32: sums in another order. bf16
    keeps 8 bits, so both sides lie about 2^-9 from the truth, the backward's several products add up to a few of it."""
    yield "flex", torch.float32, 1e-4
    yield "flex", torch.bfloat16, 2e-2
    yield "flash", torch.bfloat16, 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype", "most"), gpu_cases())
@pytest.mark.parametrize("ids", [PACKED, TREED, CAUSAL], ids=["packed", "tree", "causal"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (WINDOW, None), (WINDOW, 2.0)])
def test_forward_and_backward_on_a_gpu(
    backend: str, dtype: torch.dtype, most: float, ids: Ids, window: int | None, softcap: float | None
) -> None:
    if backend == "flash" and (ids[1] is not None or importlib.util.find_spec("flash_attn") is None):
        pytest.skip("flash-attn is not installed, or the row has branches")
    device = torch.device("cuda")
    ids = tuple(None if x is None else x.to(device) for x in ids)
    inputs = [x.requires_grad_() for x in heads(ids[2].size(0), 64, dtype, "cuda")]
    kernels = only(backend, softcap, device)
    found = attend(*inputs, visibility(*ids, window, kernels), kernels)
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
