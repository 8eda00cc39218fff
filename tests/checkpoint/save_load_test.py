from __future__ import annotations

import ast
import builtins
import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import llmtrain.checkpoint
from llmtrain.checkpoint import save as save_module
from llmtrain.checkpoint.group import LocalGroup
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import list_checkpoints, newest_intact, verify
from llmtrain.checkpoint.save import save_checkpoint
from llmtrain.types import Address, Fragment

LAYOUTS = [(1, 1, 1), (2, 2, 1), (1, 1, 3), (1, 2, 2), (2, 1, 2), (1, 4, 1)]


@pytest.mark.parametrize("saved", LAYOUTS)
def test_saved_in_one_layout_loads_in_every_other(tmp_path: Path, fake: SimpleNamespace, saved: tuple) -> None:
    tensors = fake.tensors()
    path = fake.save(tmp_path, tensors, fake.Layout(*saved), 7)[0]
    verify(path)
    reader = CheckpointReader(path)
    assert reader.state == {"step": 7, "note": "hello"}
    assert sorted(reader.names()) == sorted(tensors)
    for name, keys in tensors.items():
        assert all(torch.equal(reader.full(name, key), keys[key]) for key in fake.KEYS)
    for asked in LAYOUTS:
        layout = fake.Layout(*asked)
        for rank in range(layout.size):
            engine = fake.FakeEngine(layout, rank, tensors)
            engine.load_fragments(reader.read, step=7)
            wanted = {f.address: f.tensors for f in engine.fragments()}
            got = {f.address: f.tensors for f in engine.loaded if f.address.numel}
            assert wanted.keys() == got.keys()
            assert all(torch.equal(wanted[a][key], got[a][key]) for a in wanted for key in fake.KEYS)


def test_files_are_plain_safetensors_that_each_rank_wrote_alone(tmp_path: Path, fake: SimpleNamespace) -> None:
    path = Path(fake.save(tmp_path, fake.tensors(), fake.Layout(dp=2), 3)[0])
    assert path.name == "step-00000003"
    pair = ["rank-{}.json", "rank-{}.safetensors"]
    ranks = [name.format(rank) for rank in ("00000", "00001") for name in pair]
    assert sorted(os.listdir(path)) == ["manifest.json", "manifest.sha256", *ranks, "state.json"]
    sizes = [sum(t.numel() for t in load_file(path / f"rank-0000{rank}.safetensors").values()) for rank in range(2)]
    assert abs(sizes[0] - sizes[1]) < 100  # each half


def test_a_rank_that_owns_nothing(tmp_path: Path, fake: SimpleNamespace) -> None:
    tensors = {"norm.weight": {key: torch.ones(1) for key in fake.KEYS}}
    path = fake.save(tmp_path, tensors, fake.Layout(dp=2), 1)[0]
    verify(path)
    assert CheckpointReader(path).full("norm.weight").tolist() == [1.0]


def test_missing_and_misshapen_parameters_are_named(tmp_path: Path, fake: SimpleNamespace) -> None:
    reader = CheckpointReader(fake.save(tmp_path, fake.tensors(), fake.Layout(), 1)[0])
    with pytest.raises(ValueError, match=r"step-00000001: no parameter head\.weight; it holds embed\.weight"):
        reader.full("head.weight")
    whole = Address("embed.weight", (64, 16), None, 0, 1, 0, 1024)
    with pytest.raises(ValueError, match=r"embed\.weight has shape \[32, 16\], the model has \[64, 16\]"):
        reader.read(whole)
    with pytest.raises(ValueError, match="outside"):
        reader.read(replace(whole, shape=(32, 16)))
    with pytest.raises(ValueError, match="no momentum, only weight, exp_avg, exp_avg_sq"):
        reader.full("embed.weight", "momentum")


class Broken:
    """Hands out the fragments that it was given."""

    def __init__(self, *fragments: Fragment) -> None:
        self.given = fragments

    def fragments(self) -> Iterator[Fragment]:
        yield from self.given


