"""Writes docs/configuration.md from the classes of llmtrain/config.

Names, types and defaults come from the classes, the words from the docstrings and the comments behind the fields. Run
`python docs/generate.py` after every change of the schema.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtrain import config
from llmtrain.arch.families import presets
from llmtrain.arch.resolve import parameter_count, resolve_model
from llmtrain.config import clean, schema
from llmtrain.config.recipes import RECIPES, Recipe, run_config_class

PAGE = Path(__file__).with_name("configuration.md")
SYMBOLS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
TOP = "With `stages` it is a document for `llmtrain run`, without it one stage. The sections follow below."
NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "object": "section"}
HEAD = """\
# Every key of a configuration

Generated from the classes in `llmtrain/config` by `python docs/generate.py`;
`tests/docs_test.py` fails when it is stale.

- A document is YAML. `llmtrain COMMAND CONFIG.yaml section.key=value ...` changes single keys; in a document with
  `stages`, in each stage that sets the key too.
- A file named by `include:` at the top is merged first; what the document says wins.
- An entry of a list is reached by its name: `stages.grpo.set.train.steps=80`, `data.sources.topics.weight=0.5`. A block
  of stages: `stages.rounds.repeat=4`, in every round `stages.rounds.stages.dpo-{round}.ranks=2`, in one round
  `stages.dpo-2.ranks=2`.
- An unknown key, a value of the wrong type, or a combination that cannot work ends the command with exit code 2 before
  any process group exists. The files in `llmtrain/rules` hold them.
- `llmtrain plan CONFIG.yaml` prints what a document asks for: ranks, batch, memory. It starts nothing.
- "–" as a default: the key must be written.
"""
RECIPE_HEAD = """\
## Recipes

A recipe is a command that trains. When a run goes on, the keys in the last column must stay, and those of all recipes:
`seed`, `train.seq_len`, `train.global_batch_seqs` and the ramps.

| recipe | what it does | trains on | needs | must stay |
|---|---|---|---|---|
"""
PRESET_HEAD = """
## Presets of `model.preset`

