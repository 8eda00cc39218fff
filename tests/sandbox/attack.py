"""What a hostile program is, and what its source may refer to."""

from __future__ import annotations

from dataclasses import dataclass

PREAMBLE = """\
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if libc.syscall(ctypes.c_long(number), *words) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""
# Errors that say that the attempt was made and failed; a NameError would mean that it was not made.
REFUSED = (
    *("PermissionError", "FileNotFoundError", "OSError", "BlockingIOError", "NotADirectoryError", "IsADirectoryError"),
    *("FileExistsError", "ProcessLookupError", "ConnectionRefusedError", "BrokenPipeError", "MemoryError"),
    *("OverflowError", "RecursionError", "ValueError", "ImportError", "ModuleNotFoundError", "shutil.Error"),
    *("RuntimeError: can't start new thread", "SyntaxError: too many", "SyntaxError: source code string cannot"),
    *("SystemError: <class 'collections.deque'> returned NULL", "sqlite3.OperationalError", "urllib.error.URLError"),
    *("socket.gaierror", "subprocess.CalledProcessError", "_pickle.PicklingError", "dbm", "_dbm", "zlib.error"),
    *("_lzma.LZMAError", "re.error", "xml.parsers.expat.ExpatError", "requests.exceptions."),
)


@dataclass(frozen=True)
class Attack:
    """One program. It prints DONE when what it attempts has worked, unless `harmless`: then it may end in any way, and
    only what happened outside counts.

    `$secret`, `$outside`, ... in the source stand for things of the world outside, see `World.names`.
    """

    name: str
    source: str
    harmless: bool = False
    whole: bool = False  # holds where the root folder is hidden too, not with Landlock alone


def attacks(family: str, sources: dict[str, str], harmless: bool = False, whole: bool = False) -> list[Attack]:
    """Returns a family of attacks, each of which ends by printing DONE."""
    return [
        Attack(f"{family}: {name}", f"{PREAMBLE}{source}\nprint('DONE')\n", harmless, whole)
        for name, source in sources.items()
    ]
