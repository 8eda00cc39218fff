"""The world outside the sandbox, in which nothing may change."""

from __future__ import annotations

import glob
import hashlib
import os
import select
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from string import Template

import psutil

import llmtrain

SECRET = "a-secret-that-never-leaves-7261"
BYSTANDER = """\
import signal, sys, time
def note(number, frame):
    open(sys.argv[1], "a").write(f"{number}\\n")
for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM}:
    signal.signal(number, note)
print("ready", flush=True)
time.sleep(3600)
"""


class World:
    """Files with a secret, a process that notes every signal, and sockets that listen."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "outside", folder / "home"
        for each in (self.folder, self.home):
            each.mkdir()
        self.secret = self.folder / "secret.txt"
        self.secret.write_text(SECRET)
        (self.folder / "own.py").write_text(f"VALUE = {SECRET!r}\n")
        (self.folder / "empty").mkdir()
        self.signals = folder / "signals"
        self.bystander = subprocess.Popen(
            [sys.executable, "-c", BYSTANDER, self.signals], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.bystander.stdout.readline() == "ready\n"
        self.path = str(folder / "listener")
        self.abstract = f"llmtrain-{os.getpid()}-{folder.name}"
        self.listeners = self._listen()
        self.before = self._files()
        self.ours = self._children()

    def _listen(self) -> list[socket.socket]:
        tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
        unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        tcp.bind(("127.0.0.1", 0))
        udp.bind(tcp.getsockname())
        unix.bind(self.path)
        abstract.bind("\0" + self.abstract)
        for each in (tcp, unix, abstract):
            each.listen()
        self.port = tcp.getsockname()[1]
        return [tcp, udp, unix, abstract]

    def names(self) -> dict[str, str]:
        """Returns what `$name` stands for in a program."""
        return {
            **{"secret": str(self.secret), "outside": str(self.folder), "home": str(self.home), "port": str(self.port)},
            **{"pid": str(self.bystander.pid), "us": str(os.getpid()), "path": self.path, "abstract": self.abstract},
            **{"package": os.path.dirname(llmtrain.__file__), "site": sysconfig.get_paths()["purelib"]},
            "stdlib": sysconfig.get_paths()["stdlib"],
        }

    def fill(self, source: str) -> str:
        """Returns a program with the names filled in."""
        return Template(source).safe_substitute(self.names())

    def harm(self) -> list[str]:
        """Returns what has changed or was touched."""
        found = [f"file {path}" for path, _ in set(self._files().items()) ^ set(self.before.items())]
        found += [f"made {path}" for folder in self._watched() for path in glob.glob(f"{folder}/*pwned*")]
        if self.signals.exists():
            found.append(f"signals {self.signals.read_text().split()}")
        if psutil.Process(self.bystander.pid).status() not in (psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING):
            found.append("the bystander was stopped or killed")
        found += [f"connection {each.getsockname()!r}" for each in select.select(self.listeners, [], [], 0)[0]]
        found += [f"process {process}" for process in self._children() - self.ours if "pwned" in _command(process)]
        return found

    def _watched(self) -> list[str]:
        return ["/tmp", "/var/tmp", "/dev/shm", "/", str(Path.home()), os.getcwd(), *map(self.names().get, FOLDERS)]

    def _files(self) -> dict[str, tuple]:
        found = {}
        for path in [self.folder, *self.folder.rglob("*"), self.home, *self.home.rglob("*")]:
            stat = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            xattrs = tuple(os.listxattr(path, follow_symlinks=False))
            found[str(path)] = (stat.st_mode, stat.st_uid, stat.st_nlink, stat.st_mtime_ns, content, xattrs)
        return found

    def _children(self) -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True))

    def close(self) -> None:
        self.bystander.kill()
        self.bystander.wait()
        self.bystander.stdout.close()
        for each in self.listeners:
            each.close()


FOLDERS = ("package", "site", "stdlib", "home", "outside")


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
