"""Scores sets of samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the chance that at least one of k samples is right, given c right ones among n; unbiased.

    1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, equation 1), which is 1 - prod_{i=n-c+1..n} (1 - k/i), and 1 where
    n - c < k. pass_at_k(4, 1, 2) = 1 - 3/6 = 0.5.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right among {n} samples: needs 0 <= right <= samples and 1 <= k <= samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def ks_up_to(n: int) -> list[int]:
    """Returns the k of pass@k that are reported of n samples: 1, 2, 4, ... and n. ks_up_to(6) = [1, 2, 4, 6]."""
    return sorted({*(1 << i for i in range(n.bit_length())), n}) if n else []


def majority(answers: Sequence[int | None]) -> int | None:
    """Returns which sample speaks for the most frequent answer, the first that gave it; of answers that tie the first.

    Equal answers have equal numbers, None is no answer (arXiv 2203.11171). majority([None, 0, 1, 1]) = 2.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return answers.index(counts.most_common(1)[0][0]) if counts else None
