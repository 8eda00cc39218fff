"""Makes the documents of the tasks in this directory from GSM8K, as the harness's `custom_dataset`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from datasets import Dataset

PLACE = Path(os.environ.get("LLMTRAIN_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"), "gsm8k")
MOST = 200  # rows of a split that are read
ROWS_A_TEXT = 8


def split(name: str) -> list[dict]:
    lines = (PLACE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:MOST]
    rows = map(json.loads, lines)
    return [{"question": r["question"], "answer": re.sub(r"<<.*?>>", "", r["answer"])} for r in rows]


def made(document) -> dict[str, Dataset]:
    """The splits, with a document of every row and its number."""
    return {name: Dataset.from_list([document(i, r) for i, r in enumerate(split(name))]) for name in ("train", "test")}


def problems(**_: object) -> dict[str, Dataset]:
    return made(lambda i, r: {**r, "number": r["answer"].split("#### ")[1]})


def letters(**_: object) -> dict[str, Dataset]:
    """The result among three others, by letter."""

    def document(i: int, r: dict) -> dict:
        right = int(re.sub(r"[^\d-]", "", r["answer"].split("#### ")[1]))
        wrong = [right + 1, 2 * right + 3, abs(right - 7) + 11]
        choices = [str(n) for n in (*wrong[: i % 4], right, *wrong[i % 4 :])]
        return {"question": r["question"], "choices": choices, "gold": i % 4}

    return made(document)


def endings(**_: object) -> dict[str, Dataset]:
    """A problem without its last sentence, which is to be told from those of the next three."""
    lasts = {name: [re.split(r"(?<=[.?!]) ", r["question"])[-1] for r in split(name)] for name in ("train", "test")}

    def document(name: str, i: int, r: dict) -> dict:
        others = [lasts[name][(i + j) % len(lasts[name])] for j in (1, 2, 3)]
        return {
            "start": r["question"].removesuffix(lasts[name][i]).strip() or "Read.",
            "choices": [*others[: i % 4], lasts[name][i], *others[i % 4 :]],
            "gold": i % 4,
        }

    return {name: Dataset.from_list([document(name, i, r) for i, r in enumerate(split(name))]) for name in lasts}


def names(**_: object) -> dict[str, Dataset]:
    """Two texts that differ in a word, and what follows both."""

    def document(i: int, r: dict) -> dict:
        first, _, rest = r["question"].partition(". ")
        words = first.split()
        changed = " ".join([*words[:-1], "elephants"])
        pair = [first, changed] if i % 2 == 0 else [changed, first]
        return {"contexts": [f"{text}." for text in pair], "rest": rest or "So it is.", "gold": i % 2}

    return made(document)


def last_words(**_: object) -> dict[str, Dataset]:
    return made(lambda i, r: dict(zip(("text", "word"), r["question"].rsplit(" ", 1), strict=True)))


def texts(**_: object) -> dict[str, Dataset]:
    """Several problems, one after the other, with their solutions."""
    rows = split("test")
    pages = [rows[i : i + ROWS_A_TEXT] for i in range(0, len(rows), ROWS_A_TEXT)]
    return {
        "test": Dataset.from_list([{"page": "\n\n".join(f"{r['question']}\n{r['answer']}" for r in p)} for p in pages])
    }
