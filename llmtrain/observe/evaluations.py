"""Says where `llmtrain eval` writes, and makes room for a run that begins where an evaluation was written first."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from llmtrain.observe.owned import MARKER, read_marker, unchanged

COMMAND = "llmtrain eval"
FILES = ("config.yaml", "eval.json", "samples.jsonl")


def place_in_run(directory: str | Path, label: str) -> Path:
    """Returns where an evaluation of this label lies in the directory of a run that trains."""
    return Path(directory, "eval", quote(label, safe=" ,()").replace(".", "%2E", 1))


def is_evaluation(directory: str | Path) -> bool:
    """Says whether `llmtrain eval` wrote into this directory itself, as its marker has it."""
    return read_marker(Path(directory)).get("made_by") == COMMAND


def make_room(directory: str | Path) -> None:
    """Moves an evaluation that lies in a directory to where a run has it, eval/<label>/.

    What changed since stays, and so does everything when that place is taken. A move that was cut off is ended.
    """
    top, listed = Path(directory), read_marker(Path(directory))
    if not is_evaluation(top) or not listed.get("files"):
        return
    with suppress(OSError, ValueError, KeyError, TypeError):
        result = next(path for path in (top / "eval.json", *top.glob("eval/*/eval.json")) if path.is_file())
        target = place_in_run(top, json.loads(result.read_text(encoding="utf-8"))["label"])
        if _whole(listed["files"], top, target) and not (target / MARKER).exists():
            target.mkdir(parents=True, exist_ok=True)
            for name in filter(lambda name: (top / name).exists(), (*listed["files"], MARKER)):
                os.rename(top / name, target / name)


def _whole(files: dict[str, list], top: Path, target: Path) -> bool:
    """Says whether every file lies, as it was written, in one of the two places, and none in both."""
    return all(
        unchanged((target if not (top / name).exists() else top) / name, described)
        and not ((top / name).exists() and (target / name).exists())
        for name, described in files.items()
    )
