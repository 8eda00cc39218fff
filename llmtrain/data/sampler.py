"""Decides the order of samples by pure functions of (seed, global sample number), the same on any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BLOCK = 1000  # samples within which the sources are mixed exactly by weight
ROUNDS = 6


def derive(seed: int, name: str) -> int:
    """Returns a 64-bit seed for one purpose."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


def scramble(x: int) -> int:
    """Returns the finalizer of splitmix64 of x."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


@lru_cache(maxsize=64)
def round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(derive(seed, f"{epoch}/{i}") for i in range(ROUNDS))


def permuted(index: int, size: int, seed: int) -> int:
    """Returns the `index % size`-th element of a permutation of range(size), a new one in each epoch `index // size`.

    It is a Feistel cipher on the smallest even number of bits, applied until the result is in range (Black and Rogaway
    2002, Ciphers with arbitrary finite domains). It needs no table, so its cost does not grow with the size.
    """
    epoch, x = divmod(index, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low, keys = (1 << half) - 1, round_keys(seed, epoch)
    while True:
        left, right = x >> half, x & low
        for key in keys:
            y = key ^ right  # `scramble`, written out: it is most of the cost of a row
            y = (y ^ (y >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            y = (y ^ (y >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((y ^ (y >> 31)) & low)
        x = left << half | right
        if x < size:
            return x


MANY_EPOCHS = 8  # of an array; with more, its elements are taken one by one


def permuted_all(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Returns `permuted` of each of an array of indices, int64, in a fraction of the time."""
    epochs = indices // size
    found = np.empty(len(indices), np.int64)
    if len(np.unique(epochs)) > MANY_EPOCHS:
        found[:] = [permuted(index, size, seed) for index in indices.tolist()]
        return found
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    for epoch in np.unique(epochs).tolist():
        left_over = np.flatnonzero(epochs == epoch)
        x = (indices[left_over] % size).astype(np.uint64)
        while len(left_over):
            left, right = x >> half, x & low
            for key in round_keys(seed, epoch):
                left, right = right, left ^ (scramble_all(right ^ np.uint64(key)) & low)
            x = left << half | right
            done = x < size
            found[left_over[done]] = x[done]
            left_over, x = left_over[~done], x[~done]
    return found


def scramble_all(x: np.ndarray) -> np.ndarray:
    """Returns `scramble` of each element of an array of uint64, whose products wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rounded_counts(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Returns whole numbers that add up to `total`, in proportion to the weights, rounded by largest remainder."""
    shares = [w / sum(weights) * total for w in weights]
    counts = [int(share) for share in shares]
    for i in sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


@lru_cache(maxsize=64)
def block_counts(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Returns how many of BLOCK samples come from each source."""
    counts = rounded_counts(weights, BLOCK)
    if min(counts) == 0:
        raise ValueError(f"data source weights {weights}: each must be at least 1/{BLOCK} of their sum")
    return counts


def source_of(global_sample: int, weights: Sequence[float], seed: int) -> tuple[int, int]:
    """Returns (source, number of the sample within that source); each number comes exactly once.

    Example: with weights (3, 1), of the samples 0..999 exactly 750 are (0, 0..749) and 250 are (1, 0..249).
    """
    slot = permuted(global_sample, BLOCK, seed)
    for source, count in enumerate(block_counts(tuple(weights))):
        if slot < count:
            return source, global_sample // BLOCK * count + slot
        slot -= count
    raise AssertionError("the counts add up to BLOCK")


def sources_of(samples: np.ndarray, weights: Sequence[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `source_of` of each of an array of samples."""
    slots, counts = permuted_all(samples, BLOCK, seed), np.array(block_counts(tuple(weights)))
    ends = np.cumsum(counts)
    sources = np.searchsorted(ends, slots, side="right")
    return sources, samples // BLOCK * counts[sources] + slots - (ends - counts)[sources]
