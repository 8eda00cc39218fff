"""Reward models: what they read token by token, scores against transformers itself, batches, errors, refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from llmtrain.arch.resolve import resolve_model
from llmtrain.config import hub
from llmtrain.config.load import ConfigError, dump, load
from llmtrain.config.recipes.grpo import RECIPE as GRPO
from llmtrain.config.schema import Config, ModelConfig, RewardConfig
from llmtrain.data.chat import CHATML
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.model import classifier
from llmtrain.model.classifier import Classifier, batches, placement, unused_id
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.observe.contents import Checksums
from llmtrain.rewards import RewardsFail, build_reward, check_rows, reward_metrics, scorer_of, stop_if_failing
from llmtrain.rewards.model import reader_of
from llmtrain.rules.check import check
from llmtrain.trainer.identity import Record, contents_of, differences, record_of
from llmtrain.types import Sample
from tests.forked import run_alone
from tests.rewards.own_test import decode, groups_of

SPECIAL = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]"]
CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n", "Ġ"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def tokenizer(template: str | None = None, **keys: str) -> PreTrainedTokenizerFast:
    """A tokenizer of characters: every token is seen in a test."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(SPECIAL)
    found = PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "<eos>", "pad_token": "<pad>", **keys})
    found.chat_template = template
    return found


def llama(directory: Path, own: PreTrainedTokenizerFast | None = None, **keys: object) -> Path:
    """Writes a random Llama with one output and its tokenizer."""
    torch.manual_seed(0)
    config = {"vocab_size": 128, "num_labels": 1, "pad_token_id": 0, "max_position_embeddings": 64, **SIZES}
    LlamaForSequenceClassification(LlamaConfig(**{**config, "initializer_range": 0.3, **keys})).save_pretrained(
        directory
    )
    (own or tokenizer()).save_pretrained(directory)
    return directory


