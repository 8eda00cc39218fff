"""A run goes on only with what made it: every difference is told at once, and what may change is noted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtrain.config.load import dump, load
from llmtrain.config.recipes import RECIPES, Recipe
from llmtrain.config.schema import Config
from llmtrain.observe.contents import Checksums
from llmtrain.trainer import resume
from llmtrain.trainer.identity import (
    ABSENT,
    BY_CONTENTS,
    PLACES,
    SAME,
    Contents,
    Record,
    as_record,
    changes,
    check_directory,
    contents_of,
    differences,
    record_of,
    recorded,
    same_keys,
    weight_files,
    write_record,
)
from llmtrain.trainer.identity import _value as value_of
from llmtrain.trainer.job import Job, data_dir, resolved, start_directory, tokenizer_dir

GRPO, SFT, PRETRAIN = (RECIPES[name] for name in ("grpo", "sft", "pretrain"))


def document(folder: Path, *overrides: str) -> Config:
    path = folder / "x.yaml"
    if not path.exists():
        sources = "[{name: a, type: topics, weight: 1.0}, {name: b, type: stdlib, weight: 1.0}]"
        path.write_text(f"name: x\nrun_dir: {folder}/run\nmodel: {{num_layers: 1}}\ndata: {{sources: {sources}}}\n")
    return load(str(path), list(overrides))


def told(folder: Path, recipe: Recipe, *overrides: str) -> list[tuple[str, Any, Any]]:
    was, now = (record_of(resolved(document(folder, *given)), recipe, {}) for given in ((), overrides))
    return differences(was, now, recipe)


@pytest.mark.parametrize(
    ("recipe", "override", "expected"),
    [
        (PRETRAIN, "seed=3", ("seed", 0, 3)),
        (PRETRAIN, "name=y", ("name", "x", "y")),
        (PRETRAIN, "train.seq_len=64", ("train.seq_len", 2048, 64)),
        (PRETRAIN, "train.global_batch_seqs=4", ("train.global_batch_seqs", 8, 4)),
        (PRETRAIN, "train.eval_seqs=4", ("train.eval_seqs", 64, 4)),
        (PRETRAIN, "optim.name=muon", ("optim.name", "adamw", "muon")),
        (PRETRAIN, "data.mask_documents=false", ("data.mask_documents", True, False)),
        (PRETRAIN, "data.fim_share=0.5", ("data.fim_share", 0.0, 0.5)),
        (PRETRAIN, "data.sources.b.weight=9.0", ("data.sources.b.weight", 1.0, 9.0)),
        (PRETRAIN, "data.sources.b.max_epochs=2", ("data.sources.b.max_epochs", None, 2.0)),
        (PRETRAIN, "data.sources.b.language=en", ("data.sources.b.language", None, "en")),
        (PRETRAIN, "data.packing=best_fit", ("data.packing", "cut", "best_fit")),
        (PRETRAIN, "data.mix=blocks", ("data.mix", "even", "blocks")),
        (PRETRAIN, "data.temperature=2.0", ("data.temperature", None, 2.0)),
        (
            PRETRAIN,
            "data.anneal=[{from_step: 3, weights: {a: 1.0}}]",
            ("data.anneal", [], [{"from_tokens": None, "from_step": 3, "weights": {"a": 1.0}}]),
        ),
        (PRETRAIN, "data.sources=[{name: a, type: topics}]", ("data.sources", ["a", "b"], ["a"])),
        (PRETRAIN, "data.sources=[]", ("data.sources", ["a", "b"], [])),
        (PRETRAIN, "model.norm_eps=0.1", ("model.norm_eps", 1e-5, 0.1)),
        (PRETRAIN, "model.num_layers=2", ("model.num_layers", 1, 2)),
        (SFT, "data.replay_seqs=1", ("data.replay_seqs", 0, 1)),
        (SFT, "data.replay_weight=0.5", ("data.replay_weight", 1.0, 0.5)),
        (GRPO, "rollout.group_size=4", ("rollout.group_size", 8, 4)),
        (GRPO, "rollout.temperature=0.5", ("rollout.temperature", 1.0, 0.5)),
        (GRPO, "rollout.top_k=4", ("rollout.top_k", 0, 4)),
        (GRPO, "rollout.max_new_tokens=4", ("rollout.max_new_tokens", 256, 4)),
        (GRPO, "grpo.prompts_per_step=4", ("grpo.prompts_per_step", 32, 4)),
        (GRPO, "grpo.normalize_std=false", ("grpo.normalize_std", True, False)),
        (GRPO, "grpo.kl_coef=0.1", ("grpo.kl_coef", 0.0, 0.1)),
    ],
)
def test_what_must_stay(tmp_path: Path, recipe: Recipe, override: str, expected: tuple) -> None:
    assert told(tmp_path, recipe, override) == [expected]


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        (PRETRAIN, "data.execution.workers=4"),
        (PRETRAIN, "data.executor=ray"),
        (PRETRAIN, "data.clean.examples=3"),
        (PRETRAIN, "data.collect=[{name: a, type: pydoc}]"),
        (PRETRAIN, "data.workers=2"),
        (PRETRAIN, "data.loader_workers=2"),
        (SFT, "data.mix=blocks"),
        (GRPO, "data.packing=best_fit"),
    ],
)
def test_what_may_change(tmp_path: Path, recipe: Recipe, override: str) -> None:
    """How documents were cleaned stands in the shards, whose checksums are compared; without text no mix matters."""
    assert told(tmp_path, recipe, override) == []


def test_a_mix_matters_where_text_is_replayed(tmp_path: Path) -> None:
    before, after = (
        record_of(resolved(document(tmp_path, "data.replay_seqs=1", f"data.mix={mix}")), SFT, {})
        for mix in ("even", "blocks")
    )
    assert differences(before, after, SFT) == [("data.mix", "even", "blocks")]


LORA = {"rank": 2, "alpha": 16.0, "targets": ["q", "v"]}


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        ("null", "{rank: 2}", ("model.lora", None, LORA)),
        ("{rank: 2}", "null", ("model.lora", LORA, None)),
        ("{rank: 2}", "{rank: 4}", ("model.lora.rank", 2, 4)),
        ("{}", "{alpha: 8.0}", ("model.lora.alpha", 16.0, 8.0)),
        ("{}", "{targets: [q, k]}", ("model.lora.targets", ["q", "v"], ["q", "k"])),
        ("{}", "{targets: [v, q]}", None),
    ],
)
def test_adapters_must_stay(tmp_path: Path, was: str, now: str, expected: tuple | None) -> None:
    before, after = (record_of(resolved(document(tmp_path, f"model.lora={x}")), SFT, {}) for x in (was, now))
    assert differences(before, after, SFT) == ([] if expected is None else [expected])


def test_a_reward_must_stay(tmp_path: Path) -> None:
    [(key, was, now)] = told(tmp_path, GRPO, "rewards=[{name: math, weight: 2.0}]")
    assert key == "rewards" and was[0]["name"] == "reasoning_gym" and now[0]["weight"] == 2.0


OWN = "rewards=[{function: a.py:score, name: own}]"


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        (OWN, OWN, True),
        (OWN, OWN.replace("a.py", "moved/b.py"), True),  # the contents are compared
        (OWN, OWN.replace("a.py:score", "a.py:other"), False),
        (OWN, OWN.replace("a.py", "package.module"), False),
        (OWN, OWN.replace("}", ", max_error_share: 0.1}"), True),
        (OWN, OWN.replace("}", ", weight: 2.0}"), False),
        (OWN, OWN.replace("}", ", deadline_s: 1.0}"), False),
        (OWN, OWN.replace("}]", "}, {name: math}]"), False),
        ("rewards=[{name: math}]", "rewards=[{name: first_integer}]", False),
    ],
)
def test_which_rewards_judge_alike(tmp_path: Path, was: str, now: str, same: bool) -> None:
    before, after = (record_of(resolved(document(tmp_path, given)), GRPO, {}) for given in (was, now))
    assert (differences(before, after, GRPO) == []) == same


def test_rewards_of_an_earlier_version(tmp_path: Path) -> None:
    before, after = (record_of(resolved(document(tmp_path)), GRPO, {}) for _ in range(2))
    before["config"]["rewards"] = [{"name": "reasoning_gym", "weight": 1.0}]
    assert differences(before, after, GRPO) == []
    before["config"]["rewards"][0]["weight"] = 2.0
    assert [key for key, *_ in differences(before, after, GRPO)] == ["rewards"]


def test_the_code_of_a_reward_of_the_users_counts(tmp_path: Path) -> None:
    config = document(tmp_path, f"rewards=[{{function: {tmp_path}/mine.py:score}}, {{name: math}}]")
    seen = []
    for text in ("def score(): return 1", "def score(): return 2"):
        (tmp_path / "mine.py").write_text(text)
        seen.append(contents_of(config, GRPO, data_dir(config), tokenizer_dir(config), Checksums()))
    assert [list(each) for each in seen] == [["rewards.score"]] * 2 and seen[0] != seen[1]
    assert contents_of(config, SFT, data_dir(config), tokenizer_dir(config), Checksums()) == {}


@pytest.mark.parametrize(
    ("rollout", "keys"),
    [
        ("environment={{function: {0}:A, unsandboxed: true}}", ["environment.function"]),
        ("agent={{function: {0}:run}}", ["agent.function"]),
        ("agent={{function: b:A, args: {{environment: {0}, most: 3, other: gone.py}}}}", ["agent.args.environment"]),
        ("agent={{function: b:A}}", []),
    ],
)
def test_the_code_of_an_agent_or_environment_counts(tmp_path: Path, rollout: str, keys: list[str]) -> None:
    config, records = document(tmp_path, "rollout." + rollout.format(tmp_path / "mine.py")), []
    for text in ("x = 1", "x = 2"):
        (tmp_path / "mine.py").write_text(text)
        contents = contents_of(config, GRPO, data_dir(config), tokenizer_dir(config), Checksums())
        records.append(record_of(resolved(config), GRPO, contents))
    assert [key for key, *_ in differences(*records, GRPO)] == [f"rollout.{key}" for key in keys]
    earlier = {**records[0], "contents": {}}  # of a version that did not look into the file
    assert differences(earlier, records[1], GRPO) == []
    assert contents_of(config, SFT, data_dir(config), tokenizer_dir(config), Checksums()) == {}


def test_an_agent_of_an_earlier_version(tmp_path: Path) -> None:
    """Keys that came later count as they are by default."""
    for settings, changed in (("{function: b:A}", []), ("{function: b:A, python: x}", ["rollout.agent"])):
        now = record_of(resolved(document(tmp_path, f"rollout.agent={settings}")), GRPO, {})
        config = json.loads(json.dumps(now["config"]))
        del config["rollout"]["agent"]["python"], config["rollout"]["agent"]["args"]
        assert [key for key, *_ in differences(as_record({"config": config}), now, GRPO)] == changed


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        (PRETRAIN, "optim.lr=0.1"),
        (PRETRAIN, "optim.schedule=linear"),
        (PRETRAIN, "train.steps=5"),
        (PRETRAIN, "train.eval_every_steps=5"),
        (PRETRAIN, "train.micro_batch_seqs=2"),
        (PRETRAIN, "checkpoint.every_steps=5"),
        (PRETRAIN, "log.samples=5"),
        (PRETRAIN, "engine.compile=true"),
        (PRETRAIN, "parallel.pp=2"),
        (PRETRAIN, "guard.spike=skip"),
        (PRETRAIN, "data.path=elsewhere"),  # its contents are compared
        (PRETRAIN, "data.loader_workers=2"),
        (PRETRAIN, "data.workers=2"),
        (PRETRAIN, "data.verify=true"),
        (PRETRAIN, "data.megatron=true"),
        (PRETRAIN, "rollout.group_size=4"),  # it does not sample
        (PRETRAIN, "rewards=[{name: math}]"),
        (SFT, "data.train=elsewhere.jsonl"),
        (SFT, "data.sources.b.weight=9.0"),  # no text in it
        (GRPO, "rollout.placement=separate"),
        (GRPO, "rollout.max_batch_seqs=2"),
    ],
)
def test_what_may_change_is_known(tmp_path: Path, recipe: Recipe, override: str) -> None:
    assert told(tmp_path, recipe, override) == []
    was, now = (record_of(resolved(document(tmp_path, *given)), recipe, {}) for given in ((), (override,)))
    key = override.partition("=")[0] if "sources" not in override else "data.sources"
    assert list(changes(was, now)) == [key] and changes(was, was) == {}


def test_the_name_may_follow_the_directory(tmp_path: Path) -> None:
    """A run that was moved or copied has another name; two names for one directory are two runs."""
    assert told(tmp_path, SFT, "run_dir=null", "name=y") == []
    assert [key for key, *_ in told(tmp_path, SFT, "run_dir=elsewhere", "name=y")] == ["name"]


def test_all_differences_are_told_at_once(tmp_path: Path) -> None:
    found = told(tmp_path, PRETRAIN, "seed=3", "data.sources.b.weight=9.0", "model.norm_eps=0.1", "optim.lr=0.1")
    assert [key for key, *_ in found] == ["seed", "data.sources.b.weight", "model.norm_eps"]


@pytest.mark.parametrize("recipe", [PRETRAIN, SFT, GRPO], ids=lambda recipe: recipe.name)
def test_every_key_that_must_stay_exists(tmp_path: Path, recipe: Recipe) -> None:
    config = document(tmp_path).model_dump(mode="json")
    assert all(value_of(config, key) is not ABSENT for key in same_keys(config, recipe))
    assert set(BY_CONTENTS) < set(config["data"]) and set(PLACES) < set(config["rollout"])
    assert {"seed", "train.seq_len"} < set(SAME)


def test_what_earlier_versions_did_not_say_is_not_compared(tmp_path: Path) -> None:
    now = record_of(resolved(document(tmp_path)), GRPO, {"data.train": {"path": "a", "sha256": "1"}})
    config = json.loads(json.dumps(now["config"]))
    for section, name in (("data", "replay_weight"), ("rollout", "top_p"), ("grpo", "kl_coef"), ("train", "eval_seqs")):
        del config[section][name]
    del config["rewards"]
    was = as_record({"config": config})
    assert was["recipe"] is None and differences(was, now, GRPO) == []


def test_what_an_earlier_version_did(tmp_path: Path) -> None:
    """Rows of a run that had no such keys are those of the defaults, but for the mix, which was by blocks."""
    keys = ("packing", "mix", "anneal", "temperature")
    for override, expected in (
        ("data.mix=blocks", []),
        ("data.packing=best_fit", ["data.mix", "data.packing"]),
        (None, ["data.mix"]),
    ):
        now = record_of(resolved(document(tmp_path, *([override] if override else []))), PRETRAIN, {})
        config = json.loads(json.dumps(now["config"]))
        for key in keys:
            del config["data"][key]
        for source in config["data"]["sources"]:
            del source["max_epochs"], source["language"]
        assert [key for key, *_ in differences(as_record({"config": config}), now, PRETRAIN)] == expected


@pytest.mark.parametrize(
    ("recipe", "overrides", "key"),
    [
        (PRETRAIN, ["data.sources.b.max_epochs=2"], "data.sources.b.max_epochs"),
        (PRETRAIN, ["data.anneal=[{from_step: 3, weights: {a: 1.0}}]"], "data.anneal"),
        (SFT, ["data.replay_seqs=1", "data.sources.b.max_epochs=2"], "data.sources.b.max_epochs"),
        (SFT, ["data.sources.b.max_epochs=2"], None),
        (PRETRAIN, [], None),
        (PRETRAIN, ["data.temperature=2.0"], None),
        (PRETRAIN, ["data.mix=blocks"], None),
    ],
)
def test_a_run_in_an_order_that_is_no_more(
    tmp_path: Path, recipe: Recipe, overrides: list[str], key: str | None
) -> None:
    """Versions that wrote no order took other rows where shares change; elsewhere the order has stayed."""
    now = record_of(resolved(document(tmp_path, *overrides)), recipe, {})
    write_record(str(tmp_path), now)
    assert recorded(str(tmp_path)) == now and differences(now, now, recipe) == []
    earlier = as_record({name: value for name, value in now.items() if name != "order"})
    found = [(f"order of rows with {key}", "number 1", "number 2 in this version")] if key else []
    assert differences(earlier, now, recipe) == found


class Files:
    """A document of sft on files of its own, whose contents can be changed."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder = folder
        shutil.copytree(tokenizer, folder / "tok")
        (folder / "hf").mkdir()
        (folder / "hf" / "model.safetensors").write_bytes(b"weights")
        (folder / "d.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
        self.first = self.contents(self.config("d.jsonl", "hf"))

    def config(self, train: str, weights: str) -> Config:
        text = f"model: {{init_from: {self.folder}/{weights}}}\ndata: {{train: {self.folder}/{train}}}\n"
        (self.folder / "x.yaml").write_text(f"{text}tokenizer: {{path: {self.folder}/tok}}\n")
        return load(str(self.folder / "x.yaml"), [])

    def contents(self, config: Config) -> Contents:
        return contents_of(config, SFT, data_dir(config), tokenizer_dir(config), Checksums())

    def changed(self, train: str = "d.jsonl", weights: str = "hf") -> list[str]:
        """Returns the keys whose contents are not those of the first look."""
        config = self.config(train, weights)
        dumped = config.model_dump(mode="json")
        seen = (self.first, self.contents(config))
        was, now = (as_record({"recipe": "sft", "config": dumped, "contents": each}) for each in seen)
        return [key for key, *_ in differences(was, now, SFT)]


@pytest.fixture
def files(tmp_path: Path, small_data: Path) -> Files:
    return Files(tmp_path, small_data / "tokenizer")


def test_contents_that_differ_are_told(files: Files) -> None:
    assert set(files.first) == {"data.train", "model.init_from", "tokenizer.path", "tokenizer's chat template"}
    assert files.changed() == []
    (files.folder / "d.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    assert files.changed() == ["data.train"]
    (files.folder / "hf" / "model.safetensors").write_bytes(b"Weights")
    (files.folder / "tok" / "chat_template.jinja").write_text("{{ messages }}")
    assert files.changed() == ["data.train", "model.init_from", "tokenizer's chat template"]


def test_a_chat_template_in_a_file_counts_by_its_contents(files: Files) -> None:
    """An edited one renders otherwise; a moved one does not. One of the tokenizer's own has no file."""

    def made(template: str) -> Record:
        config = files.config("d.jsonl", "hf")
        tokenizer = config.tokenizer.model_copy(update={"chat_template": template})
        config = config.model_copy(update={"tokenizer": tokenizer})
        return record_of(config, SFT, files.contents(config))

    place, moved = files.folder / "a.jinja", files.folder / "b.jinja"
    for path in (place, moved):
        path.write_text("{{ messages }}")
    was, named = made(str(place)), made("default")
    assert "tokenizer.chat_template" in was["contents"] and "tokenizer.chat_template" not in named["contents"]
    assert differences(was, made(str(place)), SFT) == differences(was, made(str(moved)), SFT) == []
    place.write_text("{{ messages[0] }}")
    [(key, before, now)] = differences(was, made(str(place)), SFT)
    assert key == "tokenizer.chat_template" and before["path"] == now["path"] == str(place)
    assert [each[0] for each in differences(was, named, SFT)] == ["tokenizer.chat_template"]
    assert [each[0] for each in differences(named, was, SFT)] == ["tokenizer.chat_template"]
    earlier = {**was, "contents": files.first}  # of a version that did not look into the file
    assert differences(earlier, made(str(place)), SFT) == []
    assert [each[0] for each in differences(earlier, made(str(moved)), SFT)] == ["tokenizer.chat_template"]
    config = files.config("d.jsonl", "hf")
    template = config.tokenizer.model_copy(update={"chat_template": str(place)})
    config = config.model_copy(update={"tokenizer": template})
    read = contents_of(config, PRETRAIN, data_dir(config), tokenizer_dir(config), Checksums())
    assert "tokenizer.chat_template" not in read  # text is not rendered


def test_the_same_contents_elsewhere_are_the_same(files: Files) -> None:
    (files.folder / "d.jsonl").rename(files.folder / "moved.jsonl")
    (files.folder / "hf").rename(files.folder / "hf2")
    assert files.changed("moved.jsonl", "hf2") == []


def test_weights_of_a_run_are_those_of_its_newest_checkpoint(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-00000010", "step-00000011.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.sha256").write_text(name)
    (tmp_path / "model.safetensors").write_text("")
    newest = tmp_path / "checkpoints" / "step-00000010"
    assert weight_files(str(tmp_path)) == weight_files(str(newest)) == [str(newest / "manifest.sha256")]
    assert weight_files(str(tmp_path / "checkpoints" / "step-00000002"))[0].endswith("02/manifest.sha256")


def checkpoint(run: Path, state: dict[str, Any], step: int = 5) -> None:
    place = run / "checkpoints" / f"step-{step:08d}"
    place.mkdir(parents=True)
    (place / "state.json").write_text(json.dumps(state))


def test_the_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    run, now = tmp_path / "run", record_of(resolved(document(tmp_path)), SFT, {})
    run.mkdir()
    check_directory(str(run), now, SFT)
    write_record(str(run), now)
    check_directory(str(run), now, SFT)
    other = record_of(resolved(document(tmp_path, "seed=3")), GRPO, {})
    with pytest.raises(ValueError, match=r"^command=grpo: must stay sft, with which .*/run was made; or give the run"):
        check_directory(str(run), other, GRPO)
    other["recipe"] = "sft"
    named = record_of(resolved(document(tmp_path, "name=y")), SFT, {})  # as another task of an array
    with pytest.raises(ValueError, match=r"^name=y: must stay x"):
        check_directory(str(run), named, SFT)
    check_directory(str(run), other, SFT)  # no checkpoint: nothing to go on from, it starts anew
    checkpoint(run, {"config": now["config"]})
    with pytest.raises(ValueError, match=r"^seed=3: must stay 0, with which .*/run was made"):
        check_directory(str(run), other, SFT)
    check_directory(str(run), now, SFT)


def test_metrics_without_a_checkpoint_are_those_of_their_run(tmp_path: Path) -> None:
    """Killed before its first checkpoint, or the checkpoints were moved away: the same run writes its lines again,
    another one must not drop them."""
    run, config = tmp_path / "run", resolved(document(tmp_path))
    (run / "checkpoints").mkdir(parents=True)
    now = record_of(config, GRPO, {"rewards.own": {"path": "r.py", "sha256": "1"}})
    write_record(str(run), now)
    same = record_of(resolved(document(tmp_path, "optim.lr=0.1", "train.steps=1")), GRPO, now["contents"])
    judged = record_of(resolved(document(tmp_path, "rewards=[{name: math}]")), GRPO, now["contents"])
    edited = record_of(config, GRPO, {"rewards.own": {"path": "r.py", "sha256": "2"}})
    for lines in ("", '{"step": 1, "lo'):  # no step that is done
        (run / "metrics.jsonl").write_text(lines)
        for each in (same, judged, edited):
            check_directory(str(run), each, GRPO)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    check_directory(str(run), same, GRPO)
    for each, key in ((judged, "rewards="), (edited, r"rewards\.own=r\.py \(sha256 2\): must stay r\.py \(sha256 1\)")):
        with pytest.raises(ValueError, match=f"^{key}.*; or give the run another name, or move that directory away$"):
            check_directory(str(run), each, GRPO)


def test_checkpoints_alone_say_whose_they_are(tmp_path: Path) -> None:
    """Copied from another run, or of an earlier version, which has no run.json."""
    run, now = tmp_path / "run", record_of(resolved(document(tmp_path)), SFT, {})
    checkpoint(run, {"config": now["config"], "model": now["config"]["model"]})
    check_directory(str(run), now, SFT)
    checkpoint(run, {"config": now["config"], "model": now["config"]["model"], "recipe": "grpo"}, step=6)
    with pytest.raises(ValueError, match="command=sft: must stay grpo"):
        check_directory(str(run), now, SFT)
    (run / "checkpoints" / "step-00000006" / "state.json").write_text("{")
    assert recorded(str(run)) is None


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        ([], True),
        (["log.txt", "notes.md", "data", "slurm-3.out"], True),  # nothing that a run writes
        (["config.yaml"], False),  # a user's document, with run_dir=.
        (["samples.jsonl"], False),
        (["run.json"], False),  # another tool's
        (["generation_config.json"], False),  # a model directory, with run_dir=
        (["config.yaml", "eval.json", "samples.jsonl"], False),  # an evaluation's
        (["config.yaml", "metrics.jsonl", "events.jsonl"], False),  # another tool's
    ],
)
def test_files_of_other_origin_are_not_overwritten(tmp_path: Path, names: list[str], allowed: bool) -> None:
    for name in names:
        (tmp_path / name).write_text("mine")
    now = record_of(resolved(Config(run_dir=str(tmp_path))), SFT, {})
    if allowed:
        check_directory(str(tmp_path), now, SFT)
        return
    with pytest.raises(ValueError, match=f"holds {names[0]}.*, which no run of this recipe has written; give"):
        check_directory(str(tmp_path), now, SFT)
    assert {(tmp_path / name).read_text() for name in names} == {"mine"}


MINE = "{name: x, model: {num_layers: 1}, train: {steps: 3}}"  # a document of a user's


@pytest.mark.parametrize(
    ("document_text", "lines", "allowed"),
    [
        (None, '{"step": 1, "loss": 2.0}\n{"step": 2, "lo', True),  # killed before its first checkpoint
        (None, "", True),  # killed before its first step
        (None, '{"step": 1}\n', False),
        (None, '{"loss": 2.0}\n', False),
        (None, "1, 2.0\n", False),
        (None, None, False),
        ("my: notes", '{"step": 1, "loss": 2.0}\n', False),
        (MINE, '{"step": 1, "loss": 2.0}\n', False),
        (MINE.replace("1}", "1, head_dim: 8, depth: 2}"), '{"step": 1, "loss": 2.0}\n', False),  # no key of ours
        (MINE.replace("{name", "{plugins: [spoilt], name"), '{"step": 1, "loss": 2.0}\n', False),
        ("{plugins: [exit_at_once]}", '{"step": 1, "loss": 2.0}\n', False),  # not ours, so not imported
        ("{", '{"step": 1, "loss": 2.0}\n', False),
        ("\0", '{"step": 1, "loss": 2.0}\n', False),
    ],
)
def test_what_a_run_of_an_earlier_version_is(
    tmp_path: Path, document_text: str | None, lines: str | None, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no run.json, but a configuration that is written out whole."""
    now, run = resolved(Config(run_dir=str(tmp_path / "run"))), tmp_path / "run"
    (tmp_path / "exit_at_once.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    run.mkdir()
    (run / "config.yaml").write_text(dump(now) if document_text is None else document_text)
    if lines is not None:
        (run / "metrics.jsonl").write_text(lines)
    if allowed:
        check_directory(str(run), record_of(now, SFT, {}), SFT)
        return
    with pytest.raises(ValueError, match=r"run: holds config\.yaml.*, which no run of this recipe has written; give"):
        check_directory(str(run), record_of(now, SFT, {}), SFT)


def test_nothing_is_written_where_files_are_of_other_origin(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text("my: notes")
    with pytest.raises(ValueError, match=r"holds config\.yaml, metrics\.jsonl, which no run"):
        start_directory(Config(run_dir=str(tmp_path)), SFT)
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "metrics.jsonl"]


def job_at(config: Config, step: int) -> Job:
    return Job(config, SFT, resolved(config).model, SimpleNamespace(rank=0), None, None, step=step)


def test_what_a_run_is_now_is_written_after_the_check(tmp_path: Path) -> None:
    first, later = document(tmp_path, "train.steps=10"), document(tmp_path, "train.steps=20", "optim.lr=0.1")
    (tmp_path / "run").mkdir()
    resume.begin(job_at(first, 0))
    assert load(f"{tmp_path}/run/config.yaml", []) == resolved(first) and recorded(f"{tmp_path}/run")["recipe"] == "sft"
    assert not (tmp_path / "run" / "events.jsonl").exists()
    resume.begin(job_at(later, 4))
    [event] = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert event == {"step": 4, "event": "changed", "keys": {"optim.lr": [3e-4, 0.1], "train.steps": [10, 20]}}
    assert load(f"{tmp_path}/run/config.yaml", []).optim.lr == 0.1
    resume.begin(job_at(later, 8))
    assert len((tmp_path / "run" / "events.jsonl").read_text().splitlines()) == 1  # nothing new


@pytest.mark.parametrize("steps", [5, 10])
def test_a_finished_run_never_claims_what_was_not_done(tmp_path: Path, steps: int) -> None:
    first = document(tmp_path, "train.steps=10")
    (tmp_path / "run").mkdir()
    resume.begin(job_at(first, 0))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in os.listdir(tmp_path / "run")}
    resume.begin(job_at(document(tmp_path, f"train.steps={steps}", "optim.lr=0.1"), 10))
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in os.listdir(tmp_path / "run")}


def test_a_key_behind_a_list_is_that_of_each_entry() -> None:
    """What an earlier version did not write in an entry is not compared."""
    config = {"a": {"b": [{"c": 1, "d": {"e": 3}}, {"c": 2}]}, "f": []}
    assert value_of(config, "a.b.c") == [1, 2] and value_of(config, "a.b") == config["a"]["b"]
    assert (
        value_of(config, "a.b.d.e") is ABSENT and value_of(config, "a.x.c") is ABSENT and value_of(config, "f.c") == []
    )
