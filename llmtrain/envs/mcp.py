"""Offers the tools of MCP servers (Model Context Protocol) that run as programs of their own, over their standard input
and output."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from llmtrain.envs.toolbox import Tool, ToolFault

START_S = 60.0  # to start the program and list its tools
CLOSED = -32000  # code of an error of the protocol: the connection is closed
TAIL_BYTES = 2000  # of what a program says on its standard error, in messages
T = TypeVar("T")


class McpServer:
    """Runs an MCP server and calls its tools, from any thread. It is a program of the user's own and runs with all that
    the user may do, as its name in the document allows; of the environment's variables it gets HOME, PATH and the like,
    and `env`.

    Example: McpServer("files", ["python", "my_server.py"], {}, 5.0).tools() -> [Tool("read", ...)]
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], deadline_s: float) -> None:
        """Starts the program. Raises ValueError when it cannot be started, or does not speak the protocol in time."""
        import mcp  # noqa: F401 (ModuleNotFoundError here, and not in the thread)

        self.name, self.command, self.env, self.deadline_s = name, list(command), dict(env), deadline_s
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self.ready: Future[list[Any]] = Future()
        self.thread = threading.Thread(target=self._main, name=f"mcp-{name}", daemon=True)
        self.thread.start()
        try:
            self.listed = self.ready.result(START_S)
        except BaseException as error:
            why = "does not answer in time" if isinstance(error, TimeoutError) else reason(error)
            told = f"MCP server {name} ({' '.join(command)}): {why}{self._tail()}"
            self.close()
            raise ValueError(told) from error

    def tools(self, wanted: Sequence[str] | None = None) -> list[Tool]:
        """Returns its tools, or those of these names, in this order. Raises ValueError for a name that it has not."""
        known = {tool.name: tool for tool in self.listed}
        if unknown := [name for name in wanted or () if name not in known]:
            raise ValueError(f"MCP server {self.name}: has no tool {unknown[0]}; it has {', '.join(known)}")
        return [self._tool(known[name]) for name in wanted or known]

    def call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """Returns the texts of a result. Raises ToolFault where the tool says that it failed, or takes longer than
        `deadline_s`; RuntimeError where the program is gone."""
        try:
            result = self._run(self.client.call_tool(tool, dict(arguments)))
        except TimeoutError:
            raise ToolFault(f"{tool}: took longer than {self.deadline_s:g} s") from None
        except Exception as error:  # of many kinds, by how a program breaks the protocol
            if getattr(error, "code", CLOSED) != CLOSED:  # what a server says of a call
                raise ToolFault(f"{tool}: {error.message}") from None
            raise RuntimeError(f"MCP server {self.name}, tool {tool}: {reason(error)}{self._tail()}") from error
        text = "\n".join(words(part) for part in result.content)
        if result.is_error:
            raise ToolFault(text or f"{tool} failed")
        return text

    def close(self) -> None:
        """Ends the program."""
        if hasattr(self, "loop") and self.thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
                self.loop.call_soon_threadsafe(self.stop.set)
            self.thread.join(START_S)
        self.said.close()

    def _tool(self, listed: Any) -> Tool:
        schema = listed.input_schema or {}
        found = schema.get("properties", {}).items()
        parameters = {name: own if isinstance(own, dict) else {} for name, own in found}  # true = anything
        required = tuple(schema.get("required", ()))
        call = lambda arguments: self.call(listed.name, arguments)  # noqa: E731
        return Tool(listed.name, listed.description or "", parameters, call, required)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns what a coroutine returns in the loop of the server's thread. Raises TimeoutError after the
        deadline."""
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, self.deadline_s), self.loop)
        return future.result(self.deadline_s + START_S)

    def _main(self) -> None:
        try:
            asyncio.run(self._session())
        except BaseException as error:
            if not self.ready.done():
                self.ready.set_exception(error)

    async def _session(self) -> None:
        """Starts the program, lists its tools, and keeps the connection until `stop`."""
        from mcp.client.client import Client
        from mcp.client.stdio import StdioServerParameters, stdio_client

        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        program = StdioServerParameters(command=self.command[0], args=self.command[1:], env=self.env)
        async with Client(stdio_client(program, errlog=self.said)) as self.client:
            self.ready.set_result(await self._listed())
            await self.stop.wait()

    async def _listed(self) -> list[Any]:
        """Returns all pages of the list of tools."""
        page = await self.client.list_tools()
        found = list(page.tools)
        while page.next_cursor is not None:
            page = await self.client.list_tools(cursor=page.next_cursor)
            found += page.tools
        return found

    def _tail(self) -> str:
        """Returns the end of what the program said on its standard error, for messages."""
        with contextlib.suppress(ValueError, OSError):  # it is closed
            self.said.seek(0)
            if said := self.said.read()[-TAIL_BYTES:].decode(errors="replace").strip():
                return f"; it said:\n{said}"
        return ""


def reason(error: BaseException) -> str:
    """Returns what went wrong, in one line: of errors of several tasks the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def words(part: Any) -> str:
    """Returns a part of a result as text; of an image or a sound, what it is."""
    return part.text if hasattr(part, "text") else f"[{part.type}]"