def reference(directory: Path, ids: list[int]) -> float:
    """The score of one row, as transformers gives it without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def spelled(directory: Path, render: str, completion: str, row: dict) -> str:
    """The tokens that the model reads, joined."""
    (ids,) = reader_of(str(directory), render).rows([(completion, row)])
    return "".join(AutoTokenizer.from_pretrained(directory).convert_ids_to_tokens(ids))


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    """In batches of unlike lengths, one of which is longer than a batch may be, and in the order that was asked."""
    place = llama(tmp_path / "rm")
    reward = RewardConfig(model=str(place), dtype="fp32", batch_tokens=20)
    rows = [{"prompt": "2+2="}, {"prompt": "a long prompt of many characters "}, {"prompt": "x"}]
    pairs = [("4", rows[0]), ("five", rows[1]), ("", rows[2]), ("y", rows[2]), ("4", rows[0])]
    found = scorer_of(reward).score(pairs)
    read = AutoTokenizer.from_pretrained(place)
    for (text, row), score in zip(pairs, found, strict=True):
        ids = [*read(row["prompt"] + text).input_ids, read.eos_token_id]
        assert score.error is None and score.value == pytest.approx(reference(place, ids), abs=1e-5)
    assert len({round(score.value, 6) for score in found}) == 4


def test_batches_by_hand() -> None:
    assert list(batches([5, 1, 2], 6)) == [[1, 2], [0]]
    assert list(batches([3, 3, 3, 9], 6)) == [[0, 1], [2], [3]]
    assert list(batches([], 6)) == []
    assert unused_id([[7, 6], [4]], 8) == 5


def test_a_model_without_padding_is_scored_in_batches_all_the_same(tmp_path: Path) -> None:
    place = llama(tmp_path / "rm", pad_token_id=None)
    model = Classifier(str(place), "cpu", "fp32")
    rows = [[9, 8, 7, 0], [127, 5, 0], [4]]  # of which 0 is the last token, no padding
    expected = [reference(place, row) for row in rows]
    assert model.scores(rows, 100) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_with_its_own_marks(tmp_path: Path) -> None:
    """BERT: [CLS] text [SEP], no end of text; what the text spells is no mark."""
    own = tokenizer(eos_token=None, cls_token="[CLS]", sep_token="[SEP]")
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
    )
    config = BertConfig(vocab_size=128, num_labels=1, max_position_embeddings=64, pad_token_id=0, **SIZES)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    own.save_pretrained(tmp_path / "bert")
    assert spelled(tmp_path / "bert", "auto", "b[SEP]", {"prompt": "a"}) == "[CLS]ab[SEP][SEP]"
    (ids,) = reader_of(str(tmp_path / "bert"), "auto").rows([("b[SEP]", {"prompt": "a"})])
    assert ids[0] == 4 and ids[-1] == 5 and ids.count(5) == 1
    (score,) = scorer_of(RewardConfig(model=str(tmp_path / "bert"), dtype="fp32")).score([("b", {"prompt": "a"})])
    ids = AutoTokenizer.from_pretrained(tmp_path / "bert")("ab").input_ids
    assert score.value == pytest.approx(reference(tmp_path / "bert", ids), abs=1e-5)


CHAT = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}


@pytest.mark.parametrize(
    ("render", "row", "expected"),
    [
        ("template", CHAT, "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n{}<|im_end|>\n"),
        ("template", {"prompt": "u"}, "<|im_start|>user\nu<|im_end|>\n{}<|im_end|>\n"),
        ("template", {"prompt": "u", "prefill": "p "}, "<|im_start|>user\nu<|im_end|>\n{}<|im_end|>\n"),
        ("rows", CHAT, "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n{}<|im_end|>"),
        ("rows", {"prompt": "u="}, "u=an<eos>swer<eos>"),
    ],
)
def test_what_a_model_reads(tmp_path: Path, render: str, row: dict, expected: str) -> None:
    place = llama(tmp_path / "rm", tokenizer(CHATML))
    answer = ("p " if "prefill" in row else "") + "an<eos>swer"
    assert spelled(place, render, "an<eos>swer", row) == expected.format(f"<|im_start|>assistant\n{answer}")
    (ids,) = reader_of(str(place), render).rows([("an<eos>swer", row)])
    assert ids.count(1) == (render == "rows" and "prompt" in row)  # the end of text that ends the row alone
    assert [i for i in ids if i in (2, 3)][-1] == 3 if expected.startswith("<|") else True


def test_an_export_of_ours_is_read_as_it_was_trained(small_data: Path, tmp_path: Path) -> None:
    """`auto`, by the marker; the score is that of our decoder at the last token."""
    model = resolve_model(ModelConfig(head="scalar", num_layers=1, hidden_size=8, vocab_size=512))
    weights = {name: init_tensor(name, shape, model, 3) * 3 for name, shape in parameter_shapes(model).items()}
    own = load_tokenizer(f"{small_data}/tokenizer")
    place = str(tmp_path / "rm" / "export")
    save_hf(place, model, weights.items(), torch.float32, own.directory, own.eos_id, pad_id=own.pad_id)
    reward = RewardConfig(model=place, dtype="fp32")
    assert reward.name == "rm"
    row = {"prompt": "2+2="}
    (ids,) = reader_of(reward.model, "auto").rows([(" 4", row)])
    assert ids == [*own.encode("2+2="), *own.encode(" 4"), own.eos_id]
    (score,) = scorer_of(reward).score([(" 4", row)])
    assert score.value == pytest.approx(reference(Path(reward.model), ids), abs=1e-5)


def test_beside_a_verifier_in_the_sum(tmp_path: Path) -> None:
    place = llama(tmp_path / "rm")
    rewards = [RewardConfig(model=str(place), dtype="fp32", weight=0.5), RewardConfig(name="first_integer")]
    groups = groups_of("4", "5")
    for sample in groups[0]:
        sample.example = {"prompt": "2+2=", "answer": "4"}
    check_rows(rewards, [groups[0][0].example], ["f:1"])
    build_reward(rewards, decode)(groups)
    values = [sample.parts["rm"] for sample in groups[0]]
    assert values[0] != values[1]
    assert [sample.reward for sample in groups[0]] == pytest.approx([values[0] / 2 + 1, values[1] / 2])
    assert reward_metrics(groups)["reward/rm"] == pytest.approx(sum(values) / 2)


def test_errors_count_and_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RewardConfig(model=str(llama(tmp_path / "rm")), dtype="fp32")
    row = {"prompt": "u"}
    monkeypatch.setattr(Classifier, "scores", lambda self, rows, tokens: [float("nan")] * len(rows))
    nan, long = scorer_of(reward).score([("a", row), ("a" * 90, row)])
    assert (nan.value, nan.error) == (0.0, "returned nan, which is no finite number")
    assert (long.value, long.error) == (0.0, "prompt and completion have 92 tokens, and the model reads 64")
    with pytest.raises(RewardsFail, match=r"reward rm: failed on 2 of 3 .*max_error_share=0.5"):
        stop_if_failing([reward], [{"rm": "x"}, {"rm": "x"}, {}])


def test_loading_draws_no_numbers_of_the_run_and_happens_once(tmp_path: Path) -> None:
    reward = RewardConfig(model=str(llama(tmp_path / "rm")), dtype="fp32")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    scorer_of(reward).start()
    assert torch.equal(torch.rand(1), expected)
    shutil.rmtree(reward.model)
    assert scorer_of(reward).score([("a", {"prompt": "u"})])[0].error is None


def two_outputs(place: Path) -> None:
    llama(place, num_labels=2)


def language_model(place: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=128, **SIZES)).save_pretrained(place)
    tokenizer().save_pretrained(place)


def own_code(place: Path) -> None:
    llama(place)
    config = json.loads((place / "config.json").read_text())
    more = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.C", "AutoModelForSequenceClassification": "odd.M"}}
    (place / "config.json").write_text(json.dumps(config | more))
    (place / "odd.py").write_text(f"open({str(place / 'ran')!r}, 'w')\n")


def pickled(place: Path) -> None:
    llama(place)
    (place / "model.safetensors").unlink()
    torch.save({}, place / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (two_outputs, "has 2 outputs, and a reward is one"),
        (language_model, "has no score.weight, so it is no trained sequence classifier"),
        (own_code, "transformers cannot load this as a sequence classifier"),
        (pickled, "transformers cannot load this as a sequence classifier"),
    ],
)
def test_what_is_no_reward_model_is_wrong_input(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "rm")
    with pytest.raises(ValueError, match=rf"rewards.rm.model: {re.escape(str(tmp_path / 'rm'))}: {message}"):
        check_rows([RewardConfig(model=str(tmp_path / "rm"))], [{"prompt": "u"}], ["f:1"])
    assert not (tmp_path / "rm" / "ran").exists()


def test_rows_that_it_cannot_read(tmp_path: Path) -> None:
    reward = RewardConfig(model=str(llama(tmp_path / "rm")), dtype="fp32")
    with pytest.raises(ValueError) as told:
        check_rows([reward], [{"prompt": "u"}, CHAT, {"answer": "4"}], ["f:1", "f:2", "f:3"])
    lines = str(told.value).splitlines()
    assert lines[0].startswith("f:2: reward rm: the row has messages, and the reward model no chat template")
    assert lines[1].startswith("f:3: reward rm: missing field 'prompt' or 'messages'") and len(lines) == 3


def test_ranks_of_a_machine_keep_to_their_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placement("auto") == placement("cpu") == {"device_map": {"": "cpu"}}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * (device + 1), 9999))
    monkeypatch.setattr(classifier, "host_bytes", lambda: 600)
    assert placement("auto") == {"device_map": "auto"}
    assert placement("balanced") == {"device_map": "balanced"}
    assert placement("cuda:1") == {"device_map": {"": "cuda:1"}}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert placement("auto") == {"device_map": "auto", "max_memory": {1: 1800, "cpu": 300}}


def test_forms_and_rules(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    rewards = "[{model: no/such/export}, {model: m, function: a.b:f, name: g}]"
    path.write_text(f"rewards: {rewards}\neval: {{text: false}}\nmodel: {{init_from: {tmp_path}}}\n")
    config = load(str(path), ["rewards.such.dtype=fp32"])
    assert [(r.name, r.dtype) for r in config.rewards] == [("such", "fp32"), ("g", "auto")]
    (tmp_path / "b.yaml").write_text(dump(config))
    assert load(str(tmp_path / "b.yaml"), []) == config
    with pytest.raises(ConfigError) as told:
        check(config, 1, "eval")
    assert "rewards.such.model=no/such/export: does not exist; give an export" in str(told.value)
    assert "rewards.such.model=no/such/export: eval calls an answer right by its first reward" in str(told.value)
    assert "rewards.g.model=m: not with function=a.b:f, a reward is one of the two; remove one" in str(told.value)
    with pytest.raises(ConfigError, match=r"rewards\.such\.device_map|rewards\.0\.device_map"):
        load(str(path), ["rewards.such.device_map=gpu"])


def test_a_run_knows_its_reward_model_by_its_weights(tmp_path: Path) -> None:
    """A copy elsewhere is the same; other weights are not, nor is a dtype or another kind of reward."""
    first, copied, other = llama(tmp_path / "a" / "rm"), tmp_path / "b" / "rm", tmp_path / "c" / "rm"
    shutil.copytree(first, copied)
    llama(other, initializer_range=0.2)

    def record(**keys: object) -> Record:
        config = Config(rewards=[RewardConfig(**keys)], tokenizer={"path": str(tmp_path)})
        return record_of(config, GRPO, contents_of(config, GRPO, "", str(tmp_path / "none"), Checksums()))

    was = record(model=str(first))
    assert was["contents"]["rewards.rm"]["path"] == str(first)
    assert differences(was, record(model=str(copied)), GRPO) == []
    assert [key for key, *_ in differences(was, record(model=str(other)), GRPO)] == ["rewards.rm"]
    assert [key for key, *_ in differences(was, record(model=str(first), dtype="fp32"), GRPO)] == ["rewards"]
    assert [key for key, *_ in differences(was, record(name="rm", function="a.b:rm"), GRPO)] == ["rewards"]


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is fetched for commands that read rewards, and keeps the name that it has."""
    monkeypatch.setattr(hub, "fetch", lambda asked, name, files=(): f"/cache/{name}" if "rewards.rm" in asked else "?")
    config = Config(rewards=[{"model": "org/rm"}, {"name": "math"}])
    for command, expected in {"judge": "/cache/org/rm", "grpo": "/cache/org/rm", "export": "org/rm"}.items():
        first, second = hub.located(config, command).rewards
        assert (first.name, first.model, second.model) == ("rm", expected, None)
    assert hub.located(config, "judge", weights=False).rewards == config.rewards
    assert hub.located(config, "judge", run_dir="org").rewards == config.rewards  # a stage may make it


