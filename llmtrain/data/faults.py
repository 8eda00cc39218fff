"""Collects the faults of a file, so that a user sees them all at once."""

from __future__ import annotations

SHOWN = 20  # faults that are written out; the rest is counted


class Faults:
    """Holds the faults of one file of rows. Each is one line: `file:line: what is wrong; remedy`."""

    def __init__(self, path: str) -> None:
        self.path, self.lines, self.count = path, [], 0

    def add(self, where: str, reason: str) -> None:
        """Notes that the row at `where` (`file:line`) cannot be used."""
        self.count += 1
        if len(self.lines) < SHOWN:
            self.lines.append(f"{where}: {reason}")

    def raise_any(self) -> None:
        """Raises ValueError with the first faults and their number, if there is any."""
        if not self.count:
            return
        shown = f", of which the first {SHOWN} are shown" if self.count > SHOWN else ""
        total = [f"{self.path}: {self.count} faults{shown}"] if self.count > 1 else []
        raise ValueError("\n".join([*self.lines, *total]))
