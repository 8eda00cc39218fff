"""Sends metrics to Weights & Biases. No other file imports it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any, Literal

Mode = Literal["offline", "online", "off"]


class Sink:
    """Takes the metrics of a step; without a W&B run (mode off) it drops them."""

    def __init__(self, run: Any | None) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step; steps must ascend."""
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def finish(self, exit_code: int = 0) -> None:
        """Writes what is left and ends the service process. Another exit code than 0 marks the run as failed."""
        if self._run is not None:
            self._run.finish(exit_code)


def start(mode: Mode, project: str, name: str, run_dir: str, config: dict[str, Any], resume: bool) -> Sink:
    """Opens the W&B run of a run directory; call it on one rank.

    offline: writes <run_dir>/wandb/offline-run-*, which `wandb sync` uploads; nothing is sent. online: needs
    WANDB_API_KEY. off: does nothing. A resumed run keeps its W&B id, so that its parts appear as one run.
    """
    if mode == "off":
        return Sink(None)
    assert mode == "offline" or os.environ.get("WANDB_API_KEY"), "log.wandb=online without WANDB_API_KEY"
    if mode == "offline":
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # crash reports would be sent even in offline mode
    import wandb

    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
    run_id = _run_id(os.path.join(run_dir, "wandb"), resume)
    run = wandb.init(
        mode=mode, project=project, name=name, dir=run_dir, config=config, id=run_id, resume="allow", settings=settings
    )
    return Sink(run)


def _run_id(directory: str, resume: bool) -> str:
    """Returns the W&B id stored in the directory; a new run gets a new one."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "run_id")
    if resume and os.path.exists(path):
        with open(path) as file:
            return file.read().strip()
    run_id = secrets.token_hex(4)
    with open(path, "w") as file:
        file.write(run_id)
    return run_id