def test_grpo_trains_on_a_model(small: Path, tmp_path: Path) -> None:
    """As a user runs it: the mean score stands in metrics.jsonl, and groups have a spread."""
    config = load(str(small), [])
    weights = ((n, init_tensor(n, shape, config.model, 0)) for n, shape in parameter_shapes(config.model).items())
    save_hf(str(tmp_path / "hf"), config.model, weights, torch.float32, config.tokenizer.path, 1)
    place = llama(tmp_path / "rm", load_tokenizer(config.tokenizer.path).hugging_face, vocab_size=512)
    more = (f"run_dir={tmp_path}/run", f"model.init_from={tmp_path}/hf", f"rewards=[{{model: {place}, dtype: fp32}}]")
    done = run_alone("llmtrain", "grpo", str(small), *more, "train.steps=2")
    assert done.returncode == 0, done.stdout[-2000:]
    first, _ = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert first["reward/rm"] == pytest.approx(first["reward_mean"]) and first["reward_mean"] != 0
    assert first["reward_errors"] == 0
    assert first["kept_fraction"] == 1.0


def test_a_sample_of_another_row_is_another_score(tmp_path: Path) -> None:
    place = llama(tmp_path / "rm")
    samples = [Sample([1], [52], [True], [0.0], [0], True, example={"prompt": prompt}) for prompt in ("a", "b")]
    build_reward([RewardConfig(model=str(place), dtype="fp32")], decode)([samples])
    assert samples[0].reward != samples[1].reward
