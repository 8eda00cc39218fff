"""Checks the quality classifier: its figures by hand, its optimum, a learned task on real text, what is refused."""

import io
import json
import math
import tokenize
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

import numpy as np
from datatrove.data import Document

from llmtrain.config.clean.content import ClassifierConfig
from llmtrain.config.clean.web import WordsConfig
from llmtrain.data.clean.classifier import make, threshold, train
from llmtrain.data.clean.logistic import Rows, auc, auc_interval, features, fit, rows_of


def test_auc_is_the_share_of_pairs_in_order() -> None:
    # pairs (good, bad): 2>1, 2=2, 3>1, 3>2, and 0.5<1, 0.5<2: 3 wins and a tie of 6
    assert auc(np.array([2.0, 3.0, 0.5]), np.array([1.0, 2.0])) == 3.5 / 6
    assert auc(np.array([1.0]), np.array([0.0])) == 1.0 and auc(np.array([0.0]), np.array([1.0])) == 0.0
    assert auc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5
    low, high = auc_interval(1.0, 10, 99)
    assert abs(high - 1.0) < 1e-12 and abs(low - 0.7225) < 1e-3  # Wilson's, of 10 of 10


def test_a_text_is_a_vector_of_length_one() -> None:
    columns, values = features("the cat the cat", 2**20, 100)
    # words: the 2, cat 2; pairs: the cat 2, cat the 1: shares 2/7, 2/7, 2/7, 1/7
    assert len(columns) == 4 and sorted(values**2) == pytest.approx([1 / 7, 2 / 7, 2 / 7, 2 / 7])
    assert features("", 8, 100)[0].tolist() == [] and features("a b c d", 2**20, 2)[1].tolist() == [3**-0.5] * 3


def test_the_fit_is_the_optimum_that_can_be_worked_by_hand() -> None:
    # one word each: log(1 + exp(-w)) + l2 w^2 is least where 2 l2 w = 1 / (1 + exp(w)), the bias is 0
    rows = Rows(np.array([0, 1]), np.ones(2), np.array([0, 1, 2]))
    own = fit(rows, np.array([True, False]), 2, 0.05, tolerance=1e-9)
    w, other = own.weights
    assert w == pytest.approx(-other) and own.bias == pytest.approx(0.0, abs=1e-7) and own.gradient < 1e-9
    assert 2 * 0.05 * w == pytest.approx(1 / (1 + math.exp(w)), abs=1e-7) and w == pytest.approx(1.6335, abs=1e-4)


def test_both_kinds_weigh_the_same() -> None:
    # rows without features: only the bias is fitted, to log(0.5 / 0.5) = 0, though there are nine good ones to one bad
    rows = Rows(np.zeros(0, np.int64), np.zeros(0), np.zeros(11, np.int64))
    assert fit(rows, np.arange(10) < 9, 4, 1.0).bias == pytest.approx(0.0, abs=1e-5)


def prose() -> list[str]:
    import pydoc_data.topics as topics

    return [part for text in topics.topics.values() for part in text.split("\n\n") if len(part.split()) >= 20]


def comments() -> list[str]:
    """Returns the comments of some modules of the standard library, six in a row as a document."""
    lines = []
    for name in ("argparse", "datetime", "_pydecimal", "inspect", "subprocess", "threading", "typing", "zipfile"):
        source = Path(find_spec(name).origin).read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        lines += [token.string.strip("# ") for token in tokens if token.type == tokenize.COMMENT]
    return ["\n".join(lines[i : i + 6]) for i in range(0, len(lines), 6)]


def seeds(directory: Path, good: list[str], bad: list[str]) -> dict[str, str]:
    paths = {}
    for kind, texts in (("good", good), ("bad", bad)):
        path = directory / f"{kind}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths[kind] = str(path)
    return paths


GOOD = [f"good words of number {i} are written with care" for i in range(100)]
BAD = [f"buy cheap pills now click {i} here free" for i in range(100)]


