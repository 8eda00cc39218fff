from __future__ import annotations

import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import MlaConfig, ModelConfig, MoeConfig, RopeScaling
from llmtrain.model.decoder import Decoder
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.stem import masks_behind
from llmtrain.types import Prompt, Sampling
from tests.model.llama import SMALL
from tests.rollout.native_test import random_decoder


def test_masks_by_hand() -> None:
    """A stem of 1 token, a row 5 6 | 7 with 6 and 7 both behind 5: 7 does not see 6."""
    model = random_decoder(SMALL)
    (mask,) = masks_behind(model, 1, torch.tensor([[1, 2, 2]]), torch.tensor([[3, 2, 3]])).values()
    assert mask[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


KINDS = {
    "full": SMALL,
    "sliding": {"sliding_window": 5, "layer_types": ["sliding", "full"]},
    "wide sliding": {"sliding_window": 40, "layer_types": ["sliding", "full"]},
    "mla": {"attention": "mla", "mla": MlaConfig(kv_rank=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=8)},
    "learned": {"positions": "learned"},
    "softcap": {"attention_softcap": 20.0},
    "yarn": {"rope_scaling": RopeScaling(type="yarn", factor=4, original_max_positions=16)},
    "moe": {"moe": MoeConfig(num_experts=4, top_k=2, expert_ffn_size=24)},
}
DRAWS = torch.randint(97, (60,), generator=torch.Generator().manual_seed(0)).tolist()


def decoder_of(kind: str) -> Decoder:
    fields = KINDS[kind]
    if isinstance(fields, ModelConfig):
        return random_decoder(fields)
    shape = {"num_layers": 2, "hidden_size": 32, "ffn_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 97}
    return random_decoder(resolve_model(ModelConfig(**shape, **fields)))


def firsts(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the tokens of a row in each forward."""
    seen, forward = [], model.layers["0"].forward
    monkeypatch.setattr(model.layers["0"], "forward", lambda x, *more: seen.append(x.size(1)) or forward(x, *more))
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shared", "max_batch_seqs"), [(31, 3), (32, 3), (60, 1)])
def test_prompts_that_begin_alike_are_continued_as_each_by_itself(
    kind: str, shared: int, max_batch_seqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder_of(kind)
    generator = NativeGenerator(model, max_batch_seqs, "cpu")
    ends = ([1], [2, 3, 4], [5, 6], [1, 8], DRAWS[:9])
    prompts = [Prompt(DRAWS[:shared] + end, seed) for seed, end in enumerate(ends)]
    sampling = Sampling(12, 2, temperature=0.7)
    apart = [generator.generate([prompt], sampling)[0] for prompt in prompts]
    seen = firsts(model, monkeypatch)
    together = generator.generate(prompts, sampling)
    assert seen[0] == (shared if shared >= 32 else 40)  # the stem, or else the longest prompt
    for one, group in zip(apart, together, strict=True):
        assert [s.ids for s in one] == [s.ids for s in group]
        for a, b in zip(one, group, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_prompt_that_the_others_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last token is left out of the stem, as the logits behind it are asked for."""
    model = decoder_of("full")
    generator, prompts = NativeGenerator(model, 4, "cpu"), [Prompt(DRAWS[:40]), Prompt(DRAWS[:45])]
    apart = [generator.generate([prompt], Sampling(8))[0][0].ids for prompt in prompts]
    seen = firsts(model, monkeypatch)
    assert [group[0].ids for group in generator.generate(prompts, Sampling(8))] == apart
    assert seen[:2] == [39, 6]


def test_new_weights_have_a_stem_of_their_own() -> None:
    generator, other = NativeGenerator(decoder_of("full"), 4, "cpu"), random_decoder(SMALL, seed=1)
    prompts = [Prompt([*DRAWS[:50], end]) for end in range(3)]
    old = generator.generate(prompts, Sampling(8))
    generator.sleep()
    generator.load_weights(other.state_dict().items(), version=1)
    generator.wake()
    new = [group[0].ids for group in generator.generate(prompts, Sampling(8))]
    assert new == [NativeGenerator(other, 1, "cpu").generate([p], Sampling(8))[0][0].ids for p in prompts]
    assert new != [group[0].ids for group in old]


def test_what_is_a_small_part_of_the_prompts_is_computed_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system prompt of 40 tokens before texts of 120 and more: rows behind it would need a mask."""
    model = decoder_of("full")
    seen = firsts(model, monkeypatch)
    prompts = [Prompt(DRAWS[:40] + [end] + 2 * DRAWS) for end in range(3)]
    NativeGenerator(model, 4, "cpu").generate(prompts, Sampling(1))
    assert seen == [161]
    seen.clear()
    NativeGenerator(model, 4, "cpu").generate([Prompt(p.ids[:160]) for p in prompts], Sampling(1))
    assert seen == [40, 120]
