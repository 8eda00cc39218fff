"""Whatever a document, an override or a command says, it is taken, or refused with exit code 2 and lines that say why.

Nothing is started: the functions behind the commands are stubs, but for `plan`, which starts nothing.
Some hundred draws by default, 20,000 marked slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from llmtrain import cli
from llmtrain.config.recipes import run_config_class

SECONDS = 5  # that reading and checking a small document may take, on a machine that other work slows down


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys of a schema with their types, sections among them."""
    for name, field in model.model_fields.items():
        yield prefix + name, field.annotation
        for inner in _models(field.annotation):
            yield from keys_of(inner, f"{prefix}{name}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


TYPES = {key: kind for key, kind in keys_of(run_config_class()) if not key.startswith("stages.")}
WORDS = st.sampled_from(
    [
        *("", "null", "on", "~", "1e6", ".inf", "-.nan", "0x10", "{", "[1, 2", "a: b", "- x", "!!python/object:os x"),
        *("llama3-8b", "bf16", "fsdp", "cosine", "muon", "zbv", "ring", "../x", "/", "{run}/x", "x" * 3000, "é\u202e"),
    ]
)
NUMBERS = st.one_of(
    st.integers(-3, 9), st.sampled_from([2**31, 2**63, -(2**63), 10**30, 1e-30, 1e30, 0.5, 1.5, -0.1, 128, 1000])
)
SCALARS = st.one_of(NUMBERS, WORDS, st.booleans(), st.none(), st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "type", "x", "weight"]), inner)
    ),
    max_leaves=6,
)


def right_values(annotation: Any) -> st.SearchStrategy:
    """Returns values of the right type, so that draws come past the schema and meet the rules."""
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    simple = {bool: st.booleans(), int: st.sampled_from([0, 1, 2, 3, 4, 8, 16, 1000, 10**12]), str: WORDS}
    simple |= {float: st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1.0, 2.0, 1e9]), type(None): st.none()}
    if annotation in simple:
        return simple[annotation]
    inner = [right_values(each) for each in get_args(annotation) if not callable(getattr(each, "validate", None))]
    return st.one_of(*inner) if inner else VALUES


COMMANDS = st.sampled_from([*(name for name in cli.commands() if name != "doctor"), "pretrian", ""])
WRONG = st.tuples(st.sampled_from([*TYPES, "modle.x", "train", "grpo.reward"]), VALUES)
RIGHT = st.sampled_from(sorted(TYPES)).flatmap(lambda key: st.tuples(st.just(key), right_values(TYPES[key])))
OVERRIDES = st.lists(st.one_of(RIGHT, RIGHT, RIGHT, WRONG), max_size=6)
BASE = {"train": {"seq_len": 64, "steps": 2}, "model": {"num_layers": 2, "max_positions": 64}, "log": {"wandb": "off"}}


def nested(key: str, value: Any) -> dict:
    """Returns {a: {b: value}} of the key a.b."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{k: merged(base.get(k), v) if k in base else v for k, v in over.items()}}


@pytest.fixture
def taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """taken(command, document, overrides) runs the command line, and looks at its answer."""
    monkeypatch.chdir(tmp_path)
    function = cli._function
    monkeypatch.setattr(cli, "_function", lambda command: function("plan") if command == "plan" else lambda config: 0)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(command: str, document: str, overrides: list[str]) -> None:
        (tmp_path / "x.yaml").write_text(document, encoding="utf-8")
        began = time.monotonic()
        status = cli.main([command, "x.yaml", *overrides])
        said = capsys.readouterr().err
        assert status in (0, 2), said
        assert "Traceback" not in said and bool(said.strip()) == (status == 2), said
        assert time.monotonic() - began < SECONDS

    return run


def check_overrides(taken: Callable, command: str, overrides: list[tuple[str, Any]]) -> None:
    document = yaml.safe_dump(BASE)
    taken(command, document, [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in overrides])


def check_document(
    taken: Callable, command: str, keys: list[tuple[str, Any]], stages: Any, overrides: list[str]
) -> None:
    document: Any = BASE
    for key, value in keys:
        document = merged(document, nested(key, value))
    if stages is not None:
        document = {**document, "stages": stages}
    taken(command, yaml.safe_dump(document, allow_unicode=True), overrides)


STAGE = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b", "../x", "", "a-{round}", "{previous}", "a-{last}"]), "command": COMMANDS},
    optional={
        "ranks": NUMBERS,
        "set": st.dictionaries(st.sampled_from(["train", "model", "grpo", "x"]), VALUES),
        "first": st.dictionaries(st.sampled_from(["train", "model", "seed"]), VALUES) | SCALARS,
    },
)
BLOCK = st.fixed_dictionaries(
    {"repeat": st.sampled_from([1, 2, 3, 3, 100, 101]) | SCALARS},
    optional={
        "stages": st.deferred(lambda: st.lists(STAGE | BLOCK | SCALARS, max_size=3)) | SCALARS,
        "name": st.sampled_from(["a", "rounds", ""]) | SCALARS,
        "command": COMMANDS,
    },
)
STAGES = st.none() | st.lists(STAGE | BLOCK, max_size=3)
OF_STAGES = st.lists(
    st.sampled_from(
        ["stages.rounds.repeat=2", "stages.0.repeat=0", "stages.a-2.ranks=2", "stages.rounds.stages.0.set.seed=1"]
    ),
    max_size=2,
)
FEW = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=20_000)


@FEW
@given(COMMANDS, OVERRIDES)
def test_overrides(taken: Callable, command: str, overrides: list[tuple[str, Any]]) -> None:
    check_overrides(taken, command, overrides)


@FEW
@given(COMMANDS, OVERRIDES, STAGES, OF_STAGES)
def test_documents(
    taken: Callable, command: str, keys: list[tuple[str, Any]], stages: Any, overrides: list[str]
) -> None:
    check_document(taken, command, keys, stages, overrides)


@FEW
@given(COMMANDS, st.text(max_size=60) | st.binary(max_size=40).map(lambda b: b.decode("latin-1")))
def test_texts_that_are_no_documents(taken: Callable, command: str, text: str) -> None:
    taken(command, text, [])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(COMMANDS, OVERRIDES)
def test_many_overrides(taken: Callable, command: str, overrides: list[tuple[str, Any]]) -> None:
    check_overrides(taken, command, overrides)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(COMMANDS, OVERRIDES, STAGES, OF_STAGES)
def test_many_documents(
    taken: Callable, command: str, keys: list[tuple[str, Any]], stages: Any, overrides: list[str]
) -> None:
    check_document(taken, command, keys, stages, overrides)
