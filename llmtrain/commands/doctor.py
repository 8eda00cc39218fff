"""Implements `llmtrain doctor`: looks at versions, devices, memory and disk, and says what to do about what is
missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket

from rich.console import Console
from rich.table import Table

from llmtrain.config.machine import has_wandb_key
from llmtrain.sandbox.pool import Pool

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "pydantic", "wandb", "vllm")
REQUIRED = PACKAGES[:-1]
TESTED = {"torch": "2.13.", "deepspeed": "0.19.8"}  # deepspeed: private names are used, see engine/zero.py
GIB = 2**30


def main(measured: str | None = None) -> int:
    """Prints what was found and every problem with its remedy; returns 1 if there is one. With a file, measures this
    machine instead and writes it there."""
    if measured is not None:
        from llmtrain.commands.measure import measure  # needs torch, of which the doctor may find that it is not there

        return _print_measured(measured, measure(measured).model_dump(exclude_none=True))
    facts = {**versions(), **devices(), **resources(), **sandbox()}
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)
    found = problems(facts)
    for line in found:
        print(f"problem: {line}")
    print("no problems found" if not found else f"{len(found)} to mend")
    return 1 if found else 0


def _print_measured(path: str, figures: dict[str, object]) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        for name, value in figures.items():
            print(f"{name:<18}{value:.4g}" if isinstance(value, float) else f"{name:<18}{value}")
        print(f"written: {path}; use it as plan.hardware={path}")
    return 0


def versions() -> dict[str, str]:
    """Returns the versions of Python and the packages that matter; '' = not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def devices() -> dict[str, str]:
    """Returns what torch can compute and communicate on."""
    try:
        import torch
    except ImportError:
        return {"cuda": "no torch", "backends": ""}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    dist = torch.distributed
    built = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available} if dist.is_available() else {}
    return {"cuda": ", ".join(names) or "none", "backends": " ".join(n for n, has in built.items() if has())}


def resources() -> dict[str, str]:
    """Returns cores, memory, disk, the host's address, and whether (never which) there is a key for Weights &
    Biases."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / GIB:.1f} GiB",
        "free disk": f"{shutil.disk_usage('.').free / GIB:.1f} GiB",
        "host": f"{socket.gethostname()} {_address()}",
        "W&B key": "yes" if has_wandb_key() else "no",
    }


def sandbox() -> dict[str, str]:
    """What holds a program that a model wrote: the mechanisms that a worker has just been held by, or why none can."""
    pool = Pool({})
    try:
        pool.start()
    except RuntimeError as error:
        return {"sandbox": f"none ({error})"}
    pool.close()
    return {"sandbox": str(pool.mechanisms)}


def _address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "unresolved"


def problems(facts: dict[str, str]) -> list[str]:
    """Returns `value: what it means; remedy` for everything that will not work."""
    found = []
    for name in REQUIRED:
        if not facts[name]:
            found.append(f"{name}: is not installed; run `pip install -c constraints.txt -e .`")
        elif not facts[name].startswith(TESTED.get(name, "")):
            found.append(f"{name} {facts[name]}: {TESTED[name]} is tested; install it with `-c constraints.txt`")
    if facts["torch"] and "gloo" not in facts["backends"]:
        found.append("torch: was built without gloo; install the wheel of the constraints file")
    if facts["host"].endswith("unresolved"):
        found.append(f"host {facts['host']}: has no address; add it to /etc/hosts or set GLOO_SOCKET_IFNAME=lo")
    if facts["sandbox"].startswith("none"):
        found.append(f"sandbox {facts['sandbox']}: rewards and code of a model do not run; allow one of the mechanisms")
    for name, least in {"memory": 4.0, "free disk": 5.0}.items():
        if float(facts[name].split()[0]) < least:
            found.append(
                f"{name} {facts[name]}: the quickstart needs {least:.0f} GiB; free some or use another machine"
            )
    return found
