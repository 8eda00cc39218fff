"""Stands in for vLLM's server: answers on the routes that we use, and notes what it was asked. `interpreter` runs it.

Its model says after any tokens t the token (sum(t) + seed) % 97, with the log-prob -(token + 1) / 100.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HERE = Path(sys.argv[1] if len(sys.argv) > 1 else ".")  # how.json there: how to behave; asked.jsonl: what was asked
FOLDER = Path(os.environ.get("LLMTRAIN_VLLM_FOLDER", "."))
version = "none"
label = "default"
remembered: dict[str, list[list[int]]] = {}  # the tokens of each sample, by the name of a request


def interpreter(folder: Path, **how: Any) -> str:
    """Returns the path of a program that takes the place of the interpreter with vLLM."""
    folder.mkdir(exist_ok=True)
    (folder / "how.json").write_text(json.dumps(how))
    program = folder / "python"
    program.write_text(
        f'#!/bin/sh\ncase $1 in\n-m) exec "{sys.executable}" -I "{__file__}" "{folder}" "$@" ;;\n'
        f'*) exec "{sys.executable}" "$@" ;;\nesac\n'
    )
    program.chmod(0o755)
    return str(program)


def asked(folder: Path) -> list[dict[str, Any]]:
    """Returns what a server was asked: first its arguments and environment, then route and body of each request."""
    return [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]


def note(**what: Any) -> None:
    with open(HERE / "asked.jsonl", "a") as file:
        file.write(json.dumps(what) + "\n")


def names_in(path: Path) -> list[str]:
    """Returns the names of the tensors of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return [name for name in json.loads(data[8 : 8 + size]) if name != "__metadata__"]


def write_experts(
    path: Path, samples: list[list[int]], width: int = 4, dtype: str = "I16", form: str = "h", shift: int = 0
) -> None:
    """Writes experts (token + column) % 8 of all tokens of the samples, and of none behind them, as safetensors."""
    header, data = {}, b""
    for i, ids in enumerate(samples):
        rows = [(t + c) % 8 + shift for t in ids for c in range(width)] + [-1] * width
        packed = struct.pack(f"<{len(rows)}{form}", *rows)
        header[str(i)] = {"dtype": dtype, "shape": [len(ids) + 1, width]}
        header[str(i)]["data_offsets"] = [len(data), len(data) + len(packed)]
        data += packed
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.reply({}, 401)
            return
        how, route = json.loads((HERE / "how.json").read_text()), urlsplit(self.path).path
        note(route=self.path, **body)
        time.sleep(how.get("wait_s", {}).get(route, 0))
        if route in how.get("answers", {}):
            self.reply(*how["answers"][route])
        else:
            getattr(self, route.strip("/").split("/")[-1])(body, how)

    def reset_prefix_cache(self, body: Any, how: Any) -> None:
        self.reply({"success": True})

    def update_weight_version(self, body: Any, how: Any) -> None:
        global label
        label = body["new_version"]
        self.reply({"success": True, "new_version": label})

    def sleep(self, body: Any, how: Any) -> None:
        self.reply({})

    wake_up = sleep

    def collective_rpc(self, body: Any, how: Any) -> None:
        global version
        answer: Any = None
        if body["method"] == "llmtrain_load":
            path = FOLDER / body["args"][0]
            note(loaded=names_in(path), mode=oct(FOLDER.stat().st_mode & 0o777), bytes=path.stat().st_size)
        elif body["method"] == "llmtrain_finish":
            version, answer = body["args"][0], {"missing": how.get("missing", [])}
        elif body["method"] == "llmtrain_experts":
            write_experts(FOLDER / f"{body['args'][0]}.experts", remembered[body["args"][0]], **how.get("experts", {}))
        elif body["method"] == "llmtrain_version":
            answer = {"version": how.get("version", version)}
        self.reply({"results": [answer]})

    def generate(self, body: Any, how: Any) -> None:
        p = body["sampling_params"]
        if body.get("stream"):
            remembered[body.get("request_id", "")] = [[*body["token_ids"], *tokens(body["token_ids"], p, 0)]]
            self.stream(body["token_ids"], p, how)
            return
        choices = []
        remembered[body.get("request_id", "")] = [
            [*body["token_ids"], *tokens(body["token_ids"], p, i)] for i in range(p["n"])
        ]
        for i in range(p["n"]):
            ids = list(tokens(body["token_ids"], p, i))
            ended = "stop" if ids[-1] in p["stop_token_ids"] else "length"
            content = [{"token_id": t, "logprob": -(t + 1) / 100} for t in ids]
            spans = [{"version": how.get("label", label), "start": 0, "end": len(ids)}]
            named = None if how.get("unnamed") else spans
            own = {"index": i, "token_ids": ids, "finish_reason": ended, "weight_versions": named}
            choices.insert(0, {**own, "logprobs": {"content": content}})
        told = [
            None,
            *({str(t): {"logprob": -(t + 1) / 100}, "96": {"logprob": -0.005}} for t in body["token_ids"][1:]),
        ]
        self.reply({"choices": choices, "prompt_logprobs": told if "prompt_logprobs" in p else None})

    def stream(self, prompt: list[int], p: Any, how: Any) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for number, t in enumerate(tokens(prompt, p, 0)):
                if number == how.get("breaks_off"):
                    return
                choice = {"index": 0, "token_ids": [t], "finish_reason": None, "weight_versions": None}
                drawn = {"token_id": t, "logprob": -(t + 1) / 100}
                top = [drawn, *({"token_id": i, "logprob": -(i + 1) / 200} for i in range(p["logprobs"]) if i != t)]
                choice["logprobs"] = {"content": [{**drawn, "top_logprobs": top}]}
                self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                time.sleep(0.01)
            choice = {"index": 0, "token_ids": [], "finish_reason": "length", "weight_versions": None}
            last = {"choices": [{**choice, "logprobs": {"content": []}}]}
            self.wfile.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())
        except (BrokenPipeError, ConnectionResetError):
            note(hung_up=True)

    def reply(self, data: Any, status: int = 200) -> None:
        answer = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


def tokens(prompt: list[int], p: Any, number: int) -> Any:
    seen = list(prompt)
    for _ in range(p["max_tokens"]):
        seen.append((sum(seen) + p["seed"] + number) % 97)
        yield seen[-1]
        if seen[-1] in p["stop_token_ids"]:
            return


def main() -> None:
    how = json.loads((HERE / "how.json").read_text())
    note(arguments=sys.argv[2:], environment=dict(os.environ), folder=os.getcwd())
    if "exit" in how:
        print(f"this cannot work: {os.environ['VLLM_API_KEY']}", flush=True)
        sys.exit(how["exit"])
    time.sleep(how.get("start_s", 0))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