@pytest.mark.parametrize(
    ("fragments", "message"),
    [
        (
            [Fragment(Address("p", (4,), None, 0, 1, 0, 3), {"weight": torch.ones(3)})],
            "elements 3 to 4 of 4 owned by no",
        ),
        (
            [Fragment(Address("p", (4,), None, 0, 1, 0, 4), {"weight": torch.ones(4)})] * 2,
            "elements 0 to 4 of 4 owned tw",
        ),
        ([Fragment(Address("p", (4,), None, 0, 1, 0, 4), {"weight": torch.ones(3)})], r"p\|weight\|0: torch.float32"),
        ([Fragment(Address("p", (2,), None, 0, 1, 0, 2), {"weight": torch.ones(2).half()})], "torch.float16"),
        (
            [
                Fragment(Address("p", (2,), None, 0, 1, 0, 1), {"weight": torch.ones(1)}),
                Fragment(Address("p", (2,), None, 0, 1, 1, 1), {"weight": torch.ones(1), "exp_avg": torch.ones(1)}),
            ],
            "pieces with different keys",
        ),
    ],
)
def test_fragments_that_do_not_make_a_model_are_refused(tmp_path: Path, fragments: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_checkpoint(str(tmp_path), Broken(*fragments), {"step": 1}, LocalGroup(), 3, {"p": (4,)})
    assert os.listdir(tmp_path) == []


def test_keep_two_keeps_the_two_newest_and_never_a_later_step(tmp_path: Path, fake: SimpleNamespace) -> None:
    tensors, layout = fake.tensors(), fake.Layout(dp=2)
    for step in (1, 2, 3, 4, 10):
        fake.save(tmp_path, tensors, layout, step, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000010"]
    fake.save(tmp_path, tensors, layout, 5, keep=1)  # the run went back
    assert sorted(os.listdir(tmp_path)) == ["step-00000005", "step-00000010"]


def test_the_same_step_again_replaces_and_leftovers_go(tmp_path: Path, fake: SimpleNamespace) -> None:
    for leftover in ("step-00000009.tmp", "step-00000002.trash", "step-00000001.old.trash"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "rank-00000.json").touch()
    fake.save(tmp_path, fake.tensors(seed=0), fake.Layout(), 5, keep=1)
    newer = fake.tensors(seed=1)
    path = fake.save(tmp_path, newer, fake.Layout(), 5, keep=3)[0]
    assert os.listdir(tmp_path) == ["step-00000005"]
    assert torch.equal(CheckpointReader(path).full("embed.weight"), newer["embed.weight"]["weight"])


def test_what_a_user_put_there_stays(tmp_path: Path, fake: SimpleNamespace) -> None:
    """Directories of the user's with names like ours, and notes in ours, whatever is pruned or left by a kill."""
    for name in ("step-00000001", "step-00000002.tmp", "step-00000003.old.trash"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pt").write_text("mine")
    fake.save(tmp_path, fake.tensors(), fake.Layout(), 4, keep=1)
    (tmp_path / "step-00000004" / "notes.txt").write_text("mine")
    for step in (5, 6, 7):
        fake.save(tmp_path, fake.tensors(), fake.Layout(), step, keep=1)
    kept = ["step-00000001", "step-00000002.tmp", "step-00000003.old.trash", "step-00000004", "step-00000007"]
    assert sorted(os.listdir(tmp_path)) == kept


def test_killed_between_the_two_renames_of_a_replacement(
    tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, rename = fake.tensors(), os.rename
    fake.save(tmp_path, tensors, fake.Layout(), 5, keep=1)

    def killed(source: str, target: str) -> None:
        if source.endswith(".tmp"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        engine = fake.FakeEngine(fake.Layout(), 0, tensors)
        save_checkpoint(str(tmp_path), engine, {"step": 5}, LocalGroup(), 1, fake.shapes(tensors))
    monkeypatch.undo()
    kept = newest_intact(str(tmp_path))
    assert kept is not None and kept.endswith("step-00000005.old")
    fake.save(tmp_path, tensors, fake.Layout(), 5, keep=1)
    assert os.listdir(tmp_path) == ["step-00000005"]


def test_killed_after_a_replacement_before_the_replaced_one_went(tmp_path: Path, fake: SimpleNamespace) -> None:
    path = fake.save(tmp_path, fake.tensors(), fake.Layout(), 5)[0]
    shutil.copytree(path, path + ".old")
    fake.save(tmp_path, fake.tensors(), fake.Layout(), 5)
    assert os.listdir(tmp_path) == ["step-00000005"]


def test_a_layout_that_differs_in_zero_only_reads_no_more_than_it_asks_for(
    tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = fake.tensors()
    reader = CheckpointReader(fake.save(tmp_path, tensors, fake.Layout(tp=2, dp=2), 1)[0])
    monkeypatch.setattr("llmtrain.checkpoint.load.assemble", lambda *_: pytest.fail("assembled a whole parameter"))
    fake.FakeEngine(fake.Layout(pp=2, tp=2, dp=3), 5, tensors).load_fragments(reader.read, step=1)


class FullDisk:
    """A file on a disk with room for `room` bytes more."""

    def __init__(self, file: object, room: int) -> None:
        self.file, self.room = file, room

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: object) -> None:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.file.write(data)


@pytest.mark.parametrize("victim", ["rank-00001.safetensors", "rank-00000.json", "state.json", "manifest.json"])
def test_a_full_disk_is_one_error_on_all_ranks(
    tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    tensors, layout = fake.tensors(), fake.Layout(dp=2)
    good = fake.save(tmp_path, tensors, layout, 1)[0]
    real = builtins.open

    def limited(path: object, mode: str = "r", **kwargs: object) -> object:
        file = real(path, mode, **kwargs)
        return FullDisk(file, 10) if str(path).endswith(victim) and "w" in mode else file

    monkeypatch.setattr(builtins, "open", limited)
    errors = fake.save(tmp_path, tensors, layout, 2)
    monkeypatch.undo()
    rank = 1 if "00001" in victim else 0
    for error in errors:
        assert isinstance(error, OSError), error
        assert f"rank {rank}: " in str(error) and victim in str(error) and "No space left" in str(error)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert newest_intact(str(tmp_path)) == good
    assert fake.save(tmp_path, tensors, layout, 2)[1].endswith("step-00000002")


def test_a_directory_that_cannot_be_made(tmp_path: Path, fake: SimpleNamespace) -> None:
    (tmp_path / "checkpoints").touch()
    errors = fake.save(tmp_path / "checkpoints", fake.tensors(), fake.Layout(dp=2), 1)
    assert all(isinstance(e, OSError) and "rank 0: " in str(e) and "checkpoints" in str(e) for e in errors), errors


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def damage_at_random(file: Path, chance: random.Random) -> None:
    """One bit, one byte, a run of bytes, a shorter file, a longer one, or none at all."""
    data = bytearray(file.read_bytes())
    at = chance.randrange(len(data))
    match chance.choice(("bit", "bit", "bit", "byte", "run", "cut", "cut", "longer", "gone")):
        case "bit":
            data[at] ^= 1 << chance.randrange(8)
        case "byte":
            data[at] = (data[at] + chance.randrange(1, 256)) % 256
        case "run":
            data[at : at + 512] = bytes(255 - byte for byte in data[at : at + 512])
        case "cut":
            del data[at:]
        case "longer":
            data += chance.randbytes(chance.randrange(1, 100))
        case "gone":
            return file.unlink()
    file.write_bytes(data)


def test_2000_damages_none_loads_silently(
    tmp_path: Path, fake: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, layout = {"p": fake.tensors()["norm.weight"]}, fake.Layout(dp=2)
    older, newer = (Path(fake.save(tmp_path, tensors, layout, step)[0]) for step in (1, 2))
    chance, files = random.Random(0), sorted(newer.iterdir())
    assert len(files) == 7
    for trial in range(2000):
        file = files[trial % len(files)]
        whole = file.read_bytes()
        damage_at_random(file, chance)
        if trial % 10:
            named = r"manifest\.(json|sha256)" if "manifest" in file.name else re.escape(str(file))
            with pytest.raises(ValueError, match=named):
                verify(str(newer))
        else:  # costs hashing the older one too
            caplog.clear()
            assert newest_intact(str(tmp_path)) == str(older)
            assert str(newer) in caplog.text and "falling back" in caplog.text
        file.write_bytes(whole)
    verify(str(newer))


def test_a_file_that_was_not_saved_is_not_read(tmp_path: Path, fake: SimpleNamespace) -> None:
    tensors = fake.tensors()
    path = Path(fake.save(tmp_path, tensors, fake.Layout(dp=2), 1)[0])
    for suffix in ("json", "safetensors"):
        shutil.copyfile(path / f"rank-00001.{suffix}", path / f"rank-00002.{suffix}")
    (path / "notes.txt").write_text("the good one")
    verify(str(path))
    reader = CheckpointReader(str(path))
    assert reader.full("embed.weight").equal(tensors["embed.weight"]["weight"]) and not reader.restore_rng(2)


def test_parameters_may_have_different_optimizer_keys(tmp_path: Path, fake: SimpleNamespace) -> None:
    """As with Muon for matrices and AdamW for the rest."""
    tensors = fake.tensors()
    for keys in tensors.values():
        if keys["weight"].dim() > 1:
            keys["momentum"] = keys.pop("exp_avg")
            del keys["exp_avg_sq"]
    reader = CheckpointReader(fake.save(tmp_path, tensors, fake.Layout(tp=2, dp=2), 1)[0])
    for name, keys in tensors.items():
        address = Address(name, tuple(keys["weight"].shape), None, 0, 1, 0, keys["weight"].numel())
        read = reader.read(address)
        assert read.keys() == keys.keys() and all(read[key].equal(keys[key].flatten()) for key in keys)
    with pytest.raises(ValueError, match=r"embed\.weight has no exp_avg, only weight, momentum"):
        reader.full("embed.weight", "exp_avg")


def damage_flip(file: Path) -> None:
    flip(file, file.stat().st_size // 2, 3)


def damage_truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_flip, "check"),
        (damage_truncate, "bytes where the manifest says|manifest.json: does not match"),
        (Path.unlink, "No such file"),
    ],
)
@pytest.mark.parametrize("name", ["rank-00001.safetensors", "rank-00000.json", "state.json", "manifest.json"])
def test_a_broken_file_is_named_and_the_one_before_is_taken(
    tmp_path: Path, fake: SimpleNamespace, caplog: pytest.LogCaptureFixture, damage: Callable, reason: str, name: str
) -> None:
    tensors, layout = {"p": fake.tensors()["norm.weight"]}, fake.Layout(dp=2)
    older, newer = (fake.save(tmp_path, tensors, layout, step)[0] for step in (1, 2))
    damage(Path(newer, name))
    results = fake.run_ranks(2, lambda group: newest_intact(str(tmp_path), group))
    assert results == [older, older]
    assert len(caplog.records) == 1 and os.path.join(newer, name) in caplog.text
    assert re.search(reason, caplog.text)
    shutil.rmtree(older)
    assert newest_intact(str(tmp_path)) is None


def test_every_rank_hashes_a_share(tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake.save(tmp_path, fake.tensors(), fake.Layout(dp=4), 1)[0]
    hashed: list[str] = []
    monkeypatch.setattr(
        "llmtrain.checkpoint.manifest._check_file", lambda file, entry: hashed.append(os.path.basename(file))
    )
    fake.run_ranks(3, lambda group: verify(path, group))
    assert sorted(hashed) == sorted(set(os.listdir(path)) - {"manifest.json", "manifest.sha256"})


def test_list_is_by_step_and_only_whole_ones(tmp_path: Path) -> None:
    assert list_checkpoints(str(tmp_path / "nothing")) == []
    names = [
        "step-00000010",
        "step-00000010.old",
        "step-00000009",
        "step-100000000",
        "step-00000011.tmp",
        "step-1",
        "x",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    expected = ["step-00000009", "step-00000010.old", "step-00000010", "step-100000000"]
    assert [os.path.basename(path) for path in list_checkpoints(str(tmp_path))] == expected


def test_the_package_knows_no_pickle() -> None:
    package = Path(llmtrain.checkpoint.__file__).parent
    for file in package.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(m.split(".")[0] in ("pickle", "shelve", "joblib", "dill") for m in modules), file
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("torch.load", "torch.save", "np.load", "numpy.load"), file


def test_manifest_lists_what_lies_there(tmp_path: Path, fake: SimpleNamespace) -> None:
    path = fake.save(tmp_path, fake.tensors(), fake.Layout(dp=2), 1)[0]
    files = json.loads(Path(path, "manifest.json").read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {
        name: os.path.getsize(os.path.join(path, name)) for name in os.listdir(path) if "manifest" not in name
    }
    assert save_module.LEFTOVER.fullmatch(os.path.basename(path)) is None


def test_whatever_goes_wrong_on_one_rank_is_told_to_all(tmp_path: Path, fake: SimpleNamespace) -> None:
    def action(group: object) -> str:
        state = {"step": 1, "bad": torch.ones(1)} if group.rank == 0 else {"step": 1}
        tensors = fake.tensors()
        engine = fake.FakeEngine(fake.Layout(dp=2), group.rank, tensors)
        return save_checkpoint(str(tmp_path), engine, state, group, 1, fake.shapes(tensors))

    errors = fake.run_ranks(2, action)
    assert all(isinstance(e, ValueError) and "rank 0: TypeError" in str(e) for e in errors), errors
