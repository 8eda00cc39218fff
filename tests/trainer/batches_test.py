"""Which sample goes where, on any number of ranks."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from llmtrain.trainer.batches import rank_samples


def taken(step: int, global_seqs: int, micro_seqs: int, dp_size: int) -> list[int]:
    """Of all data-parallel ranks."""
    meshes = [SimpleNamespace(dp_size=dp_size, dp_rank=rank) for rank in range(dp_size)]
    parts = [rank_samples(step, global_seqs, micro_seqs, mesh) for mesh in meshes]
    assert len({len(part) for part in parts}) == 1 and all(len(s) == micro_seqs for part in parts for s in part)
    return [number for part in parts for samples in part for number in samples]


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from([1, 2, 4])), min_size=1, max_size=12))
def test_no_sample_is_repeated_or_skipped_when_the_number_of_ranks_changes(steps: list[tuple[int, int]]) -> None:
    """A run whose every step may be on another number of ranks, with other microbatches."""
    global_seqs = 96
    seen = [n for step, (ranks, micro) in enumerate(steps) for n in sorted(taken(step, global_seqs, micro, ranks))]
    assert seen == list(range(global_seqs * len(steps)))
