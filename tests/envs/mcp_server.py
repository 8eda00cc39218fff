"""A small MCP server with good and bad tools, for mcp_test.py."""

from __future__ import annotations

import os
import sys
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("test")


@server.tool()
def add(a: int, b: int = 1) -> int:
    """Adds two integers."""
    return a + b


@server.tool()
def fail(text: str) -> str:
    """Fails."""
    raise ValueError(f"cannot: {text}")


@server.tool()
def wait(seconds: float) -> str:
    """Sleeps."""
    time.sleep(seconds)
    return "awake"


@server.tool()
def die() -> str:
    """Ends the server."""
    print("dying", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def environment(name: str) -> str:
    """Returns a variable of the environment."""
    return os.environ.get(name, "")


server.run()
