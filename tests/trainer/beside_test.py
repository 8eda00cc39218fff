"""What becomes of an evaluation that runs beside training, on two trainers."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from llmtrain.checkpoint.group import LocalGroup
from llmtrain.eval import ranks
from llmtrain.trainer.beside import Beside
from tests.checkpoint.conftest import ThreadGroup, run_ranks


def test_it_is_found_once_and_holds_nobody_up() -> None:
    beside, goes_on = Beside(LocalGroup()), threading.Event()

    def work() -> dict[str, float]:
        assert goes_on.wait(10)
        return {"eval/pass@1": 0.5}

    assert beside.settle() == beside.found() == {}
    beside.begin(4, work)
    assert beside.found() == {} and beside.step == 4
    with pytest.raises(AssertionError, match="that of step 4 is not settled"):
        beside.begin(6, work)
    goes_on.set()
    assert beside.future.result(10) == {"eval/pass@1": 0.5}
    assert beside.found() == {4: {"eval/pass@1": 0.5}} and beside.found() == {}
    assert beside.settle() == {} and beside.step is None
    beside.begin(6, work)
    assert beside.settle() == {6: {"eval/pass@1": 0.5}} and beside.step is None


def test_trainer_0_works_and_the_others_wait() -> None:
    def act(group: ThreadGroup) -> tuple[dict, int | None]:
        beside = Beside(group)
        beside.begin(2, lambda: {"rank": float(group.rank)})
        return beside.settle(), beside.step

    assert run_ranks(2, act) == [({2: {"rank": 0.0}}, None), ({}, None)]


def test_what_fails_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LEAVE_S", 0)

    def act(group: ThreadGroup) -> Any:
        beside = Beside(group)

        def work() -> dict[str, float]:
            raise RuntimeError("the reward failed")

        beside.begin(2, work)
        beside.future.exception(10) if group.rank == 0 else None
        assert beside.found() == {}  # it is raised where all trainers are
        return beside.settle()

    first, second = run_ranks(2, act)
    assert isinstance(first, RuntimeError) and str(first) == "rank 0: the reward failed"
    assert isinstance(second, SystemExit) and second.code == 1
