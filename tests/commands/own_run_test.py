"""The document of a run that has trained means that run to export, eval and report; others mean what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.cli import main
from llmtrain.commands import evaluate, export, report
from llmtrain.config.load import load
from llmtrain.config.schema import Config
from llmtrain.observe.evaluations import make_room
from llmtrain.rules.check import check, violations
from tests.forked import run_alone
from tests.small_run import DOCUMENT

SHORT = ("train.steps=2", "checkpoint.every_steps=1")
EVAL = ("eval.text=false", "eval.problems=2", "eval.samples=2")


@pytest.fixture(scope="module")
def folder(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: `base`, of new weights, and two which were started from its export: `tuned`, and `adapted` with
    adapters."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    done = run_alone("llmtrain", "sft", str(folder / "small.yaml"), f"run_dir={folder}/base", *SHORT)
    assert done.returncode == 0, done.stdout[-2000:]
    export.main(base(folder, "export.dtype=fp32"))
    for name, more in (("tuned", ()), ("adapted", ("model.lora={rank: 2}", "optim.warmup_steps=0"))):
        start = (f"run_dir={folder}/{name}", f"model={{init_from: {folder}/base/export}}", *more)
        done = run_alone("llmtrain", "sft", tuned_document(folder), *start, *SHORT)
        assert done.returncode == 0, done.stdout[-2000:]
    return folder


def tuned_document(folder: Path) -> str:
    """Returns the document of `tuned`: without the shape of the model, which `init_from` gives."""
    text = re.sub(r"model:\n  \{.*\}\n", "", (folder / "small.yaml").read_text())
    (folder / "tuned.yaml").write_text(text)
    return str(folder / "tuned.yaml")


def base(folder: Path, *overrides: str) -> Config:
    return load(str(folder / "small.yaml"), [f"run_dir={folder}/base", *overrides])


def tuned(folder: Path, *overrides: str) -> Config:
    start = (f"run_dir={folder}/tuned", f"model.init_from={folder}/base/export")
    return load(tuned_document(folder), [*start, *overrides])


def newest(run: Path) -> torch.Tensor:
    return CheckpointReader(str(run / "checkpoints" / "step-00000002")).full("embed.weight")


def exported(directory: Path) -> torch.Tensor:
    return load_file(directory / "model.safetensors")["model.embed_tokens.weight"]


def test_export_writes_the_runs_own_weights_into_the_run(folder: Path) -> None:
    config = tuned(folder, "export.dtype=fp32")
    check(config, 1, "export")
    before = sorted(os.listdir(folder / "base"))
    export.main(config)
    assert exported(folder / "tuned" / "export").equal(newest(folder / "tuned"))
    assert not newest(folder / "tuned").equal(newest(folder / "base"))
    assert sorted(os.listdir(folder / "base")) == before
    marker = json.loads((folder / "tuned" / "export" / ".llmtrain.json").read_text())
    assert marker["from"] == str(folder / "tuned") and marker["made_by"] == "llmtrain export"


def test_the_base_need_not_be_there_any_more(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tuned", tmp_path / "tuned")
    state = tmp_path / "tuned" / "run.json"
    state.write_text(state.read_text().replace(f"{folder}/base/export", "/gone"))
    config = load(tuned_document(folder), [f"run_dir={tmp_path}/tuned", "model.init_from=/gone", "export.dtype=fp32"])
    check(config, 1, "export")
    export.main(config)
    assert exported(tmp_path / "tuned" / "export").equal(newest(folder / "tuned"))


def test_a_checkpoint_of_the_run_may_be_given(folder: Path) -> None:
    first = f"{folder}/tuned/checkpoints/step-00000001"
    for given in (first, f"{folder}/tuned"):  # where only config.yaml knows the shape
        export.main(load(f"{folder}/tuned/config.yaml", [f"model.init_from={given}", "export.dtype=fp32"]))
        wanted = CheckpointReader(first).full("embed.weight") if given == first else newest(folder / "tuned")
        assert exported(folder / "tuned" / "export").equal(wanted)
    assert not os.path.exists(f"{first}/export")


def test_documents_with_a_directory_of_their_own_keep_their_meaning(folder: Path, tmp_path: Path) -> None:
    """As the stages of a run: `model.init_from` says whose weights."""
    over = (f"run_dir={tmp_path}/own", f"model.init_from={folder}/tuned", "export.dtype=fp32")
    export.main(load(tuned_document(folder), [*over, f"export.path={tmp_path}/out"]))
    assert exported(tmp_path / "out").equal(newest(folder / "tuned"))
    evaluate.main(load(tuned_document(folder), [*over, *EVAL, "eval.label=tuned"]))
    names = {name for name in os.listdir(tmp_path / "own") if not name.startswith(".")}
    assert names == {"config.yaml", "eval.json", "samples.jsonl"}
    assert json.loads((tmp_path / "own" / "eval.json").read_text())["label"] == "tuned"


@pytest.mark.parametrize("command", [export, evaluate])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.init_from={folder}/base",
            r"model.init_from=.*/base: the run in .*/tuned was started from .*/base/export",
        ),
        ("model.num_layers=2", "model.num_layers=2: must stay 4, with which .*/tuned was made"),
        ("tokenizer.path={other}", r"tokenizer.path=.* \(sha256 .*: must stay .*/tokenizer \(sha256"),
    ],
)
def test_another_document_than_that_of_the_run_is_refused(
    folder: Path, tmp_path: Path, command: object, override: str, message: str
) -> None:
    other = tmp_path / "tokenizer"
    shutil.copytree(folder.parent / tuned(folder).tokenizer.path, other)
    backend = json.loads((other / "tokenizer.json").read_text())
    backend["pre_tokenizer"] = None
    (other / "tokenizer.json").write_text(json.dumps(backend))
    config = tuned(folder, override.format(folder=folder, other=other), f"export.path={tmp_path}/out", *EVAL)
    with pytest.raises(ValueError, match=message):
        command.main(config)
    assert not (tmp_path / "out").exists()


def adapted(folder: Path, *overrides: str) -> list[str]:
    start = (f"run_dir={folder}/adapted", f"model.init_from={folder}/base/export")
    return [tuned_document(folder), *start, *overrides]


@pytest.mark.parametrize("written_out", [False, True])
def test_the_document_of_a_run_with_adapters_means_that_run(folder: Path, tmp_path: Path, written_out: bool) -> None:
    own = [f"{folder}/adapted/config.yaml"] if written_out else adapted(folder, "model.lora={rank: 2}")
    first = f"{folder}/adapted/checkpoints/step-00000001"
    for name, given in {"whole": own, "adapter": [*own, "export.adapter=true"], "without": adapted(folder)}.items():
        assert main(["export", *given, "export.dtype=fp32", f"export.path={tmp_path}/{name}"]) == 0
    older = [f"model.init_from={first}", "export.dtype=fp32", f"export.path={tmp_path}/first"]
    export.main(load(f"{folder}/adapted/config.yaml", older))
    projection = "model.layers.0.self_attn.q_proj.weight"
    whole, older, without = (
        load_file(tmp_path / x / "model.safetensors")[projection] for x in ("whole", "first", "without")
    )
    start = load_file(folder / "base" / "export" / "model.safetensors")[projection]
    assert whole.equal(without) and not whole.equal(older) and not older.equal(start)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert main(["eval", *own, *EVAL, f"eval.label=own {written_out}"]) == 0
    assert (folder / "adapted" / "eval" / f"own {written_out}" / "eval.json").is_file()


@pytest.mark.parametrize(
    ("command", "run", "lora", "message"),
    [
        ("export", "adapted", "{rank: 4}", "model.lora.rank=4: must stay 2, with which"),
        ("eval", "adapted", "{rank: 2, alpha: 8.0}", "model.lora.alpha=8.0: must stay 16.0, with which"),
        (
            "export",
            "tuned",
            "{rank: 2}",
            "model.lora={'rank': 2, 'alpha': 16.0, 'targets': ['q', 'v']}: must stay None",
        ),
        ("export", "new", "{rank: 2}", "model.lora: is for training, export merges"),
        ("sft", "tuned", "{rank: 2}", "model.lora={'rank': 2, 'alpha': 16.0, 'targets': ['q', 'v']}: must stay None"),
        ("sft", "adapted", "null", "model.lora=None: must stay {'rank': 2, 'alpha': 16.0, 'targets': ['q', 'v']}"),
    ],
)
def test_other_adapters_than_those_of_the_run_are_refused(
    folder: Path, command: str, run: str, lora: str, message: str
) -> None:
    given = [*adapted(folder, f"run_dir={folder}/{run}", f"model.lora={lora}"), "train.steps=5", *EVAL]
    done = run_alone("llmtrain", command, *given)
    assert done.returncode == 2 and message in done.stdout and "Traceback" not in done.stdout, done.stdout[-2000:]


def test_rows_that_the_run_has_added_to_its_vocabulary_are_its_own(folder: Path, tmp_path: Path) -> None:
    grown = tuned(folder, "model.vocab_size=600")
    assert violations(grown, 1, "export") == []  # whether the run has so many says `commands.weights`
    elsewhere = tuned(folder, "model.vocab_size=600", f"run_dir={tmp_path}/new")
    assert violations(elsewhere, 1, "export")[0].startswith("model.vocab_size=600: must be the 512 of ")


def test_a_run_that_has_saved_nothing_never_means_its_base(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tuned", tmp_path / "run", ignore=shutil.ignore_patterns("step-*", "export"))
    config = load(tuned_document(folder), [f"run_dir={tmp_path}/run", f"model.init_from={folder}/base/export"])
    with pytest.raises(ValueError, match="no intact checkpoint in it; the run must save one first"):
        export.main(config)


def test_eval_has_a_directory_of_its_own_in_a_run(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "tuned", run)
    (run / "samples.jsonl").write_text('{"step": 1, "prompt": "p", "completion": "c", "reward": 1.0}\n')
    files = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    labels = ("one", "two/../..", "..", "zwei 2,5")
    for label in (*labels, "one"):
        over = (f"run_dir={run}", f"model.init_from={folder}/base/export", *EVAL, f"eval.label={json.dumps(label)}")
        config = load(tuned_document(folder), list(over))
        check(config, 1, "eval")
        evaluate.main(config)
    assert files == {name: (run / name).read_bytes() for name in files}
    found = [json.loads(path.read_text())["label"] for path in run.rglob("eval.json")]
    assert sorted(found) == sorted(labels) and len(os.listdir(run / "eval")) == len(labels)
    assert os.listdir(tmp_path) == ["run"]
    page = Path(report.write_report(str(run))).read_text()
    assert all(label in page for label in labels)


def test_a_run_begins_where_its_start_was_evaluated(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = load(tuned_document(folder), [f"run_dir={run}", f"model.init_from={folder}/tuned", *EVAL])
    evaluate.main(config)
    written = {name: (run / name).read_bytes() for name in ("config.yaml", "eval.json", "samples.jsonl")}
    os.makedirs(run / "eval" / "model")
    os.rename(run / "config.yaml", run / "eval" / "model" / "config.yaml")  # a move that was cut off
    make_room(run)
    make_room(run)
    assert {p.name: p.read_bytes() for p in (run / "eval" / "model").iterdir() if p.name[0] != "."} == written
    assert sorted(os.listdir(run)) == [".llmtrain.lock", "eval"]

    evaluate.main(config)  # before anything was trained there: again in its place
    assert sorted(os.listdir(run)) == [".llmtrain.lock", "eval"] and os.listdir(run / "eval") == ["model"]


def test_an_evaluation_that_was_changed_is_not_moved(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluate.main(load(tuned_document(folder), [f"run_dir={run}", f"model.init_from={folder}/tuned", *EVAL]))
    (run / "samples.jsonl").write_text("mine")
    before = sorted(os.listdir(run))
    make_room(run)
    assert sorted(os.listdir(run)) == before


def test_an_evaluation_of_an_earlier_version_is_replaced_and_one_of_the_users_is_not(
    folder: Path, tmp_path: Path
) -> None:
    over = (f"run_dir={tmp_path}/own", f"model.init_from={folder}/tuned", *EVAL)
    config = load(tuned_document(folder), list(over))
    evaluate.main(config)
    (tmp_path / "own" / ".llmtrain.json").unlink()  # as it was
    evaluate.main(config)
    (tmp_path / "own" / ".llmtrain.json").unlink()
    (tmp_path / "own" / "eval.json").write_text("mine")
    with pytest.raises(ValueError, match=r"own: holds .*eval\.json, .*which llmtrain did not write"):
        evaluate.main(config)
    assert (tmp_path / "own" / "eval.json").read_text() == "mine"


def test_a_report_replaces_its_own_alone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tuned", tmp_path / "run")
    for _ in range(2):
        report.main(load(tuned_document(folder), [f"run_dir={tmp_path}/run"]))
    (tmp_path / "run" / "report" / ".llmtrain.json").unlink()  # of an earlier version
    report.main(load(tuned_document(folder), [f"run_dir={tmp_path}/run"]))
    (tmp_path / "run" / "report" / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"report: holds notes\.md"):
        report.main(load(tuned_document(folder), [f"run_dir={tmp_path}/run"]))


def test_a_pretraining_document_is_evaluated_without_init_from(folder: Path) -> None:
    config = base(folder, *EVAL)
    assert config.model.init_from is None
    check(config, 1, "eval")
    evaluate.main(config)
    assert (folder / "base" / "eval" / "model" / "eval.json").is_file()
