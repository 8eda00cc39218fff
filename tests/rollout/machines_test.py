"""Sampling ahead on several machines, whose first trainers are threads here, with stub workers that fail: each samples
its share, and what one cannot answer goes to the others. Nothing is lost, doubled or too old."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from llmtrain.rollout.ahead import Ahead
from llmtrain.rollout.board import Board, WorkersFail
from llmtrain.rollout.machines import gathered, heard
from llmtrain.rollout.wire import pack
from llmtrain.types import Prompt, Sample, Sampling
from tests.checkpoint.conftest import ThreadGroup
from tests.conftest import ROOT
from tests.rollout.fleets import publish, source_of, train, workers_of_this_process

Act = Callable[[Ahead], Any]


class Ranks(ThreadGroup):
    """Stands for one rank of a job; `beside` is the room of the group that a source makes."""

    def __init__(self, rank: int, room: tuple, beside: tuple | None = None) -> None:
        super().__init__(rank, len(room[0]), *room)
        self.beside = beside

    def all_gather_bytes(self, data: torch.Tensor) -> list[torch.Tensor]:
        return [torch.tensor(part, dtype=torch.uint8) for part in self.all_gather_json(data.tolist())]

    def side_group(self, timeout_s: int, ranks: Sequence[int]) -> Ranks:
        return Ranks(ranks.index(self.rank) if self.rank in ranks else -1, self.beside)


def room(size: int) -> tuple:
    return [None] * size, threading.Barrier(size)


def on_machines(
    directory: Path, shares: Sequence[Sequence[int]], act: Act, faulty: Mapping[str, Any] | None = None, **given: Any
) -> list:
    """Runs `act` on trainers that keep these workers each; those of the last are `faulty`. Returns what it returns, or
    raises, on each."""
    job, beside, found = room(len(shares)), room(sum(map(bool, shares))), [None] * len(shares)

    def one(rank: int) -> None:
        own = given | dict(faulty or {}) if rank == len(shares) - 1 else given
        source = source_of(directory, shares[rank], Ranks(rank, job, beside), **own)
        try:
            found[rank] = act(source)
        except Exception as error:
            found[rank] = error
        finally:
            source.close()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(shares))]
    with patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and workers_of_this_process() == []
    return found


def trained(source: Ahead) -> tuple[list[int], dict[str, float]]:
    """Trains ten steps; returns the ages of the oldest tokens, and the report."""
    publish(source, 0)
    return train(source, 10), source.report()


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The prompts of steps that each worker has answered."""
    found: dict[int, list[int]] = {}
    finish = Board.finish

    def noted(board: Board, worker: int, groups: Mapping, question: Any = None) -> None:
        found.setdefault(worker, []).extend([] if question is not None else groups)
        finish(board, worker, groups, question)

    monkeypatch.setattr(Board, "finish", noted)
    return found


