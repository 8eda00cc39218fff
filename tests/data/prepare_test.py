from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmtrain.config.schema import DataConfig, SourceConfig, TaskConfig, TokenizerConfig
from llmtrain.config.specials import FIM
from llmtrain.data import prepare as module
from llmtrain.data.packing import Demonstrations, TextRows
from llmtrain.data.prepare import prepare
from llmtrain.data.shards import check_tokenizer
from llmtrain.data.tokenizer import load_tokenizer

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
    return {p.name: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}


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


def test_no_tokenizer_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer there, and no data.sources"):
        run(tmp_path, DATA.model_copy(update={"sources": []}))


def test_progress_goes_to_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert all(word in err for word in ("task sum", "tokenizer", "tokens"))
