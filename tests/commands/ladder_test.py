"""`llmtrain ladder`: what is done stays done, failed runs are named, and one command leads to the plots. The runs are
stubs: a program in the place of the interpreter that writes what `llmtrain run` would."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main
from llmtrain.commands import ladder as module
from llmtrain.commands import run
from llmtrain.config.load import load
from llmtrain.scaling import ladder as scaling_ladder
from llmtrain.scaling.ladder import Member, member_dir, members

# Ends as stub.json in the run's directory says, and counts its starts.
STUB = """#!{python} -SE
import json, os, sys, time
assert sys.argv[1:4] == ["-m", "llmtrain", "run"], sys.argv
d = os.path.dirname(sys.argv[4])
with open(d + "/starts", "a") as file:
    file.write("x")
stub = json.load(open(d + "/stub.json"))
print("this is", os.path.basename(d), "threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
time.sleep(stub.get("sleep_s", 0))
if os.path.exists(d + "/fail"):
    print("oh no")
    sys.exit(3)
for stage, digest in stub["hashes"].items():
    os.makedirs(d + "/" + stage, exist_ok=True)
    json.dump({{"hash": digest, "seconds": 2.0}}, open(d + "/" + stage + "/done.json", "w"))
json.dump({{"loss": stub["loss"], "bits_per_byte": 1.0}}, open(d + "/eval/eval.json", "w"))
"""

SBATCH = """#!{python} -SE
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
with open(os.environ["CALLS"], "a") as file:
    print(sys.argv[1:-1], script, file=file)
if os.environ.get("REFUSE"):
    print("no such partition", file=sys.stderr)
    sys.exit(1)
last = int(re.search(r"#SBATCH --array=0-(\\d+)", script)[1])
print("Submitted batch job 7")
ends = [subprocess.run(["bash", sys.argv[-1]], env={{**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}}).returncode
        for task in range(last + 1)]
sys.exit(max(ends))
"""

MANY = "ladder.budgets=[{flops: 1e11}, {flops: 2e11}]"
WIDTHS = (32, 48, 64)


def shape(width: int) -> dict[str, int]:
    return {**{"num_layers": 2, "hidden_size": width, "ffn_size": 3 * width}, "num_heads": 2, "num_kv_heads": 2}


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ladder of three runs over shards that are there, with stubs in the place of its runs."""
    sources = {"a": {"train": {"documents": 9, "tokens": 5_000_000, "bytes": 9}}}
    for name in ("shards", "tokenizer"):
        (tmp_path / name).mkdir()
    (tmp_path / "shards" / "shards.json").write_text(json.dumps({"sources": sources}))
    text = {
        "name": "l",
        "run_dir": str(tmp_path / "l"),
        "model": {"vocab_size": 100, "max_positions": 64, "mup": {"base_hidden": 32}},
        "tokenizer": {"path": str(tmp_path / "tokenizer")},
        "data": {"path": str(tmp_path / "shards")},
        "train": {"seq_len": 64, "micro_batch_seqs": 4, "global_batch_seqs": 8},
        "ladder": {
            "sizes": [shape(width) for width in WIDTHS],
            "budgets": [{"flops": 1e11}],
            "max_epochs": 100.0,
        },
        "scaling": {"method": ["parabolas"], "bootstrap": 0},
    }
    (tmp_path / "l.yaml").write_text(json.dumps(text))
    for name, program in (("python", STUB), ("sbatch", SBATCH)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(program.format(python=sys.executable))
        path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "l.yaml"


def stubs(path: Path, *overrides: str, **more: Any) -> list[Path]:
    """Writes what the stubs need; returns the directories of the runs."""
    config = load(str(path), list(overrides))
    found = members(config)
    for member in found:
        module.write_document(config, member)
        stages = run.planned_runs(scaling_ladder.document(config, member))
        stub = {"hashes": {each.stage.name: each.hash for each in stages}, "loss": loss(member), **more}
        Path(member_dir(config, member), "stub.json").write_text(json.dumps(stub))
    return [Path(member_dir(config, member)) for member in found]


def loss(member: Member) -> float:
    """A parabola with its minimum at N* = 0.2 C^0.5."""
    return 2 + math.log10(member.size.params / (0.2 * member.flops**0.5)) ** 2


def starts(folders: list[Path]) -> list[int]:
    return [len((each / "starts").read_text()) if (each / "starts").exists() else 0 for each in folders]


def test_one_command_to_the_plots(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = stubs(document, MANY)
    assert len(folders) == 6
    assert main(["ladder", str(document), MANY, "ladder.workers=4"]) == 0
    said = capsys.readouterr().out
    assert "0 of 6 runs are done, 6 to run" in said and "[6/6]" in said
    assert {path.name for path in (document.parent / "l/scaling").glob("*.*")} >= {"isoflops.png", "optima.png"}
    with open(document.parent / "l/results.csv", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    assert first["id"] == "1e11-2x32" and first["params"] == "29984" and first["seconds"] == "2.0"
    assert float(first["flops"]) == 6 * 29_984 * int(first["tokens"])
    assert float(first["flops"]) == pytest.approx(1e11, rel=1e-3)
    found = json.loads((document.parent / "l/scaling/scaling.json").read_text())
    assert found["methods"]["parabolas"]["params"]["exponent"] == pytest.approx(0.5, abs=1e-3), "budgets in whole steps"


def test_failed_runs_are_named_and_only_they_are_redone(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = stubs(document)
    for number in (1, 2):
        (folders[number] / "fail").touch()
    assert main(["ladder", str(document)]) == 1
    said = capsys.readouterr().out
    assert f"1e11-2x48: failed with status 3 after 0 s; its log is {folders[1]}/run.log, its last words: " in said
    assert "oh no" in said and f"1e11-2x64: not done; its log is {folders[2]}/run.log" in said
    assert "2 of 3 runs are not done: no laws are fitted" in said
    assert len((document.parent / "l/results.csv").read_text().splitlines()) == 2
    assert not (document.parent / "l/scaling").exists()

    (folders[1] / "fail").unlink()
    assert main(["ladder", str(document)]) == 1, "one fails again"
    assert starts(folders) == [1, 2, 2]
    assert "1 of 3 runs are done, 2 to run" in capsys.readouterr().out


def test_other_settings_are_other_runs(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = "ladder.budgets.0.sizes=[2x32, 2x48]"
    stubs(document, few)
    assert main(["ladder", str(document), few]) == 2, "two runs give no law"
    assert "scaling.method=parabolas: needs two budgets" in capsys.readouterr().err
    folders = stubs(document, few, "optim.lr=1e-3")
    assert main(["ladder", str(document), few, "optim.lr=1e-3"]) == 2
    assert starts(folders) == [2] * 2
    assert main(["ladder", str(document), few, "optim.lr=1e-3", "log.every_steps=7", "scaling.bootstrap=9"]) == 2
    assert starts(folders) == [2] * 2, "what is only logged or fitted changes no run"


def test_a_run_is_known_by_its_file(document: Path) -> None:
    """What `llmtrain run` makes of the file is what the ladder looks for."""
    config = load(str(document), ["ladder.budgets.0.sizes=[2x32]"])
    [member] = members(config)
    module.write_document(config, member)
    in_file = run.planned_runs(load(module.task_of(config, member).document, []))
    in_memory = run.planned_runs(scaling_ladder.document(config, member))
    assert [each.hash for each in in_file] == [each.hash for each in in_memory]


def test_threads_are_shared_out(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    few = "ladder.budgets.0.sizes=[2x32]"
    folders = stubs(document, few)
    main(["ladder", str(document), few, "ladder.workers=4"])
    assert "threads 2" in (folders[0] / "run.log").read_text()


def test_a_signal_ends_all_and_the_next_call_goes_on(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = stubs(document, sleep_s=30)
    began = time.monotonic()
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert main(["ladder", str(document), "ladder.workers=2"]) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 20
    assert sum(starts(folders)) == 2, "none is started any more"
    assert "stopped after" in capsys.readouterr().out
    stubs(document)
    main(["ladder", str(document)])
    assert sum(starts(folders)) == 5


def test_slurm(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = stubs(document)
    (folders[2] / "fail").touch()
    over = ["ladder.executor=slurm", "ladder.workers=5", "ladder.slurm={partition: cpu, time: '1:00:00'}"]
    assert main(["ladder", str(document), *over]) == 1
    assert "1e11-2x64: not done; its log is" in capsys.readouterr().out
    calls = (document.parent / "calls").read_text()
    for line in ("--array=0-2%5", "--partition=cpu", "--time=1:00:00", "--signal=B:TERM@120", "--job-name=l"):
        assert f"#SBATCH {line}\n" in calls
    assert "['--wait']" in calls and "oh no" in (folders[2] / "run.log").read_text()

    (folders[2] / "fail").unlink()
    assert main(["ladder", str(document), *over]) == 2, "three runs of one budget give no law"
    assert "--array=0-0%5" in (document.parent / "calls").read_text(), "the one that is missing"
    assert starts(folders) == [1, 1, 2]


def test_what_slurm_refuses(
    document: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs(document)
    monkeypatch.setenv("REFUSE", "1")
    assert main(["ladder", str(document), "ladder.executor=slurm"]) == 1
    assert "sbatch took no job (exit status 1): no such partition" in capsys.readouterr().err
    (document.parent / "bin/sbatch").unlink()
    monkeypatch.setenv("PATH", str(document.parent / "bin"))
    assert main(["ladder", str(document), "ladder.executor=slurm"]) == 1
    assert "sbatch cannot be started: No such file or directory; set ladder.executor=local" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", str(document), "--dry-run", "ladder.flops_per_s=1e9"]) == 0
    said = capsys.readouterr().out
    assert "3 runs, N = all parameters" in said and "100 s" in said
    assert "about 5 min to train what is left" in said, "3 x 1e11 / 1e9 s"
    assert not (document.parent / "l").exists()


def test_repeated_text(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = "ladder.budgets=[{flops: 2.7e12}]"
    assert main(["ladder", str(document), "--dry-run", wide]) == 0
    said = capsys.readouterr().out
    assert "warning: runs that see text more than once: 2; most 2.7e12-2x32, 3.0 times" in said, (
        "2.7e12 / (6 x 29,984 x 5e6)"
    )
    assert main(["ladder", str(document), "--dry-run", wide, "ladder.max_epochs=1.5"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("ladder.max_epochs=1.5: 2.7e12-2x32 sees a source 3.0 times; give more text")


REFUSED = [
    ("ladder.sizes=[]", "ladder.sizes: must name at least one size"),
    ("ladder.budgets=[]", "ladder.budgets: must name at least one budget"),
    (
        "ladder.budgets=[{flops: 1e12}, {flops: 1.02e12}]",
        "1e+12 and 1.02e+12 are within 5 %, which is one for the laws",
    ),
    ("ladder.budgets=[{flops: 1e9}]", "must be at least ladder.min_steps=50"),
    ("model.mup=null", "ladder.lr.by=mup: needs the width whose lr was tuned"),
    ("ladder.lr.by=same", "ladder.lr.by=same: not with model.mup"),
    ("ladder.lr={by: power, coefficient: 1.0}", "ladder.lr.by=power: needs ladder.lr.coefficient and"),
    ("ladder.lr.exponent=1.0", "ladder.lr.by=mup: coefficient and exponent are for by=power"),
    ("ladder.batch.exponent=1.0", "ladder.batch: coefficient and exponent belong together"),
    ("optim.schedule=constant", "optim.schedule=constant: each run of a ladder must end at a low lr"),
    ("train.batch_ramp=[{from_tokens: 9, global_batch_seqs: 16}]", "train.batch_ramp: must be empty in a ladder"),
    ("model.init_from=x", "model.init_from=x: gives one shape"),
    ("model.mtp_layers=1", "6 N D does not count them"),
    ("data.path=null", "data.sources: must name text to train on"),
    ("ladder.slurm={partition: a}", "ladder.slurm: only with ladder.executor=slurm"),
    ("ladder.slurm={array: 1-2}", "ladder.slurm.array=1-2: is set by the ladder; remove it"),
    ("ladder.sizes.0.num_heads=5", "ladder, run 1e11-2x32: model."),
    ("model.max_positions=32", "ladder, run 1e11-2x32: train.seq_len=64: must be at most model.max_positions=32"),
    ("ladder.sizes.0.name=../x", "ladder.sizes.0.name"),
    ("ladder.budgets.0.flops=-1", "ladder.budgets.0.flops"),
    ("ladder.warmup_share=1.0", "ladder.warmup_share"),
]


@pytest.mark.parametrize(("override", "told"), REFUSED)
def test_impossible_ladders_are_refused(
    document: Path, capsys: pytest.CaptureFixture[str], override: str, told: str
) -> None:
    assert main(["ladder", str(document), override]) == 2
    assert told in capsys.readouterr().err
    assert not (document.parent / "l").exists(), "before anything is written"


def test_it_is_one_process(document: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["ladder", str(document)]) == 2
    assert "ladder runs in one process" in capsys.readouterr().err