| preset | layers | hidden size | FFN size | heads | K/V heads | vocabulary | parameters |
|---|---|---|---|---|---|---|---|
"""


def render() -> str:
    """Returns the whole page."""
    comments = {key: text for module in documented() for key, text in comments_of(module).items()}
    definitions = run_config_class().model_json_schema()
    definitions["$defs"]["RunConfig"] = definitions
    blocks = schema.RepeatConfig.model_json_schema()
    definitions["$defs"] |= {"RepeatConfig": blocks, **blocks["$defs"]}
    parts = [HEAD, RECIPE_HEAD + "\n".join(map(recipe_row, RECIPES.values())) + "\n"]
    parts += [*sections("RunConfig", "", definitions["$defs"], comments), PRESET_HEAD.rstrip("\n")]
    return "\n".join(parts) + "\n" + "".join(map(preset_row, presets()))


def recipe_row(recipe: Recipe) -> str:
    """Returns the line of a recipe in the table of recipes."""
    data = "text of `data.sources`" if recipe.packs_text else "`data.train`"
    needs = ["`model.init_from`"] * recipe.starts_trained + ["`rollout`, `rewards`"] * recipe.samples
    same = ", ".join(f"`{key}`" for key in recipe.same) or "–"
    return f"| `{recipe.name}` | {recipe.summary} | {data} | {', '.join(needs) or '–'} | {same} |"


def documented() -> list[Any]:
    """Returns the modules that define sections."""
    own = [importlib.import_module(f"{p.__name__}.{each.name}") for p in (config, clean) for each in modules_of(p)]
    recipes = [inspect.getmodule(r.section) for r in RECIPES.values() if r.section is not None]
    return [schema, clean, *own, *recipes]


def modules_of(package: Any) -> list[pkgutil.ModuleInfo]:
    """Returns the modules that lie in a package, without its subpackages."""
    return [each for each in pkgutil.iter_modules(package.__path__) if not each.ispkg]


def section_class(name: str) -> type:
    """Returns the class of a section of the document, of a recipe, or within one, by its name."""
    return next(getattr(module, name) for module in documented() if hasattr(module, name))


def comments_of(module: Any) -> dict[tuple[str, str], str]:
    """Returns (class, field) -> the comment behind the field, '' where there is none."""
    source = inspect.getsource(module)
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        for field in getattr(node, "body", ()) if isinstance(node, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign):
                found[node.name, field.target.id] = lines[field.end_lineno - 1].partition("  # ")[2]
    return found


def sections(name: str, prefix: str, classes: dict[str, Any], comments: dict[tuple[str, str], str]) -> Iterator[str]:
    """Yields a heading, the docstring and a table for a class, then the same for the classes of its fields."""
    properties = classes[name]["properties"]
    doc = inspect.getdoc(section_class(name)) if prefix else TOP
    block = " with `repeat`" if name == "RepeatConfig" else ""
    yield f"## `{prefix.rstrip('.')}`{block}\n" if prefix else "## Top of the document\n"
    yield markdown(" ".join(doc.split())) + "\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    for key, spec in properties.items():
        meaning = comment(name, key, comments)  # a section of Config has none: its own heading follows
        if not (meaning or class_of(spec)):
            raise ValueError(f"{name}.{key}: has no comment behind it on its last line; say what it means")
        if meaning:
            yield f"| `{prefix}{key}` | {kind(spec)} | {default(spec)} | {markdown(meaning)} |"
    yield ""
    for key, spec in properties.items():
        if inner := class_of(spec):
            entry = ".*" if spec.get("type") == "array" else ""
            yield from sections(inner, f"{prefix}{key}{entry}.", classes, comments)
        if inner == "StageConfig":
            yield from sections("RepeatConfig", f"{prefix}{key}.*.", classes, comments)


def comment(name: str, key: str, comments: dict[tuple[str, str], str]) -> str:
    """Returns the comment of a field, which a parent class may have defined."""
    owners = [c.__name__ for c in section_class(name).__mro__]
    return next((comments[owner, key] for owner in owners if (owner, key) in comments), "")


def markdown(text: str) -> str:
    """Returns the text with constants named as in YAML, and with characters escaped that tables or HTML would
    interpret."""
    for word, written in {"None": "null", "True": "true", "False": "false"}.items():
        text = re.sub(rf"\b{word}\b", written, text)
    return text.replace("|", "\\|").replace("<", "&lt;")


def class_of(spec: dict[str, Any]) -> str | None:
    """Returns the class behind a field, also as the entry of a list or beside null."""
    inner = [spec, spec.get("items") or {}, *spec.get("anyOf", ())]
    return next((s["$ref"].rpartition("/")[2] for s in inner if "$ref" in s), None)


def kind(spec: dict[str, Any]) -> str:
    """Returns the type of a field in words. Example: {"type": "integer", "minimum": 0} -> "integer ≥ 0"."""
    if "anyOf" in spec:
        return " or ".join("null" if s.get("type") == "null" else kind(s) for s in spec["anyOf"])
    if "$ref" in spec:
        return "section"
    if allowed := spec.get("enum") or ([spec["const"]] if "const" in spec else None):
        return ", ".join(f"`{value}`" for value in allowed)
    if spec.get("type") == "array":
        entries = spec.get("prefixItems")
        return f"list of {len(entries)}, each: {kind(entries[0])}" if entries else "list"
    return " ".join([NAMES[spec["type"]], *(f"{s} {spec[key]:g}" for key, s in SYMBOLS.items() if key in spec)])


def default(spec: dict[str, Any]) -> str:
    """Returns the default as it is written in YAML; of entries of a list what is not null or false."""
    if "default" not in spec:
        return "–"
    value = spec["default"]
    if class_of(spec) and isinstance(value, dict):
        return "its defaults, below"
    if isinstance(value, list):
        value = [{k: v for k, v in e.items() if v not in (None, False)} if isinstance(e, dict) else e for e in value]
    return f"`{json.dumps(value)}`"


def preset_row(name: str) -> str:
    c = resolve_model(schema.ModelConfig(preset=name))
    sizes = (c.num_layers, c.hidden_size, c.ffn_size, c.num_heads, c.num_kv_heads, c.vocab_size, parameter_count(c))
    return f"| `{name}` | {' | '.join(f'{size:,}' for size in sizes)} |\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
