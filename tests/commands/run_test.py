"""A run starts its stages in order, skips finished ones, goes on after a stop, and never mixes two settings."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.commands import run
from llmtrain.config.load import dump, load, stage_config
from llmtrain.config.schema import Config, LogConfig, RunConfig
from llmtrain.observe.locks import locked

DOCUMENT = """
name: q
run_dir: {folder}/q
train: {{steps: 5}}
stages:
  - {{name: data, command: data}}
  - {{name: pretrain, command: pretrain, ranks: 2}}
  - {{name: eval-sft, command: eval, set: {{eval: {{label: sft}}}}}}
"""
STAGE = "import sys, pathlib; d = pathlib.Path(sys.argv[1]); (d / 'log').open('a').write('ran\\n');"


def document(folder: Path, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(DOCUMENT.format(folder=folder))
    config = load(str(path), list(overrides))
    assert isinstance(config, RunConfig)
    return config


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Python for each stage, in the place of `llmtrain COMMAND`."""
    scripts: dict[str, str] = {}

    def command(stage_run: run.StageRun) -> list[str]:
        return [sys.executable, "-c", STAGE + scripts.get(stage_run.stage.name, ""), stage_run.directory]

    monkeypatch.setattr(run, "stage_command", command)
    return scripts


def ran(folder: Path, stage: str) -> int:
    log = folder / "q" / stage / "log"
    return log.read_text().count("ran") if log.exists() else 0


