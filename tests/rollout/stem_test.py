from __future__ import annotations

import pytest
import torch

from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.stem import masks_behind, shared_tokens
from llmtrain.types import Prompt, Sampling
from tests.model.llama import SMALL
from tests.rollout.native_test import random_decoder


def test_shared_tokens() -> None:
    for a, b, count in (([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2, 4, 5], 2), ([1], [2], 0)):
        assert shared_tokens(a, b) == shared_tokens(b, a) == count


def test_masks_by_hand() -> None:
    """A stem of 1 token, a row 5 6 | 7 with 6 and 7 both behind 5: 7 does not see 6."""
    model = random_decoder(SMALL)
    (mask,) = masks_behind(model, 1, torch.tensor([[1, 2, 2]]), torch.tensor([[3, 2, 3]])).values()
    assert mask[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("shared", [31, 32, 60])
def test_prompts_that_begin_alike_are_continued_as_each_by_itself(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_decoder(SMALL)
    generator = NativeGenerator(model, 3, "cpu")
    draws = torch.randint(97, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    ends = ([1], [2, 3, 4], [5, 6], [1, 8], draws[:9])
    prompts = [Prompt(draws[:shared] + end, seed) for seed, end in enumerate(ends)]
    sampling = Sampling(12, 2, temperature=0.7)
    apart = [generator.generate([prompt], sampling)[0] for prompt in prompts]
    seen, forward = [], model.layers["0"].forward
    monkeypatch.setattr(model.layers["0"], "forward", lambda x, *more: seen.append(x.size(1)) or forward(x, *more))
    together = generator.generate(prompts, sampling)
    assert seen[0] == (shared if shared >= 32 else 40)  # the stem, or else the longest prompt
    for one, group in zip(apart, together, strict=True):
        assert [s.ids for s in one] == [s.ids for s in group]
        for a, b in zip(one, group, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
