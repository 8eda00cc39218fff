"""Directories are written whole, through links, and never over what llmtrain did not write."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.observe import owned
from llmtrain.observe.owned import MARKER, filling, read_marker, replacing


def write(target: Path | str, text: str = "new", source: str | None = None, command: str = "llmtrain export") -> None:
    with replacing(target, command, source) as directory:
        (directory / "weights").write_text(text)
        (directory / "deep").mkdir()
        (directory / "deep" / "more").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    """Returns the text of all files below a folder but markers."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def written(text: str) -> dict[str, str]:
    return {"weights": text, "deep/more": text}


def no_leftovers(folder: Path) -> bool:
    return not [name for name in os.listdir(folder) if owned.LEFTOVER.fullmatch(name)]


@pytest.mark.parametrize("existing", [False, True])
def test_a_new_or_empty_directory_is_written_and_written_again(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "a" / "out"
    if existing:
        target.mkdir(parents=True)
    write(target, "one", source="runs/a")
    marker = read_marker(target)
    assert (marker["made_by"], marker["from"]) == ("llmtrain export", os.path.abspath("runs/a")) and marker["made"]
    write(target, "two")
    assert contents(target) == written("two") and no_leftovers(target.parent)


def put_file(target: Path) -> None:
    target.write_text("thesis")


def put_directory(target: Path) -> None:
    target.mkdir()
    (target / "thesis.txt").write_text("thesis")


def put_hidden(target: Path) -> None:
    target.mkdir()
    (target / ".hidden").write_text("thesis")


def put_folder_in_ours(target: Path) -> None:
    write(target)
    (target / "mine").mkdir()


def put_link_in_ours(target: Path) -> None:
    write(target)
    (target / "link").symlink_to("/nowhere")


def put_note_in_ours(target: Path) -> None:
    write(target)
    (target / "deep" / "note.txt").write_text("thesis")


def put_change_in_ours(target: Path) -> None:
    write(target)
    (target / "weights").write_text("tuned by hand"[:3])


def put_broken_marker(target: Path) -> None:
    write(target)
    (target / MARKER).write_text("{")


def put_marker_of_nothing(target: Path) -> None:
    put_directory(target)
    (target / MARKER).write_text(json.dumps({"made_by": "llmtrain export", "files": {}}))


def put_another_commands(target: Path) -> None:
    write(target, command="llmtrain data")


def put_run(target: Path) -> None:
    target.mkdir()
    (target / "run.json").write_text("{}")


def put_earlier_run(target: Path) -> None:
    (target / "checkpoints").mkdir(parents=True)
    (target / "config.yaml").write_text("name: a")


def put_loop(target: Path) -> None:
    target.symlink_to(target.name)


def put_link_to_nowhere(target: Path) -> None:
    target.symlink_to(target.parent / "unmounted" / "disk")


ODD: list[tuple[Callable[[Path], None], str]] = [
    (put_file, "is a file, and a directory is to be written"),
    (put_directory, "holds thesis.txt, which llmtrain did not write"),
    (put_hidden, r"holds \.hidden, which"),
    (put_folder_in_ours, "holds mine, which"),
    (put_link_in_ours, "holds link, which"),
    (put_note_in_ours, "holds deep/note.txt, which"),
    (put_change_in_ours, "holds weights, which llmtrain did not write, or not as it is now"),
    (put_broken_marker, "holds .*weights"),
    (put_marker_of_nothing, "holds .*thesis.txt"),
    (put_another_commands, "was made by `llmtrain data`, not by `llmtrain export`"),
    (put_run, "belongs to the run in"),
    (put_earlier_run, "belongs to the run in"),
    (put_loop, "is a link that leads back to itself"),
    (put_link_to_nowhere, "is a link to .*unmounted/disk, and there is no .*unmounted; make that folder first"),
]


def snapshot(folder: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted(folder.rglob("*")):
        text = f"-> {os.readlink(path)}" if path.is_symlink() else path.read_text() if path.is_file() else ""
        found.append((str(path.relative_to(folder)), text))
    return found


@pytest.mark.parametrize(("put", "message"), ODD, ids=[put.__name__.removeprefix("put_") for put, _ in ODD])
@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../out", "link"])
def test_what_is_not_ours_is_refused_and_stays(
    tmp_path: Path, put: Callable[[Path], None], message: str, spelling: str
) -> None:
    target = tmp_path / "out"
    put(target)
    for neighbour in ("out.tmp", "out.old", ".llmtrain-0123abcd.tmp"):
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "backup.txt").write_text("backup")
    (tmp_path / "link").symlink_to("out")
    before = snapshot(tmp_path)
    given = str(tmp_path / "link") if spelling == "link" else spelling.format(target)
    if not target.is_dir():
        given = given.replace("/../out", "/")  # there is no directory to go up from
    with pytest.raises(ValueError, match=message):
        write(given)
    assert snapshot(tmp_path) == before


def test_neighbours_stay_when_it_is_written(tmp_path: Path) -> None:
    for neighbour in ("out.tmp", "out.old", ".llmtrain-0123abcd.old"):
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "backup.txt").write_text("backup")
    write(tmp_path / "out")
    write(tmp_path / "out")
    assert len([p for p in tmp_path.rglob("backup.txt") if p.read_text() == "backup"]) == 3


