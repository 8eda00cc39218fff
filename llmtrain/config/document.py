"""Reads YAML files, their includes and overrides as plain data that remembers where every key was written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

MOST_NODES = 100_000  # values that a file with aliases may stand for: eight lines of them can mean 10^9
EVERY_ENTRY = ("rewards",)  # lists of which `LIST.KEY=value` sets a key in all entries
Keys = tuple[str | int, ...]  # a path into a document: ("data", "sources", 0, "path")


class ConfigError(ValueError):
    """Reports a faulty configuration; each line of the text names one fault, its place and its remedy."""


class Loader(yaml.SafeLoader):
    """Reads YAML 1.2 scalars: `3e-4` is a number, `off` and `no` are text, dates are text."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, list]] = {}


class Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that `Loader` would not read as text."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, list]] = Loader.yaml_implicit_resolvers


_FLOAT = r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _pattern in {  # the first match wins: whole numbers before numbers
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][\d_]*)",
    "float": _FLOAT,
}.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)


@dataclass
class Document:
    """Holds plain data, and for every key where it was written (`configs/x.yaml:12` or `override 'a.b=c'`)."""

    data: dict[str, Any] = field(default_factory=dict)
    where: dict[Keys, str] = field(default_factory=dict)
    written: dict[Keys, Keys] = field(default_factory=dict)  # of keys that rounds made (`config.rounds`): the file's

    def place(self, keys: Keys) -> str:
        """Returns where `keys` was written, or else the closest written section around it."""
        while keys and keys not in self.where:
            keys = keys[:-1]
        return self.where.get(keys, "configuration")

    def as_written(self, keys: Keys) -> Keys:
        """Returns what the file calls `keys`, which differ from it where a block of stages was unrolled."""
        for n in range(len(keys), 1, -1) if self.written else ():
            if keys[:n] in self.written:
                return (*self.written[keys[:n]], *keys[n:])
        return keys


def merge(base: Any, over: Any) -> Any:
    """Returns `over` laid over `base`: sections are merged key by key, everything else is replaced."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{k: merge(base[k], v) if k in base else v for k, v in over.items()}}


Translate = Callable[[Document], None]
"""Rewrites what one file says, in place, before other files are merged with it."""

Rename = Callable[[Keys, Any], Iterable[tuple[Keys, Any]]]
"""Returns what an override of these keys stands for."""


def as_it_is(keys: Keys, value: Any) -> Iterable[tuple[Keys, Any]]:
    """Returns an override unchanged."""
    return [(keys, value)]


def read_document(path: str, included_by: tuple[str, ...], translate: Translate | None = None) -> Document:
    """Reads one YAML file with its includes merged under it."""
    own = _parse(path)
    if translate is not None:
        translate(own)
    includes = own.data.pop("include", [])
    document = Document()
    for name in [includes] if isinstance(includes, str) else _texts(includes, own):
        target = os.path.join(os.path.dirname(path), name)
        if os.path.abspath(target) in (os.path.abspath(p) for p in (*included_by, path)):
            raise ConfigError(f"{own.place(('include',))}: include: '{name}' includes itself; remove one of the two")
        if not os.path.isfile(target):
            raise ConfigError(
                f"{own.place(('include',))}: include: '{target}' is not a file; paths are relative to {path}"
            )
        _lay_over(document, read_document(target, (*included_by, path), translate))
    _lay_over(document, own)
    return document


def _texts(value: Any, document: Document) -> list[str]:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return value
    raise ConfigError(f"{document.place(('include',))}: include: value {value!r}: must be a path or a list of paths")


def _lay_over(document: Document, over: Document) -> None:
    document.data = merge(document.data, over.data)
    document.where.update(over.where)


def _parse(path: str) -> Document:
    try:
        with open(path, encoding="utf-8") as file:
            node = Loader(file.read()).get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}; give the path of a YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{path}:{mark.line + 1}: broken YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    if node is None or node.tag.endswith(":null"):
        raise ConfigError(f"{path}: is empty; see configs/pretrain/tiny.yaml for an example")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: must be a mapping of sections, such as `train:`")
    document = Document(where={(): path})
    try:
        _check_aliases(node, path, {})
        document.data = _plain(node, (), path, document.where)
    except RecursionError:
        raise ConfigError(f"{path}: an alias refers to the section it stands in; write the values out") from None
    return document


def _check_aliases(node: yaml.Node, path: str, sizes: dict[int, int]) -> int:
    """Returns the number of nodes that a node stands for, with its aliases written out; `sizes` holds those of the
    nodes seen. Raises ConfigError when aliases make it more than MOST_NODES, without writing them out."""
    if id(node) in sizes:
        return sizes[id(node)]
    children: list[yaml.Node] = []
    if isinstance(node, yaml.CollectionNode):
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
    size = 1 + sum(_check_aliases(child, path, sizes) for child in children)
    sizes[id(node)] = size
    if size > MOST_NODES and size > len(sizes):  # more than are written
        raise ConfigError(
            f"{_at(path, node)}: aliases make this more than {MOST_NODES:,} values, the most that is read; "
            "use fewer, or write the values out"
        )
    return size


def _plain(node: yaml.Node, keys: Keys, source: str, where: dict[Keys, str]) -> Any:
    """Returns the value of a YAML node, and records in `where` the place of every key.

    `source` is a file, to which the line is added, or the text of an override, which is the place by itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, source)
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            where[(*keys, i)] = _at(source, child)
        return [_plain(child, (*keys, i), source, where) for i, child in enumerate(node.value)]
    values: dict[str, Any] = {}
    for key_node, child in node.value:
        key = str(key_node.value)
        if key in values:
            raise ConfigError(f"{_at(source, key_node)}: {dotted((*keys, key))}: written twice; remove one")
        where[(*keys, key)] = _at(source, key_node)
        values[key] = _plain(child, (*keys, key), source, where)
    return values


