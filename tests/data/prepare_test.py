from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from llmtrain.config.schema import DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from llmtrain.config.specials import FIM
from llmtrain.data import pieces
from llmtrain.data import prepare as module
from llmtrain.data.packing import Demonstrations, TextRows
from llmtrain.data.prepare import prepare
from llmtrain.data.shards import check_tokenizer, open_shards
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import ROOT

DATA = DataConfig(
    sources=[
        SourceConfig(name="topics", type="topics", max_bytes=60_000),
        SourceConfig(name="sums", type="arithmetic", count=8, weight=0.5, held_out=0.0),
    ],
    tasks=[TaskConfig(name="sum", type="chain_sum", train=40, held_out=8)],
)
TOKENIZER = TokenizerConfig(vocab_size=400, train_bytes=50_000)


def run(tmp_path: Path, data: DataConfig = DATA, tokenizer: TokenizerConfig = TOKENIZER, seed: int = 0) -> None:
    prepare(data, tokenizer, str(tmp_path / "data"), str(tmp_path / "tokenizer"), seed)


def contents(tmp_path: Path) -> dict[str, bytes]:
    """Returns all files but the hidden ones: markers say when."""
    return {p.name: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file() and not p.name.startswith(".")}


def test_everything_is_made_once_and_the_same_again(tmp_path: Path) -> None:
    run(tmp_path / "a")
    made = contents(tmp_path / "a")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    run(tmp_path / "a")
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    run(tmp_path / "b")
    assert made == contents(tmp_path / "b")
    tokenizer, directory = load_tokenizer(str(tmp_path / "a/tokenizer")), str(tmp_path / "a/data")
    assert tokenizer.vocab_size == 400
    check_tokenizer(directory, tokenizer)
    assert TextRows(directory, "train", 64, 0, True, {"topics": 1.0, "sums": 0.5}).batch([0]).loss_mask.any()
    assert len(Demonstrations(f"{directory}/sum-train.jsonl", tokenizer, 128, 0)) < 40


def test_weights_may_change_but_nothing_else(tmp_path: Path) -> None:
    run(tmp_path)
    topics, sums = DATA.sources
    run(tmp_path, DATA.model_copy(update={"sources": [topics, sums.model_copy(update={"weight": 2.0})]}))
    with pytest.raises(ValueError, match=r"made with other data, tokenizer or seed settings; give another data.path"):
        run(tmp_path, DATA.model_copy(update={"sources": [topics]}))
    with pytest.raises(ValueError, match="made with other data"):
        run(tmp_path, seed=1)
    shutil.rmtree(tmp_path / "tokenizer")
    prepare(DATA, TOKENIZER.model_copy(update={"vocab_size": 300}), str(tmp_path / "c"), str(tmp_path / "tokenizer"), 0)
    with pytest.raises(ValueError, match="another tokenizer than"):
        run(tmp_path)


def test_sentinels_are_made_when_an_objective_needs_them(tmp_path: Path) -> None:
    run(tmp_path / "plain")
    with_fim = DATA.model_copy(update={"fim_share": 0.5})
    run(tmp_path / "fim", with_fim)
    plain, fim = (load_tokenizer(str(tmp_path / name / "tokenizer")) for name in ("plain", "fim"))
    assert fim.special_ids(FIM) == [2, 3, 4] and fim.vocab_size == plain.vocab_size == 400
    with pytest.raises(ValueError, match="has no"):
        plain.special_ids(FIM)
    run(tmp_path / "fim", with_fim.model_copy(update={"fim_share": 0.1}))  # the share is for training
    with pytest.raises(ValueError, match="made with other data"):
        run(tmp_path / "plain", with_fim)