@pytest.mark.parametrize("there", ["empty", "ours", "missing"])
def test_a_link_is_written_through(tmp_path: Path, there: str) -> None:
    (tmp_path / "disk").mkdir()
    place, link = tmp_path / "disk" / "out", tmp_path / "link"
    if there == "empty":
        place.mkdir()
    if there == "ours":
        write(place, "old")
    link.symlink_to(os.path.relpath(place, tmp_path))
    write(f"{link}/")
    assert link.is_symlink() and contents(place) == written("new")
    write(link, "again")
    assert link.is_symlink() and contents(link) == written("again") and os.listdir(tmp_path / "disk") == ["out"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system")
def test_another_file_system(tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"llmtrain-test-{os.getpid()}"
    try:
        (tmp_path / "link").symlink_to(other)
        write(tmp_path / "link")
        assert contents(other) == written("new")
    finally:
        shutil.rmtree(other, ignore_errors=True)


@pytest.mark.parametrize("target", ["/proc/out", "/dev/null/out"])
def test_where_nothing_can_be_written(target: str) -> None:
    with pytest.raises(ValueError, match=f"^{target}: (cannot be written: .*|is a file.*); choose another"):
        write(target)


def test_source_and_what_is_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a" / "b"
    write(source)
    for target in (source, f"{source}/", f"{source}/../b", tmp_path / "a", tmp_path):
        with pytest.raises(ValueError, match="would replace"):
            write(target, source=str(source))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"a/b: would replace a/b/\., from which it is made"):
        write("a/b", source="a/b/.")
    shutil.copytree(source, tmp_path / "run" / "checkpoints" / "step-00000005")
    (tmp_path / "run" / "run.json").write_text("{}")
    for inside in ("checkpoints", "checkpoints/step-00000005", "checkpoints/step-00000009", "checkpoints/a/b"):
        with pytest.raises(ValueError, match="belongs to the run in"):
            write(tmp_path / "run" / inside, source=str(tmp_path / "run"))
    write(tmp_path / "run" / "export", source=str(tmp_path / "run"))


@pytest.mark.parametrize("inside", [False, True])
def test_what_is_replaced_stays_until_the_new_one_is_whole(
    tmp_path: Path, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owned, "_must_stay", lambda target: inside and target.is_dir())
    write(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "out", "llmtrain export") as directory:
        (directory / "weights").write_text("half")
        assert {**contents(tmp_path / "out"), **written("old")} == contents(tmp_path / "out")
        raise KeyboardInterrupt
    assert contents(tmp_path / "out") == written("old") and os.listdir(tmp_path) == ["out"]
    write(tmp_path / "out", "new")
    assert contents(tmp_path / "out") == written("new") and no_leftovers(tmp_path / "out")


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_user_adds_while_it_is_written_stays(
    tmp_path: Path, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owned, "_must_stay", lambda target: inside and target.is_dir())
    write(tmp_path / "out", "old")
    with (
        pytest.raises(ValueError, match="holds thesis"),
        replacing(tmp_path / "out", "llmtrain export") as directory,
    ):
        (directory / "weights").write_text("new")
        (tmp_path / "out" / "thesis.txt").write_text("thesis")
    assert contents(tmp_path / "out") == {**written("old"), "thesis.txt": "thesis"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_directory_that_cannot_be_exchanged_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mounted disk: the directory itself stays."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    (tmp_path / "disk").mkdir()
    inode = (tmp_path / "disk").stat().st_ino
    for text in ("one", "two"):
        write(tmp_path / "disk", text)
        assert contents(tmp_path / "disk") == written(text) and (tmp_path / "disk").stat().st_ino == inode


def test_a_directory_that_a_user_is_in_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep").rmdir()
    monkeypatch.chdir(tmp_path / "out")
    for text in ("one", "two"):
        write(".", text)
        assert contents(Path(".")) == written(text)  # the directory that the user sees
    monkeypatch.chdir("deep")
    with pytest.raises(ValueError, match="holds thesis"):
        (tmp_path / "out" / "thesis").write_text("")
        write("..", "three")
    (tmp_path / "out" / "thesis").unlink()
    monkeypatch.chdir(tmp_path / "out")
    write(tmp_path / "out", "three")
    assert contents(Path(".")) == written("three")


def test_a_stage_may_write_into_its_own_directory(tmp_path: Path) -> None:
    """What `llmtrain run` keeps there stays, and so does a file of a user's that has such a name."""
    for text in ("one", "two"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "stage.yaml").write_text("# llmtrain run: export")
        (tmp_path / "out" / "spent.json").write_text('{"cpu_s": 1.0}')  # of an attempt that failed
        write(tmp_path / "out", text)
        (tmp_path / "out" / "done.json").write_text("{}")
        kept = {"stage.yaml": "# llmtrain run: export", "done.json": "{}", "spent.json": '{"cpu_s": 1.0}'}
        assert contents(tmp_path / "out") == {**written(text), **kept}
    (tmp_path / "out" / "thesis").write_text("")
    with pytest.raises(ValueError, match="holds thesis, which"):
        write(tmp_path / "out")


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_while_a_directory_is_filled(tmp_path: Path, renames: int) -> None:
    """An empty one: the next command goes on."""
    (tmp_path / "out").mkdir()
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), str(renames)], check=False)
    write(tmp_path / "out", "third")
    assert contents(tmp_path / "out") == written("third") and no_leftovers(tmp_path / "out")


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, disk_calls: list[tuple]) -> None:
    write(tmp_path / "out")
    rename = next(i for i, call in enumerate(disk_calls) if call[0] == "rename" and call[2] == str(tmp_path / "out"))
    synced = {Path(call[1]).name for call in disk_calls[:rename] if call[0] == "fsync"}
    assert {"weights", "more", "deep", MARKER} <= synced
    assert ("fsync", str(tmp_path), None) in disk_calls[rename:]


