"""Deduplication over whole pipelines: what stays, whatever the tasks, and that a killed task is redone alone."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.io import DataFolder

from benchmarks.dedup import planted
from llmtrain.config.clean.collect import CollectConfig
from llmtrain.config.clean.dedup import DedupConfig, MinhashConfig, ParagraphConfig
from llmtrain.data.clean.dedup import tables
from llmtrain.data.clean.dedup.drop import DropCopies
from llmtrain.data.clean.dedup.hashing import Bands, normalized
from llmtrain.data.clean.dedup.keys import FindCopies, WriteKeys
from llmtrain.data.clean.dedup.parts import Part, read_part
from llmtrain.data.clean.dedup.phases import dedup_phases
from llmtrain.data.clean.files import RankWriter
from llmtrain.data.clean.phases import Phase

NEAR = DedupConfig(exact=False)
EXACT = DedupConfig(minhash=None)


def source(name: str) -> CollectConfig:
    return CollectConfig(name=name, type="text", path="x", priority=int(name.isupper()))


def write(root: Path, name: str, *ranks: Sequence[str]) -> None:
    """Writes texts as the cleaned documents of each rank; the id is name/rank/row."""
    with RankWriter(f"{root}/cleaned/{name}") as writer:
        for rank, texts in enumerate(ranks):
            for row, text in enumerate(texts):
                writer.write(Document(text, f"{name}/{rank}/{row}", metadata={"source": name}), rank)


def phases_of(root: Path, settings: DedupConfig, names: str, tasks: dict[str, int], **more: int) -> list[Phase]:
    """Returns the phases for inputs that are named by a letter, of higher priority where that is a capital."""
    return dedup_phases(settings, [source(name) for name in names], str(root), tasks, **more)


def run_task(phase: Phase, rank: int) -> dict[str, int]:
    """Runs a task as the executor does. Returns the counts of the step that drops documents, if the phase has it."""
    steps, data = deepcopy(phase.steps), None
    for step in steps:
        data = step(data, rank, phase.tasks)
    deque(data or (), maxlen=0)
    return {name: int(stat.total) for step in steps[1:2] for name, stat in step.stats.stats.items()}


def run(root: Path, settings: DedupConfig, names: str, tasks: dict[str, int], **more: int) -> list[Counter[str]]:
    """Runs all tasks of all phases. Returns the counts of the phases that write documents, all tasks together."""
    phases = phases_of(root, settings, names, tasks, **more)
    counts = [sum((Counter(run_task(phase, rank)) for rank in range(phase.tasks)), Counter()) for phase in phases]
    return counts[-len(names) :]


def execute(root: Path, names: str, tasks: dict[str, int], **more: int) -> None:
    """Runs all phases with datatrove's executor, which does not redo what is done."""
    for phase in phases_of(root, DedupConfig(), names, tasks, **more):
        logs = f"{root}/logs/{phase.name}"
        LocalPipelineExecutor(phase.steps, phase.tasks, workers=1, logging_dir=logs).run()


def kept(root: Path, name: str, ranks: int, below: str = "documents") -> list[str]:
    folder = DataFolder(f"{root}/{below}")
    return [document.id for rank in range(ranks) for document in read_part(folder, Part(0, name, rank))]


def files(root: Path, below: str) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted((root / below).rglob("*")) if p.is_file()}


def test_of_equal_texts_that_of_the_highest_priority_stays_then_the_first(tmp_path: Path) -> None:
    write(tmp_path, "a", ["one", "two", "same"], ["same", "three"])
    write(tmp_path, "B", ["two", "four", "four"])
    write(tmp_path, "c", ["same \n", "three"])
    a, b, c = run(tmp_path, EXACT, "aBc", {"a": 2, "B": 1, "c": 1})
    assert kept(tmp_path, "a", 2) == ["a/0/0", "a/0/2", "a/1/1"]
    assert kept(tmp_path, "B", 1) == ["B/0/0", "B/0/1"]
    assert kept(tmp_path, "c", 1) == []
    assert a == {"documents_in": 5, "bytes_in": 19, "documents_out": 3, "bytes_out": 12, "dropped/exact": 2}
    assert c == {"documents_in": 2, "bytes_in": 11, "dropped/exact": 2}
    folder = DataFolder(f"{tmp_path}/dedup/dropped")
    examples = {d.id: d.metadata for d in read_part(folder, Part(0, "c", 0))}
    assert examples["c/0/0"] == {"source": "c", "copy_of": "a/0/2", "dropped_by": "dedup", "reason": "exact"}
    assert examples["c/0/1"]["copy_of"] == "a/1/1"
    assert b["dropped/exact"] == 1


def test_texts_are_equal_after_nfc_and_white_space_but_not_case() -> None:
    assert normalized(" caf\u00e9\u00a0\t x\n\n") == normalized("cafe\u0301 x") == "café x"
    assert normalized("Word") != normalized("word") and normalized("a b") != normalized("ab")


