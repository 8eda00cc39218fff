"""What a save asks of the disk, in which order: a checkpoint that has its final name must survive a power cut."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

FILES = ["rank-00000.safetensors", "rank-00000.json", "state.json", "manifest.json", "manifest.sha256"]


def written(directory: Path, calls: list[tuple]) -> list[str]:
    """The calls of one save by paths relative to `directory`; each file was synced with all of its content."""
    final = directory / "step-00000005"
    for call, path, content in calls:
        if call == "fsync" and content is not None:
            assert content and content == (final / Path(path).name).read_bytes(), path
    names = [[str(Path(x).relative_to(directory)) for x in call[1:] if isinstance(x, str)] for call in calls]
    return [" ".join([call[0], *paths]) for call, paths in zip(calls, names, strict=True)]


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_before_the_end(
    tmp_path: Path, fake: SimpleNamespace, disk_calls: list[tuple]
) -> None:
    partial, final = "step-00000005.tmp", "step-00000005"
    synced = [*(f"fsync {partial}/{name}" for name in FILES), f"fsync {partial}"]
    fake.save(tmp_path, fake.tensors(), fake.Layout(), 5)
    assert written(tmp_path, disk_calls) == [*synced, f"rename {partial} {final}", "fsync ."]


def test_the_replaced_one_goes_once_the_new_one_is_on_the_disk(
    tmp_path: Path, fake: SimpleNamespace, disk_calls: list[tuple]
) -> None:
    fake.save(tmp_path, fake.tensors(), fake.Layout(), 5)
    disk_calls.clear()
    fake.save(tmp_path, fake.tensors(seed=1), fake.Layout(), 5)
    moves = ["step-00000005 step-00000005.old", "step-00000005.tmp step-00000005"]
    assert written(tmp_path, disk_calls)[len(FILES) + 1 :] == [
        *(f"rename {move}" for move in moves),
        "fsync .",
        "rename step-00000005.old step-00000005.old.trash",
    ]
