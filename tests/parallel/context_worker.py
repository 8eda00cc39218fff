"""Compares each method of context parallelism with plain attention on whole rows. Runs on several ranks.

Prints one JSON line a case: the worst relative error of the output and of the gradients of q, k and v.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.model.attention import attention_mask
from llmtrain.model.kernels import tile_plan, tiles
from llmtrain.model.kernels.backends import Kernels
from llmtrain.model.kernels.sdpa import attention
from llmtrain.parallel.context import METHODS
from llmtrain.parallel.zigzag import shard
from tests.json_output import print_json

B, T, HEADS, HEAD_DIM = 2, 32, 4, 8


def row_ids(kind: str) -> tuple[Tensor | None, Tensor | None]:
    """Returns segment ids and ends: none, unequal documents with padding, or a tree in each document."""
    if kind in ("causal", "window"):
        return None, None
    at = torch.arange(T).expand(B, T)
    segments = (at >= torch.tensor([[5], [19]])).long().masked_fill(at >= 29, -1)
    if kind in ("documents", "window, documents"):
        return segments, None
    starts = torch.where(segments == 1, torch.tensor([[5], [19]]), 0)
    nodes = ((at - starts) // 3).clamp(max=4)  # of 3 tokens: 0 above 1 and 3, 1 above 2, 3 above 4
    stops = torch.where(segments == 0, torch.tensor([[5], [19]]), torch.where(segments == 1, 29, T))
    return segments, torch.where((nodes == 1) | (nodes == 2), starts + 9, T).minimum(stops)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).nan_to_num(torch.inf).item()


def errors(
    method: str, backend: str, kind: str, kv_heads: int, dtype: torch.dtype, softcap: float | None
) -> dict[str, float]:
    group, g = dist.group.WORLD, torch.Generator().manual_seed(1)
    rank, cp = group.rank(), group.size()
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    q, k, v, weights = (torch.randn(B, n, T, HEAD_DIM, generator=g).to(dtype) for n in heads)
    segments, ends = row_ids(kind)
    real = torch.ones(B, 1, T, 1) if segments is None else (segments >= 0)[:, None, :, None].float()
    weights = weights * real.to(dtype)  # of padding nothing is promised
    whole = [x.float().clone().requires_grad_() for x in (q, k, v)]
    positions, window = torch.arange(T).expand(B, T), 7 if kind.startswith("window") else None
    everywhere = torch.zeros_like(positions) if segments is None else segments
    plain = None if kind == "causal" else attention_mask(everywhere, ends, positions=positions, window=window)
    expected = attention(*whole, plain, softcap)
    (expected * weights.float()).sum().backward()
    want = {"out": expected.detach() * real, **{name: x.grad for name, x in zip("qkv", whole, strict=True)}}

    attend, visibility = METHODS[method]
    kernels = Kernels((backend,), softcap, softcap is not None)
    mine = [shard(x, 2, rank, cp).requires_grad_() for x in (q, k, v)]
    ids = [None if x is None else shard(x, 1, rank, cp) for x in (segments, ends, positions)]
    out = attend(*mine, visibility(*ids, window, group, kernels), group, kernels)
    (out * shard(weights, 2, rank, cp)).sum().backward()
    got = {"out": out.detach(), **{name: x.grad for name, x in zip("qkv", mine, strict=True)}}
    assert all(x.dtype == dtype for x in got.values())
    got["out"] = got["out"] * shard(real, 2, rank, cp)
    return {name: relative(got[name], shard(want[name], 2, rank, cp)) for name in got}


def cases() -> list[tuple]:
    """Returns what `errors` is asked: every method, by whole masks and by tiles (ring: tiles)."""
    ways = [("ring", "tiles"), *product(("allgather", "alltoall"), ("sdpa", "tiles"))]
    kinds = ("causal", "documents", "tree")
    found = [(*way, kind, kv, torch.float32, None) for way, kind, kv in product(ways, kinds, (4, 2, 1))]
    found += [(*way, "documents", 2, torch.bfloat16, None) for way in ways]
    others = ((kind, cap) for kind, cap in (("window", None), ("window, documents", None), ("documents", 2.0)))
    return found + [(*way, kind, 2, torch.float32, cap) for way, (kind, cap) in product(ways[1:], others)]


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    tiles.SIDE_TOKENS = tile_plan.WINDOW_TOKENS = 3  # tiles of unequal size
    for case in cases():
        found = torch.tensor(list(errors(*case).values()))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            print_json({"case": list(map(str, case)), "error": float(found.max())})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