def test_a_chain_of_near_copies_is_one_cluster_and_its_first_document_stays(tmp_path: Path) -> None:
    words = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(400)]
    chain = [" ".join(words[start : start + 200]) for start in range(0, 200, 8)]  # neighbours share 0.92 of shingles
    write(tmp_path, "a", chain[1:], [], ["something else altogether, of more than five words"])
    write(tmp_path, "b", [chain[0]])
    a, b = run(tmp_path, NEAR, "ab", {"a": 3, "b": 1})
    assert kept(tmp_path, "a", 3) == ["a/0/0", "a/2/0"] and kept(tmp_path, "b", 1) == []
    assert (a["dropped/near"], b["dropped/near"]) == (23, 1)


def clusters(texts: Sequence[str], settings: MinhashConfig) -> list[int]:
    """Returns the first text of each text's cluster, by a plain union-find over texts that share a band."""
    parent = list(range(len(texts)))

    def root(index: int) -> int:
        return index if parent[index] == index else root(parent[index])

    first: dict[tuple[int, bytes], int] = {}
    for index, text in enumerate(texts):
        for band in enumerate(Bands(settings).keys(text)):
            low, high = sorted((root(first.setdefault(band, index)), root(index)))
            parent[high] = low
    return [root(index) for index in range(len(texts))]


@pytest.mark.parametrize("partitions", [1, 3, 20])
def test_whole_pipelines_find_the_clusters_of_a_plain_union_find(
    tmp_path: Path, partitions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RUN_RECORDS", 7)  # many runs and slices
    monkeypatch.setattr(tables, "SLICE_RECORDS", 50)
    texts = planted(60, 80, 2, seed=3)
    texts += [*texts[5:15], "?", "too short", ""]
    first = clusters(texts, MinhashConfig())
    write(tmp_path, "a", texts[:100], texts[100:])
    (counts,) = run(tmp_path, DedupConfig(), "a", {"a": 2}, partitions=partitions, examples=1000)
    expected = [index for index, root in enumerate(first) if index == root]
    ids = [f"a/{int(index >= 100)}/{index % 100}" for index in range(len(texts))]
    assert kept(tmp_path, "a", 2) == [ids[index] for index in expected]
    equal = len(texts) - len({normalized(text) for text in texts})
    assert counts["dropped/exact"] == equal >= 10 and counts["dropped/near"] == len(texts) - len(expected) - equal > 60
    dropped = DataFolder(f"{tmp_path}/dedup/dropped")
    for rank in range(2):
        for document in read_part(dropped, Part(0, "a", rank)):
            assert document.metadata["copy_of"] == ids[first[ids.index(document.id)]]


def test_output_is_the_same_for_any_number_and_order_of_tasks(tmp_path: Path) -> None:
    texts, tasks, outputs = planted(40, 60, 2, seed=1), {"a": 2, "B": 1}, []
    settings = DedupConfig(paragraphs=ParagraphConfig(min_chars=20, min_words=5))
    for name, partitions in (("x", 1), ("y", 11)):
        write(tmp_path / name, "a", texts[:50], texts[50:])
        write(tmp_path / name, "B", [text.replace(" the ", "\nthe\n") for text in texts[60:100]])
        for phase in phases_of(tmp_path / name, settings, "aB", tasks, partitions=partitions):
            for rank in sorted(range(phase.tasks), reverse=name == "y"):
                run_task(phase, rank)
        outputs.append(files(tmp_path / name, "documents") | files(tmp_path / name, "dedup/dropped"))
    assert outputs[0] == outputs[1] and len(outputs[0]) == 6


def test_how_ranks_cut_an_input_changes_neither_clusters_nor_the_number_kept(tmp_path: Path) -> None:
    texts = planted(40, 60, 2, seed=2)
    numbers = []
    for cuts in ([0, 120], [0, 7, 7, 60, 120]):
        root = tmp_path / str(len(cuts))
        write(root, "a", *(texts[low:high] for low, high in pairwise(cuts)))
        run(root, DedupConfig(), "a", {"a": len(cuts) - 1})
        numbers.append(len(kept(root, "a", len(cuts) - 1)))
    assert numbers[0] == numbers[1] == len(set(clusters(texts, MinhashConfig())))


@pytest.mark.parametrize("broken", [WriteKeys, FindCopies, DropCopies])
def test_a_killed_task_is_redone_alone_and_writes_the_same_bytes(
    tmp_path: Path, broken: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, tasks = planted(40, 60, 2, seed=4), {"a": 3}
    for name in ("whole", "killed"):
        write(tmp_path / name, "a", texts[:40], texts[40:80], texts[80:])
    execute(tmp_path / "whole", "a", tasks, partitions=3)
    ran, plain = [], broken.run

    def killed(self: object, data: object, rank: int = 0, world_size: int = 1) -> object:
        ran.append(rank)
        result = plain(self, data, rank, world_size)
        if rank == 1 and ran.count(1) == 1:
            next(result or iter(()), None)  # a part of the task's files is written
            if result is not None:
                result.close()  # a process that is gone writes nothing later, a generator that is collected would
            raise RuntimeError("killed")
        return result

    monkeypatch.setattr(broken, "run", killed)
    with pytest.raises(RuntimeError, match="killed"):
        execute(tmp_path / "killed", "a", tasks, partitions=3)
    execute(tmp_path / "killed", "a", tasks, partitions=3)
    assert ran == [0, 1, 1, 2]
    for below in ("documents", "dedup"):
        assert files(tmp_path / "killed", below) == files(tmp_path / "whole", below)


def test_paragraphs_leave_later_documents_and_short_rests_are_dropped(tmp_path: Path) -> None:
    notice, own = "This notice stands in each of them.", "And here are some words of its own."
    write(tmp_path, "a", [f"{own} One.\n{notice}\nshort\n{notice}", f"{notice}\n{own} Two.\nshort"])
    write(tmp_path, "b", ["This notice  stands in each of them. \nFew words.", f"{own} Three.\n{own} Three."])
    settings = DedupConfig(exact=False, minhash=None, paragraphs=ParagraphConfig(min_chars=20, min_words=3))
    a, b = run(tmp_path, settings, "ab", {"a": 1, "b": 1})
    folder = DataFolder(f"{tmp_path}/documents")
    assert [d.text for d in read_part(folder, Part(0, "a", 0))] == [
        f"{own} One.\n{notice}\nshort\n{notice}",
        f"{own} Two.\nshort",
    ]
    assert [d.text for d in read_part(folder, Part(0, "b", 0))] == [f"{own} Three.\n{own} Three."]
    assert a["paragraphs_removed"] == 1 and "dropped/paragraphs" not in a and b["dropped/paragraphs"] == 1
    assert b["documents_out"] == 1 and b["bytes_out"] == 85


def test_paragraphs_of_dropped_copies_count_for_nothing(tmp_path: Path) -> None:
    text = "The first paragraph is long enough.\nThe second paragraph is long enough too."
    write(tmp_path, "a", [text, text])
    settings = DedupConfig(minhash=None, paragraphs=ParagraphConfig(min_chars=20, min_words=3))
    (counts,) = run(tmp_path, settings, "a", {"a": 1})
    assert kept(tmp_path, "a", 1) == ["a/0/0"] and counts.get("paragraphs_removed") is None


def test_paragraphs_of_near_copies_that_are_dropped_stay_elsewhere(tmp_path: Path) -> None:
    page = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300))
    line, own = "A line that only the copy has.", "The words of the third document."
    write(tmp_path, "a", [page, f"{page}\n{line}", f"{line}\n{own}"])
    settings = DedupConfig(paragraphs=ParagraphConfig(min_chars=20, min_words=3))
    run(tmp_path, settings, "a", {"a": 1})
    texts = [d.text for d in read_part(DataFolder(f"{tmp_path}/documents"), Part(0, "a", 0))]
    assert texts == [page, f"{line}\n{own}"]


