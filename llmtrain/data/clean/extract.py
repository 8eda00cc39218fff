"""Extracts the main text of HTML pages with trafilatura, in a process that may hang, crash or run out of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

from datatrove.data import Document

from llmtrain.config.clean.web import ExtractConfig, WordsConfig

WORKER = Path(__file__).with_name("extract_worker.py")
START_S = 120.0  # until the process has imported the library, on a machine that is busy


class Extractor:
    """Replaces a document's HTML by its text. The process is started with the first page, and anew after one that ended
    it; `close` ends it.

    Reasons: `timeout`, `crashed` (it ended, for want of memory or by a signal), `failed` (the library raised an error,
    which is in the metadata as `error`), `empty` (no main text).
    """

    def __init__(self, settings: ExtractConfig) -> None:
        self.settings, self.process = settings, None

    def __call__(self, document: Document) -> str | None:
        """Returns why a page has no text, or None. What its input says is no HTML stays as it is."""
        if document.metadata.get("html") is False:
            return None
        try:
            kind, text = self.answer(document.text.encode("utf-8", "surrogatepass"))
        except TimeoutError:
            self.close()
            return "timeout"
        except (EOFError, OSError):
            self.close()
            return "crashed"
        if kind == "f":
            document.metadata["error"] = text
            return "failed"
        document.text = text
        return None if text.strip() else "empty"

    def answer(self, page: bytes) -> tuple[str, str]:
        """Returns the kind of answer to a page, and the text. Raises TimeoutError, EOFError or OSError."""
        if self.process is None:
            self.start()
        self.pipe.send_bytes(page)
        if not self.pipe.poll(self.settings.timeout_s):
            raise TimeoutError
        said = self.pipe.recv_bytes().decode("utf-8", "surrogatepass")
        return said[0], said[1:]

    def start(self) -> None:
        """Starts the process. Raises RuntimeError if it does not come up."""
        self.pipe, theirs = Pipe()
        limit_bytes = int(self.settings.memory_gib * 2**30)
        arguments = [str(theirs.fileno()), str(limit_bytes), json.dumps(options(self.settings))]
        # -P: the folder of the script, whose modules are named as those of the standard library, is not searched
        command = [sys.executable, "-P", str(WORKER), *arguments]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()  # else its end would not be seen
        try:
            if not self.pipe.poll(START_S):
                raise EOFError
            self.pipe.recv_bytes()
        except (EOFError, OSError):
            self.close()
            raise RuntimeError(
                f"data.clean.extract.memory_gib={self.settings.memory_gib}: the extracting process did not start; "
                "its error is above; allow more, or install the extra 'data'"
            ) from None

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.pipe.close()
            self.process.kill()
            self.process.wait()
            self.process = None


def options(settings: ExtractConfig) -> dict:
    """Returns the arguments of trafilatura. It does not leave out what it has seen before: what a page gives would
    depend on the pages before it."""
    return {
        "include_comments": settings.comments,
        "include_tables": settings.tables,
        "favor_precision": settings.favor == "precision",
        "favor_recall": settings.favor == "recall",
    }


def make(settings: ExtractConfig, words: WordsConfig) -> Extractor:
    """Returns the check."""
    return Extractor(settings)
