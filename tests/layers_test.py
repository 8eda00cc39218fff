"""Imports go downward only. The rules of the architecture, read from the syntax trees, without importing anything."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "llmtrain"

# What a package may import of llmtrain, beside itself: everything on lower levels. Packages of one level are siblings.
LEVELS = (
    ("types",),
    ("config", "sandbox"),
    ("observe",),
    ("arch",),
    ("rules",),
    ("data", "model", "losses"),
    ("parallel",),
    ("engine",),
    ("checkpoint", "rollout", "rewards"),
    ("envs",),
    ("eval",),
    ("scaling",),
    ("trainer",),
    ("recipes", "commands"),
    ("cli",),
    ("__main__",),
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
ONLY = {  # narrower than their level
    "config": set(),
    "sandbox": set(),
    "observe": {"config"},
    "arch": {"config"},
    "rules": {"config", "arch"},
    "scaling": {"config", "arch", "rules"},
    "cli": {"config", "rules"},
}
ONE_FILE = {
    "deepspeed": "engine/zero.py",
    "wandb": "observe/wandb.py",
    "vllm": "rollout/inside_vllm/llmtrain_vllm.py",
    "lm_eval": "eval/lm_eval.py",
    "verifiers": "envs/inside_verifiers.py",
}
TORCH_FREE = ("config", "sandbox", "arch", "rules", "rewards", "scaling", "cli")
SINGLE_PROCESS = ("data", "model", "losses")
WHOLE_CONFIG = (
    "config",
    "arch",
    "rules",
    "scaling",
    "trainer",
    "recipes",
    "commands",
    "cli",
)  # arch: config.yaml of a run
UNSAFE = ("pickle", "dill", "cloudpickle", "shelve", "torch.load", "torch.save")


def names(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, at any depth, and of what is reached through it, as `torch.distributed`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield f"{node.value.id}.{node.attr}"


def broken(root: Path) -> list[str]:
    """Every broken rule below `root`, as `file: rule`."""
    found = []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        package = file.parts[0].removesuffix(".py")
        for name in set(names(ast.parse(path.read_text()))):
            found += [f"{file}: {fault}" for fault in faults(package, str(file), name)]
    return sorted(found)


def faults(package: str, file: str, name: str) -> Iterator[str]:
    """The rules that `name` breaks in a file of `package`."""
    top = name.partition(".")[0]
    if name.startswith("."):
        yield f"relative import {name}"
    if top == "llmtrain" and package != "__init__":
        yield from layer_faults(package, name)
    if top in ONE_FILE and file != ONE_FILE[top]:
        yield f"only {ONE_FILE[top]} imports {top}"
    if top == "torch" and package in TORCH_FREE:
        yield f"{package} imports no torch"
    if name.startswith("torch.distributed") and package in SINGLE_PROCESS:
        yield f"{package} knows no torch.distributed"
    if any(name == unsafe or name.startswith(f"{unsafe}.") for unsafe in UNSAFE):
        yield f"{name} runs code from files"


def layer_faults(package: str, name: str) -> Iterator[str]:
    target = name.split(".")[1]
    allowed = ONLY.get(package, {p for p, level in LEVEL.items() if level < LEVEL[package]})
    if target not in {package, "__version__", *allowed}:
        yield f"{package} may not import {target}"
    if name.rpartition(".")[2] in ("Config", "RunConfig") and package not in WHOLE_CONFIG:
        yield f"{package} gets its section, not the whole Config"


def test_every_package_has_its_level() -> None:
    packages = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert packages - {"__init__"} <= LEVEL.keys()


def test_imports_go_downward_only() -> None:
    assert broken(ROOT) == []


# not in a path such as configs/pretrain/tiny.yaml
ALGORITHM = re.compile(r"(?<!/)\b(?:distill|dpo|grpo|ppo|raft|sft|pretrain)\b(?!/|\.jsonl)")


def own_files(name: str) -> set[str]:
    """The files that may name an algorithm: its description, its loop, its loss."""
    losses = {"losses/policy.py", "losses/preference.py"}
    return {f"config/recipes/{name}.py", "config/recipes/__init__.py", f"recipes/{name}.py", *losses}


def named_algorithms(tree: ast.Module) -> set[str]:
    """Algorithms that code names: in identifiers and strings, docstrings left out."""
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    bodies = [node.body[0].value for node in documented if node.body and isinstance(node.body[0], ast.Expr)]
    docs = {id(value) for value in bodies}
    texts = [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
    ]
    texts += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    texts += [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
    return {name for text in texts for name in ALGORITHM.findall(text)}


def test_only_its_own_files_name_an_algorithm() -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in ROOT.rglob("*.py")
        for name in named_algorithms(ast.parse(path.read_text()))
    }
    assert {(file, name) for file, name in found if file not in own_files(name)} == {("cli.py", "pretrain")}  # EXAMPLE
    assert {name for _, name in found} == {
        "distill",
        "dpo",
        "grpo",
        "ppo",
        "pretrain",
        "raft",
        "sft",
    }  # the test sees them at all


def test_the_single_files_exist_and_import_what_is_theirs() -> None:
    for library in ("deepspeed", "wandb", "lm_eval", "verifiers"):
        tree = ast.parse((ROOT / ONE_FILE[library]).read_text())
        assert any(name.partition(".")[0] == library for name in names(tree))


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("config/a.py", "from llmtrain.types import Batch", "config may not import types"),
        ("config/a.py", "import torch", "config imports no torch"),
        ("config/a.py", "def f():\n    from torch import nn", "config imports no torch"),
        ("types.py", "import llmtrain.config.schema", "types may not import config"),
        ("data/a.py", "from llmtrain.model.decoder import Decoder", "data may not import model"),
        ("model/a.py", "from llmtrain.losses import token", "model may not import losses"),
        ("losses/a.py", "from torch import distributed", "losses knows no torch.distributed"),
        ("data/a.py", "import torch.distributed as dist", "data knows no torch.distributed"),
        ("model/a.py", "import torch\nx = torch.distributed.get_rank()", "model knows no torch.distributed"),
        ("model/a.py", "from llmtrain.parallel.mesh import Mesh", "model may not import parallel"),
        ("parallel/a.py", "from llmtrain import engine", "parallel may not import engine"),
        ("engine/a.py", "from deepspeed.utils import groups", "only engine/zero.py imports deepspeed"),
        ("commands/a.py", "import lm_eval", "only eval/lm_eval.py imports lm_eval"),
        ("trainer/a.py", "import wandb", "only observe/wandb.py imports wandb"),
        ("rollout/a.py", "from llmtrain.rewards import math", "rollout may not import rewards"),
        (
            "checkpoint/a.py",
            "from llmtrain.config.schema import Config",
            "checkpoint gets its section, not the whole Config",
        ),
        ("scaling/a.py", "from llmtrain.model import decoder", "scaling may not import model"),
        ("cli.py", "from llmtrain.trainer import run", "cli may not import trainer"),
        ("observe/a.py", "from . import log", "relative import ..log"),
        ("eval/a.py", "import pickle", "pickle runs code from files"),
        ("trainer/a.py", "import torch\ntorch.load('x')", "torch.load runs code from files"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, file: str, line: str, fault: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line)
    assert f"{file}: {fault}" in broken(tmp_path)


def test_allowed_imports_are_not_found(tmp_path: Path) -> None:
    lines = {
        "engine/zero.py": "import deepspeed\nimport torch.distributed\nfrom llmtrain.parallel.mesh import Mesh",
        "observe/wandb.py": "import wandb",
        "trainer/a.py": "from llmtrain.config.schema import Config\nfrom llmtrain.eval import passk",
        "data/a.py": "import torch\nfrom llmtrain.types import Batch\nfrom llmtrain.data.b import x",
    }
    for file, text in lines.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert broken(tmp_path) == []


def untrusting(call: ast.Call) -> bool:
    """Says whether a call passes `trust_remote_code=False`, as it stands there."""
    return any(
        k.arg == "trust_remote_code" and isinstance(k.value, ast.Constant) and k.value.value is False
        for k in call.keywords
    )


def trusting(tree: ast.AST) -> list[int]:
    """The lines that load with a class of transformers, and leave it open whether code of the directory may run:
    transformers would ask at the terminal, and take the next line of the standard input for the answer."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    loads = [c for c in calls if c.func.attr in ("from_pretrained", "from_config")]
    foreign = [c for c in loads if ast.unparse(c.func.value) != "nn.Embedding"]
    return [c.lineno for c in foreign if not untrusting(c)]


def test_code_of_a_model_directory_never_runs() -> None:
    assert trusting(ast.parse("AutoModel.from_config(c)\nt.AutoConfig.from_pretrained(d, trust_remote_code=a)")) == [
        1,
        2,
    ]
    assert trusting(ast.parse("AutoModel.from_pretrained(d, trust_remote_code=False)")) == []
    files = [path for root in (ROOT, ROOT.parent / "benchmarks") for path in sorted(root.rglob("*.py"))]
    found = {str(path): trusting(ast.parse(path.read_text())) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}