@pytest.mark.parametrize("partitions", [3, 20, 300])
def test_every_range_of_keys_has_its_task(tmp_path: Path, partitions: int) -> None:
    texts = [f"text {number}" for number in range(3000)]
    write(tmp_path, "a", texts, texts)
    (counts,) = run(tmp_path, EXACT, "a", {"a": 2}, partitions=partitions)
    assert counts["dropped/exact"] == 3000 and len(kept(tmp_path, "a", 2)) == 3000


def test_blocks_end_at_blank_lines(tmp_path: Path) -> None:
    block = "A block that is wrapped\nover two lines of text."
    write(tmp_path, "a", [block, f"Its own words come first.\n \n{block}\n\nAnd its own words come last."])
    paragraphs = ParagraphConfig(split="blank_line", min_chars=20, min_words=3)
    run(tmp_path, DedupConfig(paragraphs=paragraphs), "a", {"a": 1})
    texts = [d.text for d in read_part(DataFolder(f"{tmp_path}/documents"), Part(0, "a", 0))]
    assert texts == [block, "Its own words come first.\n \nAnd its own words come last."]


def test_metadata_does_not_choose_the_file(tmp_path: Path) -> None:
    with RankWriter(str(tmp_path / "out")) as writer:
        writer.write(Document("text", "id", metadata={"rank": "../../outside"}), 3)
    assert list(files(tmp_path, ".")) == ["out/00003.jsonl.zst"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"exact": False, "minhash": None}, "nothing is looked for; set dedup to null"),
        ({"minhash": {"buckets": 200, "hashes": 100}}, "buckets=200, hashes=100: .* at most 10,000; lower one"),
    ],
)
def test_bad_keys_are_refused(keys: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DedupConfig(**keys)