def _at(source: str, node: yaml.Node) -> str:
    return source if source.startswith("override ") else f"{source}:{node.start_mark.line + 1}"


def _scalar(node: yaml.ScalarNode, source: str) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text.replace("_", ""))
    if kind != "float":
        raise ConfigError(f"{_at(source, node)}: tag {node.tag}: is not known; remove it")
    value = float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return int(value) if re.search(r"\d[eE]", text) and value.is_integer() else value  # 1e6 may be a count


def override(document: Document, text: str, rename: Rename = as_it_is) -> None:
    """Applies `a.b=c`. It also overrides a stage's `set`: the command line has the last word. A key of a list in
    EVERY_ENTRY is set in all its entries, unless it is the name of one."""
    source = f"override '{text}'"
    dotted_keys, equals, value_text = text.partition("=")
    keys = tuple(dotted_keys.split("."))
    if _means_every_entry(document.data, keys):
        for i in range(len(document.data[keys[0]])):
            override(document, f"{keys[0]}.{i}.{text.partition('.')[2]}", rename)
        return
    if not equals or not all(keys):
        raise ConfigError(f"{source}: must have the form section.key=value")
    where: dict[Keys, str] = {}
    try:
        node = Loader(value_text).get_single_node()
    except yaml.YAMLError:
        raise ConfigError(f"{source}: the value is broken YAML; quote it") from None
    value = None if node is None else _plain(node, (), source, where)
    for own, new in rename(keys, value):
        _note(document, _assign(document.data, own, new, source), where, source)
        for at, chosen in stage_sets(document.data):
            if own[0] != "stages" and _has(chosen, own):
                _check_rounds(document, at, chosen, own, source)
                _note(document, (*at, *_assign(chosen, own, new, source)), where, source)


def _check_rounds(document: Document, at: Keys, chosen: dict[str, Any], keys: Keys, source: str) -> None:
    """Raises ConfigError if the override would make the rounds of a block the same in what tells them apart."""
    value: Any = chosen
    for key in keys:
        value = value[key]
    if isinstance(value, str) and ("{round}" in value or "{previous}" in value):
        raise ConfigError(
            f"{source}: {document.place((*at, *keys))} sets {'.'.join(keys)} to {value!r}, another value in each "
            "round, and this would make all rounds alike; change it there, or for one round by stages.NAME.set."
        )


def _note(document: Document, keys: Keys, inner: dict[Keys, str], source: str) -> None:
    """Records that an override wrote `keys`, the keys within its value, and the sections that it created."""
    for i in range(1, len(keys)):
        document.where.setdefault(keys[:i], source)
    document.where.update({keys: source, **{(*keys, *k): at for k, at in inner.items()}})


def stage_sets(data: dict[str, Any]) -> Iterator[tuple[Keys, dict[str, Any]]]:
    """Yields (keys, section) of what the stages of a `run` document set: each `set`, and in blocks each `first`."""
    for at, stage in _entries(data, ()):
        for key in ("set", "first"):
            if isinstance(stage.get(key), dict):
                yield (*at, key), stage[key]


def _entries(data: dict[str, Any], at: Keys) -> Iterator[tuple[Keys, dict[str, Any]]]:
    """Yields the entries of `stages` at `at`, and behind a block those in it."""
    stages = data.get("stages")
    for i, entry in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(entry, dict):
            yield (*at, "stages", i), entry
            if not at:
                yield from _entries(entry, ("stages", i))


def _has(data: Any, keys: Keys) -> bool:
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            return False
        data = data[key]
    return True


def _assign(data: dict[str, Any], keys: tuple[str, ...], value: Any, source: str) -> Keys:
    """Puts `value` at `keys`, creating missing sections. An entry of a list is named by its number or its `name`."""
    node: Any = data
    found: Keys = ()
    for i, key in enumerate(keys):
        if isinstance(node, list):
            key = _entry(node, key, found, source)
        elif not isinstance(node, dict):
            raise ConfigError(f"{source}: {dotted(found)}: is a value, not a section; set it as a whole")
        found = (*found, key)
        if i == len(keys) - 1:
            present = node[key] if isinstance(node, list) else node.get(key)
            node[key] = merge(present, value)
        elif isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
    return found


def _entry(entries: list[Any], key: str, found: Keys, source: str) -> int:
    names = entry_names(entries)
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(entries):
        return int(key)
    known = ", ".join(n for n in names if isinstance(n, str)) or f"0 to {len(entries) - 1}"
    raise ConfigError(f"{source}: {dotted(found)} has no entry '{key}'; it has {known}")


def _means_every_entry(data: dict[str, Any], keys: tuple[str, ...]) -> bool:
    """Says whether `LIST.KEY` names a key of the entries, not an entry."""
    entries = data.get(keys[0]) if keys[0] in EVERY_ENTRY and len(keys) == 2 else None
    return isinstance(entries, list) and keys[1] not in entry_names(entries) and not keys[1].isdigit()


def entry_names(entries: list[Any]) -> list[Any]:
    """Returns what overrides call the entries of a list: their `name`, else that of their `function` or `model`."""
    plain = [e if isinstance(e, dict) else {} for e in entries]
    named = [e.get("name") or str(e.get("function", "")).rpartition(":")[2] for e in plain]
    return [name or model_name(str(e.get("model", ""))) or None for name, e in zip(named, plain, strict=True)]


def model_name(path: str) -> str:
    """Returns what a reward model is called where it has no name. Example: "runs/rm/export" -> "rm"."""
    parts = [part for part in path.split("/") if part]
    return parts[-2] if parts[-1:] == ["export"] and len(parts) > 1 else "".join(parts[-1:])


def dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))
