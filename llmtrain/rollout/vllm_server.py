"""Starts a vLLM server in a process and an interpreter of its own, asks it, and ends it with this process."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.vllm import VllmConfig
from llmtrain.data.post import ServerFault, post_json, post_lines

INSIDE = Path(__file__).with_name("inside_vllm")  # what runs in the other interpreter; it imports nothing of llmtrain
SHARED = Path("/dev/shm")
PORTS = range(20_000, 32_768)  # below those that the kernel gives away
LOOK_S, LOOK_BYTES = 0.25, 65_536  # between tries while a server starts; of an answer that holds no tokens
STOP_S = 20.0  # for the keeper to end a server
TAIL_BYTES, TAIL_LINES = 20_000, 25  # of the log, in messages
KEPT = (  # variables that the server is given of our environment: no torchrun, no keys of other services
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "XDG_CACHE_HOME"),
    *("OMP_NUM_THREADS", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "VLLM_CACHE_ROOT"),
)
ALWAYS = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes that change weights; our guard closes all that we do not need
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
ON_CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many threads as OMP_NUM_THREADS says, on any core
    "TORCHDYNAMO_DISABLE": "1",  # else the first log-probs compile for 20 s
}


class VllmServer:
    """Holds a running server: one model, one keeper that outlives us for as long as it takes to end the server."""

    def __init__(
        self, settings: VllmConfig, described: Mapping[str, Any], arguments: Sequence[str], gpu: int | None
    ) -> None:
        """Begins to start a server of the model that `described`, the content of its config.json, says; its weights are
        random until they are loaded. It sees no other GPU than that of ours with this number; None = it runs on the
        CPU. `ready` waits for it."""
        self.settings = settings
        self.port, self.token = free_port(), secrets.token_urlsafe(32)
        self.folder = Path(tempfile.mkdtemp(prefix="llmtrain-vllm-", dir=SHARED if SHARED.is_dir() else None))
        model = self.folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(dict(described)))
        address = ["--model", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        python = os.path.abspath(settings.python)
        server = [python, "-m", "vllm.entrypoints.openai.api_server", *address, *arguments]
        keeper = [python, "-I", str(INSIDE / "keeper.py"), str(os.getpid()), str(self.folder), *server]
        # open for as long as the server: it is read after the keeper has removed it
        self.log = open(self.folder / "server.log", "w+b")  # noqa: SIM115
        own = {"VLLM_API_KEY": self.token, "LLMTRAIN_VLLM_FOLDER": str(self.folder), "PYTHONPATH": str(INSIDE)}
        place = ON_CPU if gpu is None else {"CUDA_VISIBLE_DEVICES": visible(gpu)}
        env = {name: os.environ[name] for name in KEPT if name in os.environ} | ALWAYS | place | own
        out = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log}
        self.keeper = subprocess.Popen(keeper, env=env, cwd=self.folder, start_new_session=True, **out)

    def ready(self) -> None:
        """Waits until the server answers. Raises ServerFault when it ends or needs more than `rollout.vllm.start_s`."""
        deadline = time.monotonic() + self.settings.start_s
        while time.monotonic() < deadline:
            if self.keeper.poll() is not None:
                raise self.fault("it ended while it started")
            try:
                url = f"{self.url}/reset_prefix_cache"
                post_json(url, {}, self.token, LOOK_BYTES, min(deadline, time.monotonic() + 10), again=False)
            except ServerFault:
                time.sleep(LOOK_S)
            else:
                return
        raise self.fault(f"it did not answer within rollout.vllm.start_s={self.settings.start_s:g}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, route: str, body: object, max_bytes: int, deadline: float) -> Any:
        """Returns what the server answers. Raises ServerFault with the end of its log."""
        try:
            return post_json(f"{self.url}{route}", body, self.token, max_bytes, deadline, again=False)
        except ServerFault as error:
            raise self.fault(str(error)) from error

    def lines(self, route: str, body: object, max_bytes: int, deadline: float) -> Iterator[bytes]:
        """Yields the lines that the server answers, see `post_lines`. Raises ServerFault with the end of its log."""
        try:
            yield from post_lines(f"{self.url}{route}", body, self.token, max_bytes, deadline)
        except ServerFault as error:
            raise self.fault(str(error)) from error

    def call(self, method: str, *arguments: str, deadline: float) -> list[Any]:
        """Returns what a method of `Loader` returns on each of the server's processes that hold the model."""
        body = {"method": method, "args": list(arguments)}
        answer = self.post("/collective_rpc", body, LOOK_BYTES + 2**20, deadline)
        return answer["results"]

    def fault(self, what: str) -> ServerFault:
        """Returns an error that names the server, and ends with the last lines of its log."""
        self.keeper.poll()
        code = self.keeper.returncode
        state = "runs" if code is None else f"has ended with exit code {code}"
        return ServerFault(f"the vLLM server at {self.url} (which {state}): {what}\nits log ends:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """Returns the last lines of the log, without the token."""
        end = os.fstat(self.log.fileno()).st_size
        data = os.pread(self.log.fileno(), TAIL_BYTES, max(0, end - TAIL_BYTES))
        text = data.decode(errors="replace").replace(self.token, "***")
        lines = [line for line in text.splitlines() if line.strip()]
        return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:]) or "  (nothing)"

    def stop(self) -> None:
        """Ends the server and all its processes, and removes its folder."""
        if self.keeper.poll() is None:
            self.keeper.terminate()
            try:
                self.keeper.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.keeper.kill()  # the server dies with it
                self.keeper.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def visible(gpu: int) -> str:
    """Returns the value of CUDA_VISIBLE_DEVICES that shows one alone of the GPUs that this process sees."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ours.split(",")[gpu] if ours else str(gpu)


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    for _ in range(100):
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerFault(f"no free port between {PORTS.start} and {PORTS.stop - 1} on this machine")
