"""The command line: exit codes, one-line errors, nothing heavy before the configuration is checked."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain import cli
from llmtrain.config.recipes import RECIPES
from llmtrain.config.schema import Config


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text("train:\n  seq_len: 64\n")
    return str(path)


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A trainer of the tests in the place of the real one."""
    module = types.ModuleType("llmtrain.trainer.pretend")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    pretends = replace(RECIPES["pretrain"], main=f"{module.__name__}:main")
    monkeypatch.setitem(RECIPES, "pretrain", pretends)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return module


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.commands()) and cli.EXAMPLE in out
    assert cli.main(["chat", "--help"]) == 0
    assert capsys.readouterr().out == out
    assert cli.main([]) == 2


def test_the_command_gets_the_configuration(tiny: str, pretrain: types.ModuleType) -> None:
    seen: list[Config] = []
    pretrain.main = seen.append
    assert cli.main(["pretrain", tiny, "train.steps=7", "optim.lr=1e-3"]) == 0
    assert (seen[0].train.steps, seen[0].train.seq_len, seen[0].optim.lr) == (7, 64, 1e-3)
    pretrain.main = lambda config: 5
    assert cli.main(["pretrain", tiny]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian", "x.yaml"], "pretrian: unknown command, did you mean pretrain?"),
        (["qqqq"], "qqqq: unknown command, choose one of data, tokenizer, "),
        (["pretrain"], "pretrain: needs a configuration file, as in: llmtrain pretrain configs/"),
        (["pretrain", "train.steps=3"], "pretrain: needs a configuration file"),
        (["doctor", "x"], "doctor: takes no arguments but --measure FILE.yaml, got x"),
        (["chat"], "chat: the following arguments are required: RUN|DIRECTORY; llmtrain chat RUN|DIRECTORY"),
        (["chat", "no/where/x"], "no/where/x: no such directory; give that of a run or of a Hugging Face model"),
        (
            ["chat", "no/where"],
            "no/where: does not exist, and the Hugging Face hub cannot be asked from here (no network",
        ),
        (["pretrain", "no.yaml"], "no.yaml: cannot be read: No such file or directory"),
        (
            ["pretrain", "{tiny}", "parallel.tensor=2"],
            "override 'parallel.tensor=2': parallel.tensor: unknown key, did you",
        ),
        (["pretrain", "{tiny}", "parallel.tp=2"], "parallel: pp 1 x"),
        (["run", "{tiny}"], "tiny: has no `stages:`"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    arguments: list[str], message: str, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (
        cli.main([a.replace("{tiny}", tiny) for a in arguments] + (["name=tiny"] if arguments[0] == "run" else [])) == 2
    )
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message) and err.count("\n") == 1


def test_only_rank_0_tells_what_all_ranks_find(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, told in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["pretrain", tiny, "parallel.tp=3"]) == 2
        assert bool(capsys.readouterr().err) == told


def test_what_happens_later_sets_the_status(
    tiny: str, pretrain: types.ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def define(body: str) -> None:
        exec(f"def main(config):\n    {body}", pretrain.__dict__)

    define("raise ValueError('shard 3: is empty; make it again')")
    assert cli.main(["pretrain", tiny]) == 2
    assert capsys.readouterr().err == "shard 3: is empty; make it again\n"
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["pretrain", tiny]) == 2
    assert capsys.readouterr().err == "rank 3: shard 3: is empty; make it again\n"
    define("import json; json.loads('{')")  # a library's ValueError is a bug of ours: show where
    assert cli.main(["pretrain", tiny]) == 1
    assert "Traceback" in capsys.readouterr().err
    define("raise FloatingPointError('step 3: loss is nan')")
    assert cli.main(["pretrain", tiny]) == 1
    assert capsys.readouterr().err == "rank 3: step 3: loss is nan\n"
    define("raise KeyError('bug')")
    assert cli.main(["pretrain", tiny]) == 1
    assert "Traceback" in capsys.readouterr().err
    define("raise KeyboardInterrupt")
    assert cli.main(["pretrain", tiny]) == 130


def test_a_message_is_written_in_one_piece(
    tiny: str, pretrain: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else those of two ranks run into one line."""
    pieces: list[str] = []
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=pieces.append, flush=lambda: None))
    for body in ("raise FloatingPointError('step 3: loss is nan')", "raise KeyError('bug')"):
        exec(f"def main(config):\n    {body}", pretrain.__dict__)
        assert cli.main(["pretrain", tiny]) == 1
    assert cli.main(["pretrain", tiny, "no.key=1"]) == 2
    assert len(pieces) == 3 and all(piece.endswith("\n") for piece in pieces)


def test_as_a_module_with_nothing_heavy_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("\n\nparallel:\n  tensor: 2\n")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llmtrain", "pretrain", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"{path}:4: parallel.tensor: unknown key, did you mean parallel.tp?"
    assert "| torch\n" not in done.stderr and "pydantic" in done.stderr


def test_a_finished_process_leaves_without_teardown() -> None:
    """What is still held when the interpreter ends cannot change the exit code; exit handlers run."""
    code = """
import atexit, os, sys, types
from llmtrain import cli
class Held:
    def __del__(self):
        os.abort()
held = sys.held = Held()
sys.modules["torch"] = types.ModuleType("torch")
atexit.register(print, "told")
cli.main = lambda: 75
cli.entry()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (75, "told\n"), done.stderr


def test_the_compiler_is_imported_only_by_runs_that_compile() -> None:
    """It is 2 s of a start. Not by any command, by the shapes of a model, or by what DeepSpeed asks about Muon."""
    modules = sorted({target.partition(":")[0] for target, _ in cli.commands().values()})
    code = f"""
import sys, {", ".join(modules)}
from llmtrain.config.schema import ModelConfig
from llmtrain.arch.resolve import resolve_model
from llmtrain.engine.zero import _import_muon
from llmtrain.model.decoder import parameter_shapes
parameter_shapes(resolve_model(ModelConfig(num_layers=1, positions="learned")))
_import_muon()
sys.exit("torch._dynamo" in sys.modules)
"""
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    assert subprocess.run([sys.executable, "-c", code], timeout=120, env=environment).returncode == 0
