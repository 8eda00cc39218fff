"""Large blocks that are freed and taken again bring no new pages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MEMORY = os.path.join(os.path.dirname(__file__), "../../llmtrain/engine/memory.py")
PROGRAM = f"""
import resource, runpy
runpy.run_path({MEMORY!r})["keep_freed_memory"]()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    before = faults()
    block = bytearray(b"1" * (64 << 20))
    del block
print(faults() - before)
"""


def second_use_faults(**environment: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    out = subprocess.run([sys.executable, "-c", PROGRAM], env={**clean, **environment}, capture_output=True, check=True)
    return int(out.stdout)


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc only")
def test_freed_blocks_are_kept_unless_the_user_says_otherwise() -> None:
    assert second_use_faults() < 1000
    assert second_use_faults(MALLOC_TRIM_THRESHOLD_="131072") > 10000  # 128 MiB are 32,768 pages of 4 KiB