def test_stages_run_once_and_in_order(
    tmp_path: Path, bodies: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    bodies["eval-sft"] = '(d / \'eval.json\').write_text(\'{"label": "sft", "pass@1": 0.25, "perplexity": 8.5}\')'
    bodies["pretrain"] = "assert (d.parent / 'data' / 'done.json').exists()"
    (tmp_path / "q" / "report").mkdir(parents=True)
    (tmp_path / "q" / "report" / "index.html").write_text("")
    assert run.main(document(tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.index("[1/3] data") < out.index("[2/3] pretrain\n") < out.index("[2/3] pretrain: done in ")
    assert all(word in out for word in ("pass@1", "perplexity", "sft", "0.250", "8.500")) and "maj@8" not in out
    assert out.splitlines()[-1] == f"report: {tmp_path}/q/report/index.html"
    assert json.loads((tmp_path / "q" / "stages.json").read_text()) == ["data", "pretrain", "eval-sft"]
    assert load(str(tmp_path / "q" / "eval-sft" / "stage.yaml"), []).eval.label == "sft"

    assert run.main(document(tmp_path, "log.wandb=off")) == 0  # what is only logged changes nothing
    assert "[3/3] eval-sft: was done before" in capsys.readouterr().out
    assert [ran(tmp_path, s) for s in ("data", "pretrain", "eval-sft")] == [1, 1, 1]


def test_a_failing_stage_stops_the_run_which_then_goes_on(
    tmp_path: Path, bodies: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    bodies["pretrain"] = "sys.exit(7)"
    assert run.main(document(tmp_path)) == 7
    assert "[2/3] pretrain: ended with status 7 after" in (out := capsys.readouterr().out)
    assert f"its files are in {tmp_path}/q/pretrain" in out
    assert ran(tmp_path, "eval-sft") == 0
    bodies.clear()
    assert run.main(document(tmp_path)) == 0
    assert [ran(tmp_path, s) for s in ("data", "pretrain", "eval-sft")] == [1, 2, 1]


def test_a_stage_notes_what_it_was_made_from_and_the_time_of_all_attempts(
    tmp_path: Path, bodies: dict[str, str]
) -> None:
    made = f"data.path={tmp_path}/q/shards", f"stages.eval-sft.set.model.init_from={tmp_path}/q/pretrain/export"
    bodies["pretrain"] = "import time\nwhile time.process_time() < 1.5: pass\nsys.exit(7)"
    assert run.main(document(tmp_path, *made)) == 7
    bodies.clear()
    assert run.main(document(tmp_path, *made)) == 0
    done = {s: json.loads((tmp_path / "q" / s / "done.json").read_text()) for s in ("data", "pretrain", "eval-sft")}
    assert [each["made_from"] for each in done.values()] == [[], ["data"], ["data", "pretrain"]]
    assert done["pretrain"]["cpu_s"] >= 1.5 > done["data"]["cpu_s"]
    assert run.main(document(tmp_path, *made, "stages.pretrain.set.train.steps=6")) == 0  # another stage owes nothing
    assert json.loads((tmp_path / "q" / "pretrain" / "done.json").read_text())["cpu_s"] < 1.5


def test_other_settings_start_anew_and_so_does_all_that_follows(
    tmp_path: Path, bodies: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(document(tmp_path)) == 0
    assert run.main(document(tmp_path, "stages.pretrain.set.train.steps=6")) == 0
    assert f"kept as {tmp_path}/q/pretrain.old1, starting anew" in capsys.readouterr().out
    assert [ran(tmp_path, s) for s in ("data", "pretrain", "eval-sft")] == [1, 1, 1]
    assert [ran(tmp_path, s) for s in ("data.old1", "pretrain.old1", "eval-sft.old1")] == [0, 1, 1]


def test_hashes_follow_command_ranks_settings_and_predecessors(tmp_path: Path) -> None:
    base = [r.hash for r in run.planned_runs(document(tmp_path))]
    for override, first in (("stages.data.command=tokenizer", 0), ("stages.pretrain.ranks=4", 1), ("seed=1", 0)):
        hashes = [r.hash for r in run.planned_runs(document(tmp_path, override))]
        assert [a == b for a, b in zip(base, hashes, strict=True)] == [i < first for i in range(3)]


OUTSIDE = """
name: q
run_dir: {folder}/q
data: {{train: {folder}/own.jsonl, held_out: "{{run}}/data/sums-held_out.jsonl"}}
tokenizer: {{path: {folder}/tok, chat_template: {folder}/chat.jinja}}
model: {{init_from: {folder}/hf}}
stages:
  - {{name: data, command: data, set: {{data: {{sources: [{{name: own, type: text, path: "{folder}/texts/*"}}]}}}}}}
  - {{name: sft, command: sft}}
  - {{name: eval-sft, command: eval, set: {{model: {{init_from: "{{run}}/sft"}}, eval: {{text: false}}}}}}
"""


@pytest.fixture
def outside(tmp_path: Path) -> RunConfig:
    """A run that reads files from outside its directory."""
    for name in ("own.jsonl", "tok/tokenizer.json", "hf/model.safetensors", "texts/a.txt", "chat.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    (tmp_path / "run.yaml").write_text(OUTSIDE.format(folder=tmp_path))
    config = load(str(tmp_path / "run.yaml"), [])
    assert isinstance(config, RunConfig)
    return config


@pytest.mark.parametrize(
    ("changed", "anew"),
    [
        ("own.jsonl", ["sft", "eval-sft"]),
        ("hf/model.safetensors", ["sft", "eval-sft"]),
        ("texts/a.txt", ["data", "sft", "eval-sft"]),
        ("texts/b.txt", ["data", "sft", "eval-sft"]),
        ("chat.jinja", ["sft", "eval-sft"]),
        ("hf/README.md", []),
        ("q/sft/metrics.jsonl", []),  # made by a stage
        ("q/data/sums-held_out.jsonl", []),
    ],
)
def test_contents_of_data_files_count(
    tmp_path: Path, outside: RunConfig, bodies: dict[str, str], changed: str, anew: list[str]
) -> None:
    assert run.main(outside) == 0
    (tmp_path / changed).write_text("two")
    assert run.main(outside) == 0
    assert [name for name in ("data", "sft", "eval-sft") if (tmp_path / "q" / f"{name}.old1").exists()] == anew
    (tmp_path / changed).touch()  # another time alone is no change
    assert run.main(outside) == 0
    assert not list((tmp_path / "q").glob("*.old2"))


def test_a_tokenizer_that_a_stage_makes_is_no_change(
    tmp_path: Path, outside: RunConfig, bodies: dict[str, str]
) -> None:
    """Outside the run directory too: it was not there when the run began."""
    shutil.rmtree(tmp_path / "tok")
    bodies["data"] = "t = d.parent.parent / 'tok'; t.mkdir(exist_ok=True); (t / 'tokenizer.json').write_text('made')"
    assert [run.main(outside), run.main(outside)] == [0, 0]
    assert [ran(tmp_path, stage) for stage in ("data", "sft", "eval-sft")] == [1, 1, 1]


def test_hashes_without_files_from_outside_are_those_of_earlier_versions(tmp_path: Path) -> None:
    staged = stage_config(document(tmp_path), "data")
    content = ["data", 1, "", dump(staged.model_copy(update={"log": LogConfig()}))]
    assert run.planned_runs(document(tmp_path))[0].hash == hashlib.sha256(json.dumps(content).encode()).hexdigest()


def test_a_tokenizer_is_set_aside_with_the_data(tmp_path: Path, bodies: dict[str, str]) -> None:
    """Else the data would be made anew, with the tokenizer of the old settings."""
    bodies["data"] = "t = d.parent / 'tok'; t.mkdir(); (t / 'tokenizer.json').write_text('made')"
    over = ('tokenizer.path="{run}/tok"', "tokenizer.vocab_size=300")
    for _ in range(2):
        assert run.main(document(tmp_path, *over)) == 0
    assert run.main(document(tmp_path, *over, "stages.pretrain.set.train.steps=6")) == 0
    assert not (tmp_path / "q" / "tok.old1").exists()
    assert run.main(document(tmp_path, over[0], "tokenizer.vocab_size=301")) == 0
    assert (tmp_path / "q" / "tok.old1").exists() and (tmp_path / "q" / "tok").exists()


@pytest.mark.parametrize("name", ["stages.json", "pretrain/stage.yaml"])
def test_files_of_the_users_are_not_taken_for_a_runs(tmp_path: Path, bodies: dict[str, str], name: str) -> None:
    (tmp_path / "q" / "pretrain").mkdir(parents=True)
    (tmp_path / "q" / name).write_text('{"mine": 1}')
    with pytest.raises(
        ValueError, match=f"q/{name}: `llmtrain run` did not write this file; give the run another name"
    ):
        run.main(document(tmp_path))
    assert (tmp_path / "q" / name).read_text() == '{"mine": 1}'


def test_set_aside_through_a_link_and_beside_what_has_the_name(tmp_path: Path, bodies: dict[str, str]) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "q" / "pretrain").symlink_to("../disk")
    (tmp_path / "disk.old1").symlink_to("nowhere")
    assert run.main(document(tmp_path)) == 0
    assert run.main(document(tmp_path, "stages.pretrain.set.train.steps=6")) == 0
    assert (tmp_path / "q" / "pretrain").is_symlink() and (tmp_path / "disk.old1").is_symlink()
    assert [(tmp_path / name / "log").read_text() for name in ("disk", "disk.old2")] == ["ran\n", "ran\n"]


def test_a_stage_at_which_another_job_works_is_not_set_aside(tmp_path: Path, bodies: dict[str, str]) -> None:
    assert run.main(document(tmp_path)) == 0
    with locked(str(tmp_path / "q" / "pretrain")), pytest.raises(ValueError, match="pretrain: another job is at work"):
        run.main(document(tmp_path, "stages.pretrain.set.train.steps=6"))
    assert not list((tmp_path / "q").glob("*.old1"))


def test_command_and_threads_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, pretrain, _ = run.planned_runs(document(tmp_path))
    assert run.stage_command(data) == [sys.executable, "-m", "llmtrain", "data", f"{tmp_path}/q/data/stage.yaml"]
    command = run.stage_command(pretrain)
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert command[-4:] == ["-m", "llmtrain", "pretrain", f"{tmp_path}/q/pretrain/stage.yaml"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    assert [run.child_environment(ranks)["OMP_NUM_THREADS"] for ranks in (1, 4, 9)] == ["6", "1", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run.child_environment(1)["OMP_NUM_THREADS"] == "3"


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny: has no `stages:`"):
        run.main(Config(name="tiny"))


def test_one_run_at_a_time(tmp_path: Path) -> None:
    at_work = pytest.raises(ValueError, match="another job is at work there")
    with locked(str(tmp_path)), at_work, locked(str(tmp_path), patience_s=0.0):
        pass
    with locked(str(tmp_path), patience_s=0.0):
        pass


ROUNDS = """
name: q
run_dir: {folder}/q
train: {{steps: 5}}
stages:
  - {{name: sft, command: sft}}
  - name: rounds
    repeat: 3
    stages:
      - {{name: "sample-{{round}}", command: eval, set: {{seed: "{{round}}"}}}}
      - name: tune-{{round}}
        command: sft
        set: {{model: {{init_from: "{{run}}/tune-{{previous}}"}}}}
        first: {{model: {{init_from: "{{run}}/sft"}}}}
  - {{name: export, command: export, set: {{model: {{init_from: "{{run}}/tune-{{last}}"}}}}}}
"""


def rounds(folder: Path, *overrides: str) -> RunConfig:
    path = folder / "rounds.yaml"
    path.write_text(ROUNDS.format(folder=folder))
    config = load(str(path), list(overrides))
    assert isinstance(config, RunConfig)
    return config


def test_a_run_that_ended_in_a_round_goes_on_there(tmp_path: Path, bodies: dict[str, str]) -> None:
    bodies["tune-1"] = "assert (d.parent / 'sft' / 'done.json').exists()"
    bodies["tune-2"] = "assert (d.parent / 'tune-1' / 'done.json').exists(); sys.exit(3)"
    assert run.main(rounds(tmp_path)) == 3
    bodies["tune-2"] = ""
    assert run.main(rounds(tmp_path)) == 0
    names = ["sft", *(f"{name}-{i}" for i in (1, 2, 3) for name in ("sample", "tune")), "export"]
    assert json.loads((tmp_path / "q" / "stages.json").read_text()) == names  # the order of the report
    assert [ran(tmp_path, name) for name in names] == [1, 1, 1, 1, 2, 1, 1, 1]
    starts = [load(str(tmp_path / "q" / name / "stage.yaml"), []).model.init_from for name in (*names[2::2], "export")]
    assert [Path(start).name for start in starts] == ["sft", "tune-1", "tune-2", "tune-3"]


def test_more_rounds_later_go_on_behind_the_last(tmp_path: Path, bodies: dict[str, str]) -> None:
    assert run.main(rounds(tmp_path)) == 0
    assert run.main(rounds(tmp_path, "stages.rounds.repeat=4")) == 0
    assert [ran(tmp_path, f"{name}-{i}") for i in (1, 2, 3, 4) for name in ("sample", "tune")] == [1] * 8
    assert [ran(tmp_path, name) for name in ("sft", "export", "export.old1")] == [1, 1, 1]  # export is of another round
    assert not list((tmp_path / "q").glob("*-[1234].old1"))
    assert load(str(tmp_path / "q" / "export" / "stage.yaml"), []).model.init_from == f"{tmp_path}/q/tune-4"


def test_a_change_of_one_round_redoes_what_follows(tmp_path: Path, bodies: dict[str, str]) -> None:
    assert run.main(rounds(tmp_path)) == 0
    assert run.main(rounds(tmp_path, "stages.sample-2.set.seed=9")) == 0
    redone = sorted(path.name for path in (tmp_path / "q").glob("*.old1"))
    assert redone == [*("export.old1", "sample-2.old1", "sample-3.old1", "tune-2.old1", "tune-3.old1")]


# A run in a process of its own whose only stage notes its pid, then sleeps; it ignores SIGTERM if told to.
OUTER = """
import sys
from llmtrain.config.load import dump, load, stage_config
from llmtrain.commands import run
run.GRACE_S = 1
inner = '''import os, pathlib, signal, sys, time
if {deaf}: signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1], "pid").write_text(str(os.getpid()))
time.sleep(60)'''
run.stage_command = lambda stage_run: [sys.executable, "-c", inner, stage_run.directory]
sys.exit(run.main(load({path!r}, [])))
"""


def start_outer(folder: Path, deaf: bool) -> tuple[subprocess.Popen, int]:
    """The run's process and the pid of its stage."""
    document(folder)
    code = OUTER.format(path=str(folder / "run.yaml"), deaf=deaf)
    outer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    pid = folder / "q" / "data" / "pid"
    wait_until(lambda: pid.exists() and pid.read_text() != "")
    return outer, int(pid.read_text())


def wait_until(condition: object, limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    ("number", "deaf", "status"),
    [(signal.SIGTERM, False, 143), (signal.SIGINT, False, 130), (signal.SIGTERM, True, 143)],
)
def test_a_signal_ends_the_stage_and_then_the_run(tmp_path: Path, number: int, deaf: bool, status: int) -> None:
    outer, pid = start_outer(tmp_path, deaf)
    outer.send_signal(number)
    assert outer.wait(timeout=20) == status
    assert gone(pid) and not (tmp_path / "q" / "data" / "done.json").exists()


def test_a_killed_run_takes_its_stage_along(tmp_path: Path) -> None:
    outer, pid = start_outer(tmp_path, deaf=False)
    outer.kill()
    outer.wait(timeout=20)
    wait_until(lambda: gone(pid))
    with locked(str(tmp_path / "q"), patience_s=5.0):
        pass


def test_a_deaf_stage_of_a_killed_run_keeps_the_lock(tmp_path: Path) -> None:
    outer, pid = start_outer(tmp_path, deaf=True)
    outer.kill()
    outer.wait(timeout=20)
    try:
        with pytest.raises(ValueError, match="another job is at work"), locked(str(tmp_path / "q"), patience_s=0.5):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
