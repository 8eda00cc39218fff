"""Checks that documents with evaluation problems are found: worked cases, and planted ones in GSM8K."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

import numpy as np
from datatrove.data import Document

from llmtrain.config.clean.content import ContaminationConfig
from llmtrain.config.clean.web import WordsConfig
from llmtrain.config.data import SourceConfig
from llmtrain.config.schema import DataConfig
from llmtrain.data.clean.contamination import Decontaminator, make
from llmtrain.data.clean.evaluation_sets import evaluation_sets
from llmtrain.data.clean.held_out_text import write_held_out
from llmtrain.data.clean.ngrams import WORD, Gathered, ngram_hashes, word_hashes
from tests.shared_data import shared_data

PROBLEM = "One two three four five six seven eight nine ten eleven twelve, thirteen fourteen; how many?"


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., str]:
    """Returns a function that writes rows into a file and returns its path."""

    def write(name: str, *lines: dict) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def check(**settings: object) -> Decontaminator:
    return make(ContaminationConfig(**settings), WordsConfig())


def judged(own: Decontaminator, text: str) -> tuple[str | None, Document]:
    document = Document(text=text, id="0", metadata={})
    return own(document), document


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not(rows: Callable) -> None:
    own = check(sets={"mine": rows("a", {"question": PROBLEM, "answer": "16"})})
    twelve = "x two THREE four-five (six) seven\neight nine ten eleven twelve thirteen y"
    assert judged(own, twelve)[0] is None and "contaminated_by" not in judged(own, twelve)[1].metadata
    reason, document = judged(own, twelve.replace(" y", " Fourteen!"))
    assert reason == "contaminated" and document.metadata["contaminated_by"] == ["mine"]
    assert own.counts == {"documents_with/mine": 1}
    assert judged(own, PROBLEM.replace("seven", "seven and"))[0] is None  # no run is longer than nine
    assert own.index.counts["mine"] == {
        "rows": 1,
        "rows_too_short": 0,
        "ngrams": 4,
        "one_in": 1,
    }  # 16 words, n-grams of 13


def test_n_is_set_for_all_and_by_set(rows: Callable) -> None:
    sets = {"a": rows("a", {"text": PROBLEM}), "b": rows("b", {"text": " ".join(f"w{i}" for i in range(40))})}
    own = check(sets=sets, n=5, n_by_set={"b": 20})
    assert judged(own, "six seven eight nine ten")[1].metadata["contaminated_by"] == ["a"]
    assert judged(own, "six seven eight nine")[0] is None
    assert judged(own, " ".join(f"w{i}" for i in range(19)))[0] is None
    assert judged(own, " ".join(f"w{i}" for i in range(20)))[1].metadata["contaminated_by"] == ["b"]
    both = judged(own, " ".join(f"w{i}" for i in range(20)) + f" {PROBLEM}")[1].metadata["contaminated_by"]
    assert both == ["a", "b"] and own.counts == {"documents_with/a": 2, "documents_with/b": 2}


def test_a_short_problem_is_found_as_a_whole(rows: Callable) -> None:
    own = check(sets={"mine": rows("a", {"q": "What is the sum of nine and four?", "a": "13"}, {"q": "Add 2 and 3."})})
    assert judged(own, "He asked: what is the sum of nine, and four? I said")[0] == "contaminated"
    assert judged(own, "what is the sum of nine and five")[0] is None and judged(own, "Add 2 and 3.")[0] is None
    assert own.index.counts["mine"] == {"rows": 2, "rows_too_short": 1, "ngrams": 1, "one_in": 1}


def test_turns_and_answers_are_read_and_templates_are_not(rows: Callable) -> None:
    system = {
        "role": "system",
        "content": "You are a helpful assistant who answers all of the questions that people ask",
    }
    lines = [
        {"messages": [system, {"role": "user", "content": f"{PROBLEM} number{i} " + f"z{i} " * 13}]} for i in range(11)
    ]
    own = check(sets={"mine": rows("a", *lines)})
    assert judged(own, system["content"])[0] is None and judged(own, PROBLEM)[0] is None  # in more than ten rows
    assert judged(own, "z4 " * 13)[0] == "contaminated"
    assert judged(check(sets={"mine": rows("b", *lines[:10])}), PROBLEM)[0] == "contaminated"


def test_a_passage_is_cut_with_what_stands_around_it(rows: Callable) -> None:
    own = check(sets={"mine": rows("a", {"text": PROBLEM})}, action="cut", cut_chars=10)
    reason, document = judged(own, f"{'a' * 30} {PROBLEM} {'b' * 30}")
    assert reason is None and document.metadata["contaminated_by"] == ["mine"]
    # ten characters before go, the space among them; behind, the hit ends at "many", before "? "
    assert document.text == "a" * 21 + "\n\n" + "b" * 22 and own.counts["documents_cut"] == 1
    assert judged(own, f"{'a' * 12} {PROBLEM}")[0] == "contaminated"  # the piece left is shorter than cut_chars
    many = f" {PROBLEM} ".join(["c" * 40] * 12)
    assert judged(own, many)[0] == "contaminated" and own.counts["documents_cut"] == 1  # 12 pieces, 10 are allowed


def test_scripts_without_spaces_are_found_by_character(rows: Callable) -> None:
    own = check(sets={"mine": rows("a", {"text": "小明有五个苹果他又买了三个一共有几个"})})
    assert judged(own, "题目：小明有五个苹果，他又买了三个。一共有几个？")[0] == "contaminated"
    assert judged(own, "小明有五个梨子，他又买了三个香蕉")[0] is None


def test_without_sets_and_on_odd_text_nothing_is_found(rows: Callable) -> None:
    assert judged(check(), PROBLEM) == (None, Document(text=PROBLEM, id="0", metadata={}))
    own = check(sets={"mine": rows("a", {"text": PROBLEM, "n": 3, "more": [None, {"deep": "x"}]})})
    for text in ("", "\0", "\U0001f600" * 50, "שלום " * 40, "\ud800", "a" * 10_000_000, "!?" * 100_000):
        assert judged(own, text)[0] is None


def test_hashes_of_words_are_a_polynomial() -> None:
    one, two, three = (int(h) for h in word_hashes(["a", "b", "C"]))
    assert three == int(word_hashes(["c"])[0])
    assert ngram_hashes(np.array([one, two, three], np.uint64), 2).tolist() == [
        (one * 0x9E3779B97F4A7C15 + two) % 2**64,
        (two * 0x9E3779B97F4A7C15 + three) % 2**64,
    ]
    assert WORD.findall("Don't, x_y 3.5 né") == ["Don", "t", "x", "y", "3", "5", "né"]


def test_of_more_hashes_than_there_is_room_for_a_share_stays() -> None:
    """Below 2^62 there are two of six, which is the first quarter that has three or fewer."""
    values = [1, 2**61, 2**62, 2**62 + 5, 2**63 - 1, 2**64 - 1]
    for order in (values, values[::-1]):
        gathered = Gathered(most=3)
        for value in order:
            gathered.add({13: np.array([value], np.uint64)})
            gathered.add({13: np.array([1], np.uint64)})
            gathered.settle()
        hashes, rows = gathered.held[13]
        assert (hashes.tolist(), rows.tolist(), gathered.one_in) == ([1, 2**61], [7, 1], 4)
    none = Gathered(most=0)
    none.add({13: np.array([0, 5], np.uint64)})
    none.settle()
    assert none.held[13][0].tolist() == []


def test_a_long_passage_is_found_where_one_in_many_ngrams_is_looked_up(rows: Callable, tmp_path: Path) -> None:
    """4,000 words have 3,976 n-grams in two texts; with room for 200 one in 32 is looked up, about 124."""
    lines = [" ".join(f"{part}{i}" for i in range(2000)) for part in "abcd"]
    source = SourceConfig(name="s", type="jsonl", path=rows("s", *({"text": line} for line in lines)), held_out=0.5)
    settings = ContaminationConfig(text_ngrams=200)
    own = check(sets=write_held_out([source], 0, settings, str(tmp_path / "made")))
    assert 90 < own.index.counts["text-s"]["ngrams"] <= 200
    assert sum(judged(own, line)[0] == "contaminated" for line in lines) == 2  # every second one is held out


def test_what_cannot_be_read_is_refused(rows: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set 'gone': .*no-such.jsonl: no such file; give the path"):
        check(sets={"gone": str(tmp_path / "no-such.jsonl")})
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: not valid JSON"):
        check(sets={"bad": str(tmp_path / "bad.jsonl")})
    with pytest.raises(ValueError, match=r"max_ngrams=3: the sets up to 'a' hold 4 n-grams; raise it"):
        check(sets={"a": rows("a", {"text": PROBLEM})}, max_ngrams=3)


def test_every_set_that_a_document_evaluates_on_is_named_once() -> None:
    tasks = [{"name": "sums", "type": "chain_sum"}]
    stages = [
        (DataConfig(held_out="a.jsonl", tasks=tasks), "data"),
        (DataConfig(held_out="data/sums-held_out.jsonl"), "other"),
        (DataConfig(held_out="b.jsonl"), "other"),
        (DataConfig(), "other"),
    ]
    assert evaluation_sets(stages, {"more": "c.parquet"}) == {
        "more": "c.parquet",
        "task-sums": "data/sums-held_out.jsonl",
        "held_out": "a.jsonl",
        "held_out-2": "b.jsonl",
    }


@pytest.fixture(scope="module")
def gsm8k() -> Decontaminator:
    return check(sets={"gsm8k": str(shared_data("gsm8k/test.jsonl"))})


def lines_of(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in shared_data(f"gsm8k/{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_problems_of_gsm8k_are_found_where_they_are_planted(gsm8k: Decontaminator) -> None:
    import pydoc_data.topics as topics

    rng, prose = random.Random(0), list(topics.topics.values())
    found, texts = 0, [row["question"] for row in lines_of("test")]
    for text in texts:
        changed = "".join(rng.choice([char.upper(), char]) for char in text).replace(".", " !\n")
        found += judged(gsm8k, f"{rng.choice(prose)} {changed} {rng.choice(prose)}")[0] == "contaminated"
    long = sum(len(WORD.findall(text)) >= 8 for text in texts)
    print(f"{found} of {len(texts)} planted questions found, {long} have eight words or more; {gsm8k.index.counts}")
    assert found == long == len(texts) == 1319


def test_near_misses_and_unrelated_text_are_not_found(gsm8k: Decontaminator) -> None:
    import pydoc_data.topics as topics

    near = []
    for row in lines_of("test"):
        words = WORD.findall(row["question"])
        near.append(" ".join("xylem" if i % 12 == 11 else word for i, word in enumerate(words)))
    shakespeare = shared_data("tinyshakespeare/input.txt").read_text(encoding="utf-8")
    unrelated = [*topics.topics.values(), *(shakespeare[i : i + 2000] for i in range(0, len(shakespeare), 2000))]
    hits = [sum(judged(gsm8k, text)[0] is not None for text in texts) for texts in (near, unrelated)]
    print(f"near misses found: {hits[0]} of {len(near)}, unrelated: {hits[1]} of {len(unrelated)}")
    assert hits == [0, 0]
    train = lines_of("train")
    both = sum(judged(gsm8k, f"{row['question']}\n{row['answer']}")[0] is not None for row in train)
    print(f"rows of the training split that share 13 words with the test split: {both} of {len(train)}")
    assert both < 0.03 * len(train)
