"""Names on the Hugging Face hub, with a hub of the tests in the place of the real one."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from llmtrain.config import hub
from llmtrain.config.load import ConfigError, load, stage_config
from llmtrain.config.schema import Config, RunConfig
from llmtrain.rules.check import check

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
    "pytorch_model.bin",
    "modeling.py",
)
FILES += ("original/consolidated.00.safetensors", "consolidated.safetensors", "onnx/config.json", "tokenizer.model")
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 300}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 64}


class Hub:
    """Has one model, and remembers what was asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.asked, self.error = directory, [], None
        (directory / "config.json").write_text(json.dumps(LLAMA))

    def snapshot_download(self, name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        if self.error:
            raise self.error
        self.asked.append(
            (name, sorted(filter_repo_objects(FILES, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        )
        return str(self.directory)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    hub.fetch.cache_clear()
    there = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", there.snapshot_download)
    return there


def document(tmp_path: Path, text: str, *overrides: str) -> Config:
    (tmp_path / "x.yaml").write_text(text)
    return load(str(tmp_path / "x.yaml"), list(overrides))


def test_only_weights_json_and_tokenizers_are_fetched(there: Hub, tmp_path: Path) -> None:
    config = document(tmp_path, "model: {init_from: org/name}\ntokenizer: {path: org/name}")
    found = hub.located(config, "sft")
    assert found.model.init_from == found.tokenizer.path == str(there.directory)
    tokenizer = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer.model"]
    assert there.asked == [("org/name", sorted([*tokenizer, "model.safetensors"])), ("org/name", tokenizer)]
    hub.located(config, "sft")
    assert len(there.asked) == 2  # once a process
    assert hub.located(config, "plan").model.init_from == str(there.directory)
    assert there.asked[2:] == [("org/name", ["config.json"])]
    assert hub.located(config, "report") == config


def test_models_beside_the_main_one_are_fetched_for_their_recipe_alone(there: Hub, tmp_path: Path) -> None:
    config = document(tmp_path, "ppo: {critic_from: org/name}")
    assert hub.located(config, "ppo").ppo.critic_from == str(there.directory)
    assert [name for name, files in there.asked if "model.safetensors" in files] == ["org/name"]
    assert hub.located(config, "sft") == config


def test_a_model_in_a_list_is_fetched_and_keeps_its_name(there: Hub, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    teachers = f"[{{path: org/name, weight: 2}}, {{path: {tmp_path / 'here'}}}, {{path: org/name, name: a.b}}]"
    config = document(tmp_path, f"distill: {{teacher: {teachers}}}")
    fetched, here = str(there.directory), str(tmp_path / "here")
    found = [(each.name, each.path, each.weight) for each in hub.located(config, "distill").distill.teacher]
    assert found == [("name", fetched, 2.0), ("here", here, 1.0), ("a.b", fetched, 1.0)]
    assert hub.located(config, "sft") == config


def test_a_reward_model_is_fetched_where_rows_are_judged(there: Hub, tmp_path: Path) -> None:
    text = "rewards: {model: a/judge}\n"
    for setting, found in (("sft.min_reward=0.5", str(there.directory)), ("sft.min_trace_tokens=1", "a/judge")):
        (reward,) = hub.located(document(tmp_path, text, setting), "sft").rewards
        assert (reward.model, reward.name) == (found, "judge")


def test_a_path_that_exists_wins_and_so_does_a_folder_of_the_organisation(there: Hub, tmp_path: Path) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    for path in ("org/name", "org/nmae", "/org/name", "a/b/c", "./org", "name"):
        config = document(tmp_path, f"model: {{init_from: {path}}}")
        assert hub.located(config, "sft") == config
    assert there.asked == []


def test_where_a_stage_makes_its_tokenizer_the_base_is_the_name(there: Hub, tmp_path: Path) -> None:
    sources = "data: {sources: [{name: t, type: topics}]}"
    config = document(tmp_path, f"tokenizer: {{path: new/one, base: org/name}}\n{sources}")
    for command in ("pretrain", "data", "tokenizer"):
        found = hub.located(config, command).tokenizer
        assert (found.path, found.base) == ("new/one", str(there.directory))


def test_stages_keep_the_name_and_what_they_make_is_none(there: Hub, tmp_path: Path) -> None:
    stages = """
run_dir: out
data: {train: x.jsonl}
stages:
  - {name: a, command: sft, set: {model: {init_from: org/name}, tokenizer: {path: org/name}}}
  - {name: b, command: sft, set: {model: {init_from: out/a}, tokenizer: {path: org/name}}}
"""
    (tmp_path / "x.jsonl").write_text("")
    config = document(tmp_path, stages, "train.seq_len=64")
    assert isinstance(config, RunConfig)
    check(config, 1, "plan")
    assert {name for name, _ in there.asked} == {"org/name"}
    assert not any("model.safetensors" in files for _, files in there.asked)
    check(config, 1, "run")
    assert any("model.safetensors" in files for _, files in there.asked)
    assert stage_config(config, "a").model.init_from == "org/name"


RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError("no"), "cannot be asked from here (no network, or HF_HUB_OFFLINE is set): "),
        (errors.RepositoryNotFoundError("no", response=RESPONSE), "has no model of that name, or not for you: correct"),
        (errors.GatedRepoError("no", response=RESPONSE), "asks for consent: give it on the model's page"),
        (OSError("No space\nleft"), "did not give it (No space left): try again; or give a directory"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(there: Hub, tmp_path: Path, error: Exception, words: str) -> None:
    there.error = error
    with pytest.raises(ConfigError) as raised:
        hub.located(document(tmp_path, "model: {init_from: org/name}"), "eval")
    line = str(raised.value)
    assert line.startswith(f"model.init_from=org/name: does not exist, and the Hugging Face hub {words}")
    assert "\n" not in line


def test_offline_without_the_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub.fetch.cache_clear()
    with pytest.raises(ConfigError, match=r"tokenizer.path=org/not-there: .*HF_HUB_OFFLINE is set"):
        hub.located(document(tmp_path, "tokenizer: {path: org/not-there}"), "export")
    with pytest.raises(ConfigError, match=r"export.path: must be set, model.init_from=org/name has no directory"):
        hub.located(document(tmp_path, "model: {init_from: org/name}"), "export")
