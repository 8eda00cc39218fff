"""A scalar head is transformers' sequence classifier with one label: equal to it, read from its directory, written so
that `AutoModelForSequenceClassification` reads it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedConfig as HfConfig

from llmtrain.arch.families import BUILT_IN
from llmtrain.arch.resolve import fields_from_hf, hf_config, resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.model.hf_write import save_hf
from tests.model import deepseek_test as deepseek
from tests.model import experts, gemma_test, gpt2_test, llama_test, mixtral_test, qwen3_moe_test, qwen_test
from tests.model.families import EOS, Pair, agree, pair, random_ids, same_bytes, same_config, tensors_of, tiny_tokenizer

PAD = 0
CONFIGS: list[HfConfig] = [
    transformers.LlamaConfig(**llama_test.ONE),
    transformers.MixtralConfig(**mixtral_test.ONE),
    transformers.Qwen3MoeConfig(**qwen3_moe_test.ONE),
    transformers.GPT2Config(**gpt2_test.ONE, n_inner=128, tie_word_embeddings=False),
    transformers.Qwen2Config(**qwen_test.ONE, **qwen_test.SLIDING),
    transformers.Qwen3Config(**qwen_test.ONE, head_dim=16),
    transformers.Gemma2Config(**gemma_test.ONE, query_pre_attn_scalar=24, tie_word_embeddings=False),
    gemma_test.gemma3(2, **gemma_test.ONE, rope_parameters=gemma_test.SCALED, tie_word_embeddings=False),
    deepseek.CASES["v2"][1],
    deepseek.CASES["v3"][1],
]
FAMILIES = [family for family in BUILT_IN if family.classifier]
"""Of the configs, in their order."""


def classifier(config: HfConfig) -> tuple[type[PreTrainedModel], HfConfig]:
    """Returns transformers' class for one score a row, and the config with it."""
    config = experts.in_a_loop(deepcopy(config))
    config.pad_token_id, config.num_labels = PAD, 1
    return AutoModelForSequenceClassification._model_mapping[type(config)], config


def scores(p: Pair, ids: torch.Tensor) -> torch.Tensor:
    """Ours: the values at the last tokens that are no padding."""
    last = (ids != PAD).cumsum(1).argmax(1)
    return p.logits(ids)[torch.arange(len(ids)), last]


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS, ids=[family.name for family in FAMILIES])
def test_equal_and_there_and_back(config: HfConfig, request: pytest.FixtureRequest) -> None:
    """Scores of rows of unequal length; then the bytes, an equivalent config and equal scores of what we write."""
    with pair(*classifier(config)) as p:
        assert (p.config.family, p.config.head) == (request.node.callspec.id, "scalar")
        ids = random_ids(p.vocab_size, 4, 20)
        ids[1, 13:] = ids[2, 5:] = PAD
        theirs = p.theirs(ids, attention_mask=(ids != PAD).long()).logits
        agree(scores(p, ids), theirs[:, 0])
        hidden = p.theirs.base_model(ids[:1]).last_hidden_state
        agree(p.logits(ids[:1]), p.theirs.score(hidden)[..., 0])
        written = p.directory.parent / "ours"
        weights = p.ours.state_dict().items()
        save_hf(str(written), p.config, weights, torch.float32, str(tiny_tokenizer()), EOS, pad_id=PAD)
        same_bytes(tensors_of(p.directory), tensors_of(written))
        again = AutoModelForSequenceClassification.from_pretrained(written, attn_implementation="eager")
        experts.in_a_loop(again.config)
        same_config(p, again)
        assert torch.equal(again(ids, attention_mask=(ids != PAD).long()).logits, theirs)
        assert AutoTokenizer.from_pretrained(written)("a b").input_ids == [0, 1]


@torch.no_grad()
def test_a_published_score_may_say_that_embeddings_are_tied() -> None:
    """To what, it does not say: there is no second use of them."""
    model, config = classifier(transformers.Qwen2Config(**qwen_test.ONE, tie_word_embeddings=True))
    with pair(model, config) as p:
        assert not p.config.tie_embeddings
        ids = random_ids(p.vocab_size, 4, 9)
        agree(scores(p, ids), p.theirs(ids).logits[:, 0])


@pytest.mark.parametrize(("eos", "expected"), [(EOS, PAD), (PAD, None), ([EOS, PAD], None)])
def test_what_ends_a_text_is_not_taken_for_padding(tmp_path: Path, eos: int | list[int], expected: int | None) -> None:
    """Or the score would be that of the token before the end; transformers then refuses more than one row."""
    model = Decoder(resolve_model(ModelConfig(head="scalar", num_layers=1, hidden_size=8, vocab_size=16)))
    initialize(model, model.config, seed=0)
    save_hf(str(tmp_path / "out"), model.config, model.state_dict().items(), torch.float32, None, eos, pad_id=PAD)
    read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert read.config.pad_token_id == expected and read.config.num_labels == 1
    rows = torch.tensor([[3, 4, 0], [5, 0, 0]])
    if expected is None:
        torch.testing.assert_close(read(rows[:1]).logits[0, 0], model(rows[:1], torch.arange(3)[None])[0, 2])
        with pytest.raises(ValueError, match="batch sizes > 1"):
            read(rows)
    else:
        values = model(rows, torch.arange(3).expand(2, 3))
        torch.testing.assert_close(read(rows).logits[:, 0], values[[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": {"0": "bad", "1": "good"}}, "id2label: has 2 labels, only 1 is supported"),
        ({"id2label": None}, "id2label: has 2 labels"),
        ({"id2label": None, "num_labels": 3}, "id2label: has 3 labels"),
        ({"architectures": ["OwnForSequenceClassification"]}, "only LlamaForSequenceClassification is supported"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForSequenceClassification"]}, "only Gemma3TextFor"),
    ],
)
def test_other_classifiers_are_refused(change: dict, message: str) -> None:
    written = {**hf_config(ModelConfig(head="scalar")), **change}
    with pytest.raises(ValueError, match=message):
        fields_from_hf(json.loads(json.dumps(written)))


def test_a_family_without_a_classifier() -> None:
    with pytest.raises(ValueError, match=r"model.family=palm: transformers has no such model"):
        hf_config(ModelConfig(head="scalar", family="palm"))
