"""Defines tools: what a policy may call by a name with arguments, and gets text back from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.envs.base import ToolSchema

MOST_CHARACTERS = 2000  # of a result that a policy reads
KINDS: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


class ToolFault(Exception):
    """Says, in words for the policy, why a call has no result."""


@dataclass(frozen=True)
class Tool:
    """Holds a tool. `call` takes the arguments by name, already of the kinds that `parameters` says, and returns what
    the policy reads; it raises ToolFault where it has nothing to return, and may be called from several threads.

    Example: Tool("double", "Doubles a number.", {"x": {"type": "number"}}, lambda arguments: str(2 * arguments["x"]))
    """

    name: str
    description: str
    parameters: Mapping[str, Mapping[str, Any]]  # JSON schema of each argument; the first is that of a plain call
    call: Callable[[Mapping[str, Any]], str]
    required: tuple[str, ...] | None = None  # None = all
    close: Callable[[], None] = lambda: None  # ends what the tool started

    @property
    def schema(self) -> ToolSchema:
        """Returns what a chat template shows of the tool."""
        needed = list(self.parameters) if self.required is None else list(self.required)
        parameters = {"type": "object", "properties": dict(self.parameters), "required": needed}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


class ToolBox:
    """Holds the tools of an environment by name. `most_characters` bounds a result; a longer one is cut, and says so.

    Example: ToolBox([double]).call("double", {"x": 21}) == "42"
    """

    def __init__(self, tools: Sequence[Tool], most_characters: int = MOST_CHARACTERS) -> None:
        self.tools = {tool.name: tool for tool in tools}
        assert len(self.tools) == len(tools), "names of tools differ"
        self.most_characters = most_characters

    @property
    def schemas(self) -> list[ToolSchema]:
        """Returns what a chat template shows of the tools."""
        return [tool.schema for tool in self.tools.values()]

    def call(self, name: Any, arguments: Any) -> str:
        """Returns the result of a call, or an error in words: whatever a policy asks for, nothing is raised but by a
        tool that is broken."""
        tool = self.tools.get(name) if isinstance(name, str) else None
        if tool is None:
            return f"error: there is no tool {str(name)[:40]!r}; there is {', '.join(self.tools)}"
        fault = next(argument_faults(tool, arguments), None)
        if fault is not None:
            return f"error: {name}: {fault}"
        try:
            return self._cut(tool.call(arguments))
        except ToolFault as told:
            return self._cut(f"error: {told}")

    def _cut(self, text: str) -> str:
        """Returns a result that is no longer than allowed, and that can be encoded: half a character (of a surrogate
        pair) is a question mark."""
        text = text.encode(errors="replace").decode()
        left_out = len(text) - self.most_characters
        return text if left_out <= 0 else f"{text[: self.most_characters]}\n... {left_out} more characters"

    def close(self) -> None:
        """Ends what the tools started."""
        for tool in self.tools.values():
            tool.close()


def argument_faults(tool: Tool, arguments: Any) -> Iterator[str]:
    """Yields what is wrong with the arguments of a call, in words for the policy."""
    if not isinstance(arguments, dict):
        yield "the arguments must be an object"
        return
    needed = tool.parameters if tool.required is None else tool.required
    yield from (f"the argument {name!r} is missing" for name in needed if name not in arguments)
    for name, value in arguments.items():
        if name not in tool.parameters:
            yield f"there is no argument {str(name)[:40]!r}; there is {', '.join(tool.parameters)}"
        elif not is_of_kind(value, tool.parameters[name].get("type")):
            yield f"the argument {name!r} must be of type {tool.parameters[name]['type']}"


def is_of_kind(value: Any, kind: Any) -> bool:
    """Says whether a JSON value is of a type of JSON schema; True where the schema names none that is known here. True
    is no number."""
    if not isinstance(kind, str) or kind not in KINDS:
        return True
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))
