"""Runs torchrun as it is, but for one number: ranks that outlive a failed one get GRACE_S seconds between SIGTERM and
SIGKILL, where no setting changes its 30 s."""

from __future__ import annotations

import signal

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import PContext

GRACE_S = 2
close = PContext.close


def close_soon(processes: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
    """Closes them as `PContext.close`, in GRACE_S."""
    close(processes, death_sig, GRACE_S)


PContext.close = close_soon

if __name__ == "__main__":
    run.main()