def test_documentation_is_told_from_comments_of_code(tmp_path: Path) -> None:
    good, bad = prose(), comments()
    settings = ClassifierConfig(**seeds(tmp_path, good, bad), path=str(tmp_path / "classifier"), buckets=2**16)
    report = train(settings, settings.path)
    print(report)
    assert report["auc"] > 0.97 and report["auc_interval"][0] > 0.9 and report["gradient"] < 1e-6
    assert sum(report["trained_documents"].values()) + sum(report["held_out_documents"].values()) == len(
        set(good)
    ) + len(set(bad))
    check = make(settings, WordsConfig())
    document = Document(text=good[0], id="0", metadata={})
    assert check(document) is None and document.metadata["quality"] > 0.5
    assert check(Document(text=bad[0], id="0", metadata={})) == "low_quality"


def test_keep_share_sets_the_threshold_on_held_out_bad_seeds(tmp_path: Path) -> None:
    paths = seeds(tmp_path, GOOD, [*BAD, *(f"{text} good words" for text in BAD)])
    settings = ClassifierConfig(**paths, keep_share=0.1)
    report = train(settings, str(tmp_path / "c"))
    number = report["held_out_documents"]["bad"]
    assert 0.1 <= report["kept_share"]["bad"] <= 0.1 + 1 / number
    assert threshold(settings, {"bad": np.arange(0.0, 1.01, 0.1)}) == pytest.approx(0.9)
    other = train(settings.model_copy(update={"keep_share": None, "threshold": 0.0}), str(tmp_path / "c"))
    assert other["kept_share"] == {"good": 1.0, "bad": 1.0} and other["auc"] == report["auc"]


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    settings = ClassifierConfig(**seeds(tmp_path, GOOD, BAD))
    reports = [train(settings, str(tmp_path / name)) for name in "ab"]
    files = [(tmp_path / name / "classifier.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1] and reports[0] == reports[1]
    assert train(settings.model_copy(update={"seed": 1}), str(tmp_path / "c")) != reports[0]


def test_other_seeds_do_not_train_it_again(tmp_path: Path) -> None:
    place = str(tmp_path / "c")
    settings = ClassifierConfig(**seeds(tmp_path, GOOD, BAD))
    train(settings, place)
    with pytest.raises(
        ValueError, match=r"holds a classifier of other l2, and is not trained again in silence; remove"
    ):
        train(settings.model_copy(update={"l2": 1.0}), place)
    seeds(tmp_path, GOOD[1:], BAD)
    before = (tmp_path / "c" / "classifier.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"of other good, and is not"):
        train(settings, place)
    assert (tmp_path / "c" / "classifier.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (GOOD, [*BAD, GOOD[0]], r"1 documents are both in good and in bad; remove them"),
        (
            GOOD,
            BAD[:20],
            r"classifier.bad: \d+ documents to train on and \d+ held out, of which 10 are needed; give more",
        ),
        ([*GOOD, " "], BAD, r"good.jsonl:101: has no text in the field 'text'"),
    ],
)
def test_wrong_seeds_are_refused(tmp_path: Path, good: list[str], bad: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(ClassifierConfig(**seeds(tmp_path, good, bad)), str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_what_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    settings = ClassifierConfig(**seeds(tmp_path, GOOD, BAD))
    with pytest.raises(ValueError, match=r"path=null: must name the directory"):
        make(settings, WordsConfig())
    settings = settings.model_copy(update={"path": str(tmp_path / "c")})
    with pytest.raises(ValueError, match="no trained classifier"):
        make(settings, WordsConfig())
    train(settings, settings.path)
    with open(tmp_path / "c" / "classifier.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"is not what classifier\.json says; remove"):
        make(settings, WordsConfig())


def test_odd_text_has_a_score(tmp_path: Path) -> None:
    settings = ClassifierConfig(**seeds(tmp_path, GOOD, BAD), path=str(tmp_path / "c"))
    train(settings, settings.path)
    check = make(settings, WordsConfig())
    for text in ("", "\0", "\ud800", "\U0001f600" * 1000, "שלום עולם", "word " * 2_000_000, "a" * 10_000_000):
        document = Document(text=text, id="0", metadata={})
        check(document)
        assert 0.0 <= document.metadata["quality"] <= 1.0
    assert rows_of(["", "a"], 8, 10).times(np.ones(8)).tolist() == [0.0, 1.0]
