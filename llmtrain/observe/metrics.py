"""Writes metrics.jsonl and samples.jsonl: one JSON object a line, consistent after a kill and a resume."""

from __future__ import annotations

import json
import logging
import math
import os
from typing import Any

from llmtrain.observe.files import write_whole

logger = logging.getLogger(__name__)


class StepLines:
    """Writes a JSONL file whose lines carry a `step`.

    A run that continues after `resume_step` opens it with that: lines of later steps, which will be written again, and
    a last line that a kill cut short are dropped. `resume_step=-1` starts an empty file. Example:
    StepLines("samples.jsonl", resume_step=100)

    If a write fails (a full disk), OSError naming the file is raised. If `patient`, the lines wait in memory until a
    later write succeeds, and a warning says so: a full disk must not end a run for its metrics alone.
    """

    def __init__(self, path: str, resume_step: int, patient: bool = False) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if os.path.exists(path) else []
        _replace(path, kept)
        self.path, self.patient = path, patient
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (held until close)
        self._waiting = b""  # bytes not yet written: lines, the first possibly cut at its beginning
        self.last_step = max((line["step"] for line in kept), default=-1)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line and passes it to the operating system at once. NaN and infinities, which JSON lacks, become
        null."""
        told = bool(self._waiting)
        self._waiting += _dump(record).encode()
        self.last_step = record["step"]
        if (error := self._hand_over()) and not told:
            logger.warning(
                "%s: %s; its lines wait in memory from step %d on and the run goes on (checkpoint.on_error=stop would "
                "end it)", self.path, error.strerror, self.last_step,
            )  # fmt: skip

    def close(self) -> None:
        """Closes the file after a last attempt to write the waiting lines."""
        try:
            if self._waiting and (error := self._hand_over()):
                logger.warning("%s: %s; its last lines are lost", self.path, error.strerror)
        finally:
            self._file.close()

    def _hand_over(self) -> OSError | None:
        """Writes the waiting bytes. If that fails and `patient`, returns the error, else raises it."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self.patient:
                raise OSError(error.errno, error.strerror, self.path) from error
            return error
        return None


class MetricsFile(StepLines):
    """Writes metrics.jsonl: every step appears once, in ascending order."""

    def write(self, record: dict[str, Any]) -> None:
        assert record["step"] > self.last_step, f"step {record['step']} after step {self.last_step} in metrics.jsonl"
        super().write(record)

    def amend(self, step: int, more: dict[str, Any]) -> None:
        """Adds to the line of a step that is written; to none where there is no such line. The file is replaced whole.

        Raises OSError as `write` does; if `patient`, a warning says that the values are lost to the file."""
        try:
            if self._waiting and (error := self._hand_over()):
                raise error
            _replace(self.path, [line | (more if line["step"] == step else {}) for line in read_metrics(self.path)])
            self._file.close()
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (held until close)
        except OSError as error:
            if not self.patient:
                raise OSError(error.errno, error.strerror, self.path) from error
            logger.warning("%s: %s; what was added to step %d is in the log alone", self.path, error.strerror, step)


class Events:
    """Writes events.jsonl: the decisions of a run, each on disk before the run acts on it, with its `step` and
    `event`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def go_on_after(self, step: int) -> list[dict[str, Any]]:
        """Drops the events of steps after this one, which will be decided again, and returns those that are kept.

        Rewinds and changed keys are kept, unless the run starts anew at step 0.
        """
        held = read_metrics(self.path) if os.path.exists(self.path) else []
        kept = [line for line in held if step and (line["step"] <= step or line["event"] in ("rewind", "changed"))]
        if kept or held:
            _replace(self.path, kept)
        return kept

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line. Raises OSError, naming the file: a decision that is not on disk must not be acted on."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_dump(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error


class Samples(StepLines):
    """Writes samples.jsonl: completions, of which several may share a step."""


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Returns the lines of a file (see `read_lines`). Raises ValueError, with the line's number, for one without an
    integer `step`."""
    records = read_lines(path)
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("step"), int):
            raise ValueError(f"{path}:{number}: needs an integer 'step'; repair or remove the line")
    return records


def read_lines(path: str) -> list[dict[str, Any]]:
    """Returns all whole lines; a last one without its newline (of a killed or running job) is left out.

    Raises ValueError, with the line's number, when any other line is not a JSON object.
    """
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")[:-1]
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def _parse(line: str, path: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON ({error}); repair or remove the line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}:{number}: not a JSON object; repair or remove the line")
    return record


def _replace(path: str, records: list[dict[str, Any]]) -> None:
    """Replaces the file atomically by one with these records."""
    write_whole(path, "".join(_dump(record) for record in records))


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