def test_a_killed_run_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_marker", die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a")
    assert not (tmp_path / "a/data/prepared.json").exists()
    run(tmp_path / "a")
    run(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_a_killed_run_had_tokenized_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second of two sources: the first is not tokenized again, and nothing of the way is left behind."""
    encoded: list[int] = []
    real = pieces.encode

    def encode(tokenizer: Tokenizer, dtype: str, batch: list[tuple[str, str]]) -> pieces.Parts:
        encoded.append(sum(len(text.encode()) for _, text in batch))
        if sum(encoded) > 60_000:
            raise KeyboardInterrupt
        return real(tokenizer, dtype, batch)

    with monkeypatch.context() as patched:
        patched.setattr(pieces, "encode", encode)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a")
    assert sum(encoded) > 60_000
    encoded.clear()
    monkeypatch.setattr(pieces, "encode", encode)
    run(tmp_path / "a")
    assert 0 < sum(encoded) < 20_000
    monkeypatch.undo()
    run(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not list(tmp_path.rglob(".llmtrain-pieces"))


def test_cleaned_documents_lie_below_the_data(tmp_path: Path) -> None:
    source = SourceConfig(name="web", type="cleaned")
    with pytest.raises(ValueError, match=r"'web': no \*.jsonl.zst below .*/data/clean/documents/web; clean documents"):
        run(tmp_path, DataConfig(sources=[source]))
    folder = tmp_path / "data" / "clean" / "documents" / "web"
    folder.mkdir(parents=True)
    pages = [f"a page of the web, number {i} {random.Random(i).randbytes(99).hex()}" for i in range(40)]
    lines = [json.dumps({"text": page}) + "\n" for page in pages]
    (folder / "00000.jsonl.zst").write_bytes(zstandard.compress("".join(lines).encode()))
    run(tmp_path, DataConfig(sources=[source]))
    tokenizer, shard = load_tokenizer(str(tmp_path / "tokenizer")), open_shards(str(tmp_path / "data"), "train")["web"]
    texts = [
        tokenizer.decode(shard.tokens[a:b].tolist()) for a, b in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)
    ]
    assert len(texts) == 38 and texts[0] == pages[0]
    (folder / "00000.jsonl.zst").write_bytes(zstandard.compress("".join(lines[:-1]).encode()))
    with pytest.raises(ValueError, match=r"was made from other contents of data.sources.web"):
        run(tmp_path, DataConfig(sources=[source]))


def test_shards_are_verified_when_it_is_asked_for(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "data" / "topics-train.bin"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    run(tmp_path)
    with pytest.raises(ValueError, match=r"topics-train.bin: is not what shards.json says of it"):
        run(tmp_path, DATA.model_copy(update={"verify": True}))


def test_no_tokenizer_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer there, and no data.sources"):
        run(tmp_path, DATA.model_copy(update={"sources": []}))


def test_progress_goes_to_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert all(word in err for word in ("task sum", "tokenizer", "tokens"))


def test_files_of_the_users_stay(tmp_path: Path) -> None:
    """A data directory may hold other files; one with a name that is to be written is refused before anything else."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.txt").write_text("mine")
    for name in ("sum-train.jsonl", "topics-held_out.bin", "sums-train.offsets.npy", "shards.json"):
        (tmp_path / "data" / name).write_text("mine")
        with pytest.raises(ValueError, match=f"data: holds {name}, which llmtrain did not write"):
            run(tmp_path)
        assert contents(tmp_path) == {"corpus.txt": b"mine", name: b"mine"}
        (tmp_path / "data" / name).unlink()
    run(tmp_path)
    assert (tmp_path / "data" / "corpus.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["tokenizer", "elsewhere"])
def test_a_tokenizers_neighbours_stay_and_links_are_followed(tmp_path: Path, place: str) -> None:
    for neighbour in ("tokenizer.tmp", "tokenizer.old"):
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "backup").write_text("mine")
    if place == "elsewhere":
        (tmp_path / "tokenizer").symlink_to(place)
    (tmp_path / place).mkdir()  # empty: it is filled
    run(tmp_path)
    assert (tmp_path / "tokenizer").is_symlink() == (place == "elsewhere")
    assert (tmp_path / place / "tokenizer.json").is_file()
    assert len([path for path in tmp_path.rglob("backup") if path.read_text() == "mine"]) == 2


def test_other_contents_of_a_source_are_told(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("one two three " * 4000)
    source = SourceConfig(name="own", type="text", path=str(corpus))
    data = DataConfig(sources=[source])
    made, tokenizer = str(corpus / "shards"), TokenizerConfig(vocab_size=260)  # below the source itself
    prepare(data, tokenizer, made, str(corpus / "tok"), 0)
    prepare(data, tokenizer, made, str(corpus / "tok"), 0)
    (corpus / "a.txt").write_text("one two three " * 3999 + "one two three.")
    with pytest.raises(ValueError, match=r"was made from other contents of data.sources.own; give another data.path"):
        prepare(data, tokenizer, made, str(corpus / "tok"), 0)
    (corpus / "a.txt").unlink()  # no longer needed
    prepare(data, tokenizer, made, str(corpus / "tok"), 0)


def test_data_of_earlier_versions_goes_on(tmp_path: Path) -> None:
    """Without markers, and without contents in prepared.json."""
    run(tmp_path)
    made = tmp_path / "data" / "prepared.json"
    made.write_text(
        json.dumps({name: value for name, value in json.loads(made.read_text()).items() if name != "contents"})
    )
    for marker in tmp_path.rglob(".llmtrain*"):
        marker.unlink()
    before = contents(tmp_path)
    run(tmp_path)
    assert contents(tmp_path) == before


PREPARE = """
import sys
from llmtrain.data import prepare as module
from tests.data.prepare_test import DATA, TOKENIZER
def wait(*_, real=getattr(module, sys.argv[3])):
    print("there", flush=True)
    sys.stdin.readline()
    return real(*_)
setattr(module, sys.argv[3], wait)
module.prepare(DATA, TOKENIZER, sys.argv[1], sys.argv[2], 0)
"""


@pytest.mark.parametrize(("moment", "other_data"), [("write_task", False), ("train_tokenizer", True)])
def test_the_second_job_that_prepares_the_same_is_refused(tmp_path: Path, moment: str, other_data: bool) -> None:
    places = (str(tmp_path / "data"), str(tmp_path / "tokenizer"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    first = subprocess.Popen([sys.executable, "-c", PREPARE, *places, moment], **pipes)
    assert first.stdout.readline() == "there\n"
    with pytest.raises(ValueError, match=f"another job is at work there: process {first.pid} on host"):
        prepare(DATA, TOKENIZER, str(tmp_path / "other") if other_data else places[0], places[1], 0)
    first.communicate("\n")
    assert first.returncode == 0
    prepare(DATA, TOKENIZER, *places, 0)
    assert not list(tmp_path.rglob("*.lock"))
