"""Sends metrics to Weights & Biases. No other file imports it."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Literal

Mode = Literal["offline", "online", "off", "disabled"]
FINISH_S = 60  # how long the end of a run waits for its last uploads; what is left `wandb sync` can send

logger = logging.getLogger(__name__)


class Sink:
    """Takes the metrics of a step; without a W&B run (mode off) it drops them, and after an error too: training goes
    on."""

    def __init__(self, run: Any | None) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step; steps must ascend."""
        self._tell("the metrics from here on are in metrics.jsonl alone", lambda run: run.log(dict(metrics), step=step))

    def finish(self, exit_code: int = 0) -> None:
        """Writes what is left and ends the service process. Another exit code than 0 marks the run as failed."""
        self._tell("its last metrics may be in metrics.jsonl alone", lambda run: run.finish(exit_code))

    def _tell(self, lost: str, call: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # of the network, the service process, a full disk
            self._run = None
            logger.warning("Weights & Biases: %s; %s", _words(error), lost)


def start(mode: Mode, project: str, name: str, run_dir: str, config: dict[str, Any], resume: bool) -> Sink:
    """Opens the W&B run of a run directory; call it on one rank.

    offline: writes <run_dir>/wandb/offline-run-*, which `wandb sync` uploads; nothing is sent. online: needs a key
    (`config.machine.has_wandb_key`); where the server does not answer, as offline. off, disabled: does nothing. A
    resumed run keeps its W&B id, so that its parts appear as one run. What goes wrong is a warning.
    """
    if mode in ("off", "disabled"):
        return Sink(None)
    try:
        return Sink(_open(mode, project, name, run_dir, config, resume))
    except Exception as error:  # of the network, the key, the disk
        logger.warning("Weights & Biases: %s; the run goes on%s", _words(error), ", offline" * (mode == "online"))
        return start("offline" if mode == "online" else "off", project, name, run_dir, config, resume)


def _open(mode: Mode, project: str, name: str, run_dir: str, config: dict[str, Any], resume: bool) -> Any:
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_S))
    if mode == "offline":
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # crash reports would be sent even in offline mode
    import wandb

    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
    run_id = _run_id(os.path.join(run_dir, "wandb"), resume)
    return wandb.init(
        mode=mode, project=project, name=name, dir=run_dir, config=config, id=run_id, resume="allow", settings=settings
    )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


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
