"""Weights & Biases: the only file that imports it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any, Literal

Mode = Literal["offline", "online", "off"]


class Sink:
    """Takes the metrics of a step; without a run (mode off) they go nowhere."""

    def __init__(self, run: Any | None) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step; steps rise."""
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def finish(self, exit_code: int = 0) -> None:
        """Write out what is left and end the service process; other than 0: the run is marked as failed."""
        if self._run is not None:
            self._run.finish(exit_code)


def start(mode: Mode, project: str, name: str, run_dir: str, config: dict[str, Any], resume: bool) -> Sink:
    """Open the W&B run of a run directory; call it on one rank.

    offline: a run directory <run_dir>/wandb/offline-run-* that `wandb sync` takes; nothing is sent. online: needs
    WANDB_API_KEY. off: nothing at all. A resumed run keeps its identity, so that W&B joins the parts.
    """
    if mode == "off":
        return Sink(None)
    assert mode == "offline" or os.environ.get("WANDB_API_KEY"), "log.wandb=online without WANDB_API_KEY"
    if mode == "offline":
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # crash reports would be sent even then
    import wandb

    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
    run_id = _run_id(os.path.join(run_dir, "wandb"), resume)
    run = wandb.init(
        mode=mode, project=project, name=name, dir=run_dir, config=config, id=run_id, resume="allow", settings=settings
    )
    return Sink(run)


def _run_id(directory: str, resume: bool) -> str:
    """The id kept in the directory; a new one for a new run."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "run_id")
    if resume and os.path.exists(path):
        with open(path) as file:
            return file.read().strip()
    run_id = secrets.token_hex(4)
    with open(path, "w") as file:
        file.write(run_id)
    return run_id