KILLED = """
import os, signal, sys
from llmtrain.observe import owned
real, count = os.rename, int(sys.argv[2])
def rename(old, new):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(old, new)
os.rename = rename
with owned.replacing(sys.argv[1], "llmtrain export") as directory:
    (directory / "weights").write_text("second")
    if sys.argv[2] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_at_any_rename_nothing_is_lost(tmp_path: Path, renames: int) -> None:
    write(tmp_path / "out", "first")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), str(renames)], check=False)
    held = [path.read_text() for path in tmp_path.rglob("weights")]
    assert "first" in held
    write(tmp_path / "out", "third")
    assert contents(tmp_path / "out") == written("third") and os.listdir(tmp_path) == ["out"]


def test_another_job_that_writes_the_same_is_left_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "out", "llmtrain export") as first:
        (first / "weights").write_text("first")
        write(tmp_path / "out", "second")
        assert first.exists() and contents(tmp_path / "out") == written("second")
    assert contents(tmp_path / "out") == {"weights": "first"} and os.listdir(tmp_path) == ["out"]


def fill(target: Path, text: str, *names: str) -> None:
    with filling(target, "llmtrain data", names) as directory:
        for name in names:
            (directory / name).write_text(text)


def test_filling_replaces_its_own_files_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("thesis")
    fill(tmp_path, "one", "a", "b")
    fill(tmp_path, "two", "b", "c")
    assert contents(tmp_path) == {"thesis.txt": "thesis", "a": "one", "b": "two", "c": "two"}
    fill(tmp_path, "three", "a")
    for name in ("thesis.txt", "c"):
        (tmp_path / name).write_text("changed")
        with pytest.raises(ValueError, match=re.escape(f"holds {name}, which llmtrain did not write")):
            fill(tmp_path, "four", "a", name)
    assert contents(tmp_path) == {"thesis.txt": "changed", "a": "three", "b": "two", "c": "changed"}