def test_each_machine_answers_its_share_and_all_trainers_get_all(tmp_path: Path, answered: dict) -> None:
    """Two machines, the first with a second trainer and one worker, the other with two workers."""
    found = on_machines(tmp_path, [[0], [], [1, 3]], trained, verify=True)
    assert [max(ages) for ages, _ in found] == [1, 1, 1]
    assert sorted(answered[0]) == list(range(0, 20, 3))
    assert sorted(answered[1] + answered[3]) == [n for n in range(20) if n % 3]
    assert [told["workers"] for _, told in found] == [3, 3, 3]
    told = found[0][1]
    assert told["load_bytes"] >= 3 * 16 and told["rejected_fraction"] == 0 and told["workers_idle_s"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {f"rollout-worker-{worker}.log" for worker in (0, 1, 3)}


def test_a_worker_of_another_machine_that_is_killed_is_named_there_and_starts_again(
    tmp_path: Path, answered: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")  # whose log says nothing else
    found = on_machines(tmp_path, [[0], [1]], trained, {"phase": "sample", "how": "kill"})
    assert [max(ages) for ages, _ in found] == [1, 1] and [told["workers"] for _, told in found] == [2, 2]
    said = capsys.readouterr().err
    assert "rollout worker 1: generate: the connection ended (it ended by SIGKILL)" in said
    assert "prompts go to others; it starts again, 1 left" in said
    assert sorted(answered[1]) == list(range(1, 20, 2))


@pytest.mark.parametrize("phase", ["start", "sample"])
def test_what_a_machine_without_workers_owes_goes_to_the_others(phase: str, tmp_path: Path, answered: dict) -> None:
    """Its only worker leaves at its start, or when it has begun prompts."""
    found = on_machines(tmp_path, [[0], [1]], trained, {"phase": phase, "how": "leave"}, restarts=0)
    assert [max(ages) for ages, _ in found] == [1, 1] and [told["workers"] for _, told in found] == [1, 1]
    assert sorted(answered[0]) == list(range(20)) and 1 not in answered


def test_when_no_machine_has_a_worker_left_all_trainers_say_why(tmp_path: Path) -> None:
    def act(source: Ahead) -> None:
        publish(source, 0)
        for worker in source.board.live.copy():
            source.board.fail(worker, f"worker {worker}: too slow", starts_left=0)
        source.take(0)

    first, second, third = on_machines(tmp_path, [[], [0], [1]], act)
    assert type(first) is WorkersFail and str(first) == "no rollout worker is left; the last one: worker 0: too slow"
    assert str(second) == str(third) == str(first)


@pytest.mark.parametrize(
    ("faulty", "kind", "words"),
    [
        ({"diverges": True}, FloatingPointError, "the logits are not finite"),
        ({"pause_s": 60.0}, WorkersFail, "no rollout worker gave a sign of life in 2 s"),
    ],
)
def test_what_stops_one_machine_stops_all(faulty: dict, kind: type, words: str, tmp_path: Path) -> None:
    def act(source: Ahead) -> None:
        source.board.limits = replace(source.limits, patience_s=2)
        trained(source)

    first, second = on_machines(tmp_path, [[0], [1]], act, faulty)
    assert type(first) is type(second) is kind and words in str(first) and str(first) == str(second)


def asked(source: Ahead) -> list:
    """Trains, while seven prompts are asked again and again with the weights of then; returns version and answers."""
    found, errors, prompts = [], [], [Prompt([7, n]) for n in range(7)]
    pinned = [source.pinned() for _ in range(2) if publish(source, 0) is None]

    def ask() -> None:
        for each in [p for p in pinned if p is not None] * 3:
            try:
                found.append((each.weights.version, each.generate(prompts, Sampling(8, num_samples=3))))
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert max(train(source, 10)) <= 1
    thread.join(20)
    assert errors == [] and not thread.is_alive()
    return found


@pytest.mark.parametrize("how", ["", "kill", "leave"])
def test_a_question_is_shared_among_the_machines(how: str, tmp_path: Path) -> None:
    """Also where a worker of one is killed at it, and starts again or not."""
    faulty = {"phase": "beside", "how": how, "restarts": int(how == "kill")} if how else {}
    first, second, third = on_machines(tmp_path, [[0], [], [1]], asked, faulty, pause_s=0.005)
    assert second == [] and first == third and len(first) == 6
    for version, groups in first:
        assert version == 0 and [[(s.ids, s.versions) for s in group] for group in groups] == [
            [([7, n], [0, 0])] * 3 for n in range(7)
        ]


def test_kills_at_random_moments_on_two_machines(tmp_path: Path) -> None:
    """The workers of the second start again once: in the end it has none. What they had begun is answered by the
    first, whose workers start again and again."""
    rng, made, stop = random.Random(3), [0], threading.Event()

    def killer() -> None:
        while not stop.wait(rng.random() * 0.2):
            if found := workers_of_this_process():
                os.kill(rng.choice(found).pid, signal.SIGKILL)
                made[0] += 1

    def act(source: Ahead) -> tuple[list[int], int]:
        publish(source, 0)
        ages = []
        while source.mesh.all_gather_json(made[0] < 12 or source.elsewhere + len(source.board.live) > 2)[0]:
            ages += train(source, len(ages) + 1, first=len(ages))
        stop.set()
        return ages, len(source.board.live)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        given = {"restarts": 10**6, "staleness": 2, "steps": 10**6, "pause_s": 0.002}
        (ages, left), (others, gone) = on_machines(tmp_path, [[0, 2], [1, 3]], act, {"restarts": 1}, **given)
    finally:
        stop.set()
        thread.join()
    assert ages == others and max(ages) <= 2 and (left, gone) == (2, 0)


def told(**given: Any) -> dict[str, Any]:
    return {"error": None, "live": 1, "last_fault": "", "owed": []} | given


def test_what_all_say_is_heard() -> None:
    assert heard([told(live=2), told(live=0, owed=[9, 3]), told(owed=[4])]) == ([0, 0, 2], [3, 4, 9])
    assert heard([told(live=0), told(live=0)]) == ([], [])  # all is done
    with pytest.raises(WorkersFail, match="no rollout worker is left; the last one: worker 1: gone"):
        heard([told(live=0), told(live=0, owed=[3], last_fault="worker 1: gone")])
    with pytest.raises(FloatingPointError, match="not finite"):
        heard([told(owed=[1]), told(error=["FloatingPointError", "not finite"])])
    with pytest.raises(WorkersFail, match="Closed"):
        heard([told(error=["Closed", ""])])


def test_a_prompt_that_is_answered_twice_or_never_is_no_answer() -> None:
    groups = {n: [Sample([n], [n], [True], [-1.0], [0], True)] for n in (3, 4)}
    ids = {3: [3], 4: [4]}

    def ranks(other: dict) -> Any:
        return SimpleNamespace(rank=0, size=2, all_gather_bytes=lambda data: [data, pack(other, ids)])

    mine = {3: groups[3]}
    assert [g[0].ids for g in gathered(ranks({4: groups[4]}), mine, ids)] == [[3], [4]]
    with pytest.raises(AssertionError, match="a prompt was answered twice"):
        gathered(ranks(groups), mine, ids)
    with pytest.raises(AssertionError, match="a prompt was not answered"):
        gathered(ranks({}), mine, ids)
