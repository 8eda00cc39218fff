"""An algorithm that is not in the package: its section, its loss and its loop, and nothing else knows of it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import create_model
from safetensors.torch import load_file

from llmtrain import cli
from llmtrain.config.load import ConfigError, load, stage_config
from llmtrain.config.recipes import RECIPES, Recipe, register
from llmtrain.config.schema import Section
from llmtrain.rules.check import check
from llmtrain.types import Batch, Scores
from tests.conftest import ROOT

FOCAL = "plugins: [tests.recipes.toy_recipe]\nfocal: {gamma: 1.0}\n"
LAYOUT = ("parallel.pp=2", "parallel.tp=2")
NAMES = ("step", "loss", "grad_norm", "lr", "weight", "tokens")


@pytest.fixture(scope="module", autouse=True)
def as_before() -> Iterator[None]:
    """Forgets the toy when these tests are done: other tests of this process know the package's recipes."""
    before = dict(RECIPES)
    yield
    RECIPES.clear()
    RECIPES.update(before)


@pytest.fixture
def document(small: Path) -> Path:
    small.write_text(small.read_text() + FOCAL)
    return small


def numbers(run: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in NAMES] for line in lines]


def test_the_loss_by_hand() -> None:
    from tests.recipes.toy_loop import focal_loss

    batch = Batch(*[torch.ones(1, 2, dtype=torch.long)] * 2, torch.tensor([[True, False]]), torch.zeros(1, 2).long())
    loss, metrics = focal_loss(Scores(torch.tensor([[0.25, 0.5]]).log()), batch, gamma=2.0)
    assert loss.item() == pytest.approx(0.75**2 * math.log(4)) and metrics["weight"].item() == pytest.approx(0.75**2)


def test_four_ranks_are_one_and_a_killed_run_goes_on(document: Path, forked: Callable, tmp_path: Path) -> None:
    for name, ranks, keys in (("one", 1, ()), ("four", 4, LAYOUT)):
        result = forked(ranks, "llmtrain", "focal", document, f"run_dir={tmp_path / name}", *keys, timeout_s=120)
        assert result.returncode == 0, result.stdout[-3000:]
    one, four = numbers(tmp_path / "one"), numbers(tmp_path / "four")
    assert len(one) == 6 and one[0][1] < math.log(512)  # a token weighs less than 1
    for here, there in zip(four, one, strict=True):
        assert here == pytest.approx(there, rel=1e-4)  # fp32, sums in another order
    shutil.copytree(tmp_path / "four/checkpoints/step-00000003", tmp_path / "again/checkpoints/step-00000003")
    result = forked(4, "llmtrain", "focal", document, f"run_dir={tmp_path / 'again'}", *LAYOUT, timeout_s=120)
    assert result.returncode == 0 and "resumed" in result.stdout, result.stdout[-3000:]
    assert numbers(tmp_path / "again") == four[3:]
    for file in (tmp_path / "four/checkpoints/step-00000006").glob("*.safetensors"):
        again = load_file(tmp_path / "again/checkpoints/step-00000006" / file.name)
        assert all(again[name].equal(tensor) for name, tensor in load_file(file).items())
    other = ("focal.gamma=2", f"run_dir={tmp_path / 'again'}", *LAYOUT)
    result = forked(4, "llmtrain", "focal", document, *other, timeout_s=120)
    assert result.returncode != 0 and "focal.gamma=2.0: must stay 1.0, with which" in result.stdout


def test_a_wrong_key_is_one_line_with_its_place_and_remedy(document: Path) -> None:
    document.write_text(document.read_text().replace("gamma: 1.0", "gama: 1.0"))
    line = len(document.read_text().splitlines())
    with pytest.raises(ConfigError) as fault:
        load(str(document), [])
    assert str(fault.value) == f"{document}:{line}: focal.gama: unknown key, did you mean focal.gamma?"
    with pytest.raises(ConfigError, match=r"focal\.gamma=9: must be at most 5; lower it"):
        document.write_text(document.read_text().replace("gama: 1.0", "gamma: 9"))
        check(load(str(document), []), 1, "focal")
    document.write_text(document.read_text().replace(FOCAL.splitlines()[0], ""))
    code = f"from llmtrain.config.load import load; load({str(document)!r}, [])"  # where no test has registered it
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "focal: unknown key; remove it" in done.stderr


def test_it_is_listed_planned_and_a_stage(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help", str(document)]) == 0
    assert re.search(r"\n  focal +fine-tune with the focal loss\n", capsys.readouterr().out)
    assert cli.main(["plan", str(document)]) == 0
    assert "small (focal)\n" in (planned := capsys.readouterr().out) and "8 x 64 tokens = 512 a step" in planned
    without = document.read_text().replace("focal: {gamma: 1.0}\n", "").replace("grpo: {prompts_per_step: 4}\n", "")
    (document.parent / "without.yaml").write_text(without)
    assert cli.main(["plan", str(document.parent / "without.yaml")]) == 0  # its plugin says what it is for
    assert "small (focal)\n" in capsys.readouterr().out
    assert cli.main(["plan", str(document), "focal.gamma=9"]) == 2 and "at most 5" in capsys.readouterr().err
    document.write_text(document.read_text() + "stages:\n  - {name: tune, command: focal, set: {focal: {gamma: 3}}}\n")
    assert stage_config(load(str(document), []), "tune").focal.gamma == 3
    assert cli.main(["plan", str(document)]) == 0 and "tune (focal)\n" in capsys.readouterr().out
    assert cli.main(["focale", str(document)]) == 2
    assert "focale: unknown command, did you mean focal?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "export", "train", "plan", "stages", "include", "copy", "", "a.b"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"recipe .{re.escape(name)}.: the name of a section or command"):
        register(Recipe(name, "", "nowhere:main"))
    with pytest.raises(ValueError, match=r"recipe .sft.: there is one with this name already"):
        register(Recipe("sft", "another", "nowhere:main"))
    with pytest.raises(ValueError, match="gamma has no default"):
        register(Recipe("other", "", "nowhere:main", section=create_model("X", __base__=Section, gamma=(float, ...))))
    with pytest.raises(ValueError, match=r"main='nowhere': must have the form module:function"):
        register(Recipe("other", "", "nowhere"))
    assert RECIPES["sft"].main == "llmtrain.recipes.sft:main" and "other" not in RECIPES
