"""The documents: generated pages are what the code says, and links and paths lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from llmtrain.config.machine import torch_version
from llmtrain.config.schema import Config, RepeatConfig, RoundConfig, StageConfig
from llmtrain.rules.layout import ZERO_BUBBLE_TORCH

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / each / "README.md" for each in (".", "benchmarks", "tests")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")  # relative ones, without their anchor
PATH = re.compile(r"`((?:llmtrain|configs|launch|tests|docs|docker|benchmarks)/[\w./-]+)")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return script("generate")


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of every field that is not itself a section."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_configuration_is_current(generate: ModuleType) -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == generate.render(), "run `python docs/generate.py`"


@pytest.mark.skipif(torch_version() < ZERO_BUBBLE_TORCH, reason="the table is that of the newest torch")
def test_parallelism_is_current() -> None:
    written = (ROOT / "docs" / "parallelism.md").read_text()
    assert written == script("parallelism").render(), "run `python docs/parallelism.py`"


def test_every_key_stands_there_with_its_meaning(generate: ModuleType) -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \|.*\| (.*) \|$", generate.render(), re.M))
    of_stages = [*keys(StageConfig, "stages.*."), *keys(RepeatConfig, "stages.*.")]
    of_stages += keys(RoundConfig, "stages.*.stages.*.")
    for key in [*keys(Config), *of_stages, "data.sources.*.weight", "model.rope_scaling.factor"]:
        assert rows.get(key), f"{key}: give its line in llmtrain/config/schema.py a comment"


def test_values_and_comments(generate: ModuleType) -> None:
    page = generate.render()
    assert "| `engine.zero_stage` | integer ≥ 0 ≤ 3 | `1` |" in page
    assert "| `rollout.max_logprob_gap` | number > 0 or null | `null` | generator against trainer; null = " in page
    assert "prompt\\|messages" in page and "&lt;run directory>" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    broken = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    broken += [path for path in PATH.findall(text) if not (ROOT / path.rstrip(".")).exists()]
    assert broken == []


def test_the_example_of_a_recipe_is_the_one_that_is_tested() -> None:
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.S)
    assert [name for name, _ in blocks] == ["tests/recipes/toy_recipe.py", "tests/recipes/toy_loop.py"]
    for name, code in blocks:
        tested = (ROOT / name).read_text().splitlines()
        assert [line for line in code.splitlines() if line not in tested] == []


def test_examples_of_tests_run(forked: Callable, tmp_path: Path) -> None:
    """Writes each block of tests/README.md to the file that its first line names, and calls the tests in them."""
    blocks = re.findall(r"```python\n# tests/(\S+)\n(.*?)```", (ROOT / "tests" / "README.md").read_text(), re.S)
    places = [tmp_path / Path(name).name for name, _ in blocks]
    for place, (_, code) in zip(places, blocks, strict=True):
        place.write_text(code)
    assert [place.name for place in places] == ["sampler_test.py", "collectives_worker.py", "collectives_test.py"]
    runpy.run_path(str(places[0]))["test_an_epoch_has_every_element_once"]()
    runpy.run_path(str(places[2]))["test_every_rank_has_the_columns_of_all"](forked)
