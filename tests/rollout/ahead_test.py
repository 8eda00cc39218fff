"""Sampling ahead with workers that are killed, stopped, slow or cut off in every phase: nothing is lost, doubled or too
old. The workers are stubs, see stub_worker.py."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from llmtrain.rollout.ahead import Ahead
from llmtrain.rollout.board import Task, WorkersFail
from llmtrain.rollout.fleet import wrong
from llmtrain.rollout.question import Question
from llmtrain.rollout.shared_weights import share
from llmtrain.types import Prompt, Sample, Sampling
from tests.rollout.fleets import ahead, is_stub, publish, train, workers_of_this_process

PHASES = ("start", "weights", "sample", "answer")
DEADLINE_S = 1.5  # of a stub that stands still; a start takes 0.1 s, on a loaded machine ten times as long


def await_done(source: Ahead, groups: int) -> None:
    """Waits until so many groups are done."""
    give_up = time.monotonic() + 20
    while len(source.board.done) < groups:
        assert time.monotonic() < give_up
        time.sleep(0.01)


def told_until(text: str, capsys: pytest.CaptureFixture) -> str:
    """Returns what was said until this was."""
    told, give_up = "", time.monotonic() + 20
    while text not in told:
        assert time.monotonic() < give_up, told
        time.sleep(0.02)
        told += capsys.readouterr().err
    return told


def test_steps_are_sampled_ahead(tmp_path: Path) -> None:
    with ahead(tmp_path, workers=2) as source:
        publish(source, 0)
        assert train(source, 1) == [0]
        await_done(source, 2)  # those of step 1, by weights of version 0
        assert train(source, 10, first=1)[0] == 1
        told = source.report()
        assert 0 <= told["staleness_mean"] <= told["staleness_max"] == 1
        assert (told["workers"], told["rejected_fraction"]) == (2, 0.0)
        assert told["load_bytes"] > 10 * 16 and told["workers_idle_s"] > 0 and told["trainer_idle_s"] > 0
        assert source.report()["load_bytes"] == 0  # it tells of the time since the last


def test_a_worker_that_holds_other_weights_is_at_fault(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with ahead(tmp_path, workers=2, verify=True) as source:
        publish(source, 0)
        train(source, 4)
        assert source.report()["workers"] == 2
    with ahead(tmp_path, workers=1, restarts=0, verify=True, wrong=1) as source:
        publish(source, 0)
        with pytest.raises(WorkersFail, match=r"does not hold the weights that were sent .*first in w of 1"):
            train(source, 10)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["kill", "cut"])
def test_a_fault_is_named_and_its_prompts_go_on(
    phase: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with ahead(tmp_path, workers=2, phase=phase, how=how) as source:
        publish(source, 0)
        assert max(train(source, 10)) <= 1
    told = capsys.readouterr().err
    asked = {"start": "settings", "weights": "(weights|generate)"}.get(phase, "generate")  # sent before, or behind
    assert re.search(f": {asked}: the connection ended", told) and "it starts again, 1 left" in told
    assert f"about to {how} while {phase}" in told  # the end of its log
    assert ("(it ended by SIGKILL)" in told) == (how == "kill")


@pytest.mark.parametrize(("phase", "how"), [("start", "slow"), ("sample", "stop"), ("weights", "stop")])
def test_standing_still_is_noticed_by_the_deadline(
    phase: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with ahead(tmp_path, deadline_s=DEADLINE_S, phase=phase, how=how) as source:
        began = time.monotonic()
        publish(source, 0)
        assert max(train(source, 10)) <= 1
        assert DEADLINE_S < time.monotonic() - began < DEADLINE_S + 8
    assert f"no answer within {DEADLINE_S} s" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_fault_of_a_worker_without_work_is_noticed(how: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with ahead(tmp_path, deadline_s=DEADLINE_S, phase="idle", how=how):  # there are no weights yet
        told = told_until("rollout worker 0: ping: ", capsys)
    assert "0 prompts go to others; it starts again, 1 left" in told


def test_who_is_killed_while_idle_is_noticed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with ahead(tmp_path, deadline_s=60.0) as source:
        publish(source, 0)
        train(source, 9)
        await_done(source, 2)  # those of the last step
        workers_of_this_process()[0].kill()
        told_until("rollout worker 0: idle: the connection ended (it ended by SIGKILL)", capsys)
        train(source, 10, first=9)


def test_a_worker_that_fails_too_often_is_dropped_and_the_others_go_on(tmp_path: Path) -> None:
    with ahead(tmp_path, workers=2, restarts=0, phase="sample", how="leave") as source:
        publish(source, 0)
        train(source, 10)
        assert len(source.board.live) == 1 and source.report()["rejected_fraction"] > 0


def test_when_none_is_left_the_run_stops_and_says_why(tmp_path: Path) -> None:
    with ahead(tmp_path, restarts=0, phase="sample", how="leave") as source:
        publish(source, 0)
        with pytest.raises(
            WorkersFail, match=r"no rollout worker is left; .*it ended with status 3(?s:.)*about to leave"
        ):
            source.take(0)


def test_samples_of_older_weights_than_were_sent_are_a_fault(tmp_path: Path) -> None:
    with ahead(tmp_path, restarts=0, stale=1) as source:
        publish(source, 5)
        with pytest.raises(WorkersFail, match="sampled with weights of version 4, and 5 had been sent"):
            source.take(0)


def test_a_model_that_has_diverged_is_no_fault_of_its_worker(tmp_path: Path) -> None:
    with ahead(tmp_path, diverges=True) as source:
        publish(source, 0)
        with pytest.raises(FloatingPointError, match="the logits are not finite"):
            source.take(0)


def test_closing_does_not_wait_for_who_samples(tmp_path: Path) -> None:
    with ahead(tmp_path, pause_s=60.0) as source:
        publish(source, 0)
        time.sleep(0.3)
        began = time.monotonic()
    assert time.monotonic() - began < 4


def ask_beside(source: Ahead, until: threading.Event, found: list) -> None:
    """Asks three prompts again and again with the weights of then, and notes the answers."""
    while not until.is_set():
        pinned = source.pinned()
        groups = pinned.generate([Prompt([7, n]) for n in range(3)], Sampling(8, num_samples=3))
        found.append((pinned.weights.version, groups))


def check_asked(found: list) -> None:
    """Every prompt is answered once, in its order, by the weights that were asked for."""
    for version, groups in found:
        assert [[(s.ids, s.versions) for s in group] for group in groups] == [
            [([7, n], [version] * 2)] * 3 for n in range(3)
        ]


@pytest.mark.parametrize("how", ["", "kill"])
def test_what_is_asked_beside_has_the_weights_of_then(how: str, tmp_path: Path) -> None:
    """While training goes on and newer weights are published; also where its worker is killed."""
    fault = {"phase": "beside", "how": how} if how else {}
    with ahead(tmp_path, workers=2, pause_s=0.01, inflight="continue", **fault) as source:
        publish(source, 0)
        done, found = threading.Event(), []
        thread = threading.Thread(target=ask_beside, args=(source, done, found))
        thread.start()
        assert max(train(source, 10)) <= 1
        done.set()
        thread.join(20)
        assert found and found[0][0] == 0
        check_asked(found)
        assert source.report()["workers"] == 2


def test_an_answer_of_newer_weights_than_were_asked_is_a_fault(tmp_path: Path) -> None:
    with ahead(tmp_path, restarts=0, stale=-1) as source:
        publish(source, 10)  # no step is left
        with pytest.raises(WorkersFail, match="sampled with weights of version 11, and 10 had been sent"):
            source.pinned().generate([Prompt([7])], Sampling(8))


def test_what_is_wrong_with_an_answer() -> None:
    """Of episodes a sample has a row for each side, which may never have spoken."""
    weights = share([("w", torch.zeros(1))], 3, torch.float32)
    task, row, silent = Task([4, 5], weights), Sample([1], [2], [True], [0.0], [3], True), Sample([1], *[[]] * 4, True)
    pair, game = [row, row], [row, silent, silent, row]
    assert wrong({4: pair, 5: pair}, task, 2, False) is wrong({4: game, 5: game}, task, 2, True) is None
    assert wrong({4: pair, 5: game}, task, 2, False) == "the answer is not one group for each prompt"
    assert wrong({5: pair, 4: pair}, task, 2, False) == wrong({4: game, 5: game[:3]}, task, 2, True)
    rows = [replace(row, attempt=i) for i in (0, 0, 0, 1)]  # of a rewritten history
    assert wrong({4: rows, 5: rows[2:]}, task, 2, True) is None
    assert wrong({4: rows, 5: rows[:3]}, task, 2, True) == "the answer is not one group for each prompt"
    newer, older = (Sample([1], [2, 2], [True] * 2, [0.0] * 2, [3, v], True) for v in (4, 2))
    question = Task([4, 5], weights, Question([], Sampling(1), weights, 1))
    assert wrong({4: pair, 5: [row, newer]}, task, 2, False) is None  # it may have gone on
    told = "sampled with weights of version {}, and 3 had been sent"
    assert wrong({4: pair, 5: [row, newer]}, question, 2, False) == told.format(4)
    assert wrong({4: pair, 5: [row, older]}, task, 2, False) == told.format(2)


@pytest.mark.parametrize(
    ("attempts", "whole"),
    [
        ([0, 1], True),
        ([0, 0, 0, 1], True),
        ([0, 0], False),  # one run is missing
        ([1, 1], False),
        ([0, 1, 2], False),  # one too many
        ([1, 0], False),
        ([0, 1, 0], False),
        ([None, None], False),  # samples that are no runs
        ([-1, 0, 1], False),
        ([], False),
    ],
)
def test_rows_of_a_program_are_those_of_all_its_runs(attempts: list[int | None], whole: bool) -> None:
    weights = share([("w", torch.zeros(1))], 3, torch.float32)
    rows = [Sample([1], [2], [True], [0.0], [3], True, attempt=attempt) for attempt in attempts]
    good = [Sample([1], [2], [True], [0.0], [3], True, attempt=attempt) for attempt in (0, 1)]
    found = wrong({4: rows, 5: good}, Task([4, 5], weights), 2, False, runs=True)
    assert found == (None if whole else "a group does not hold rows of 2 runs of the program, one behind the other")


def kills(directory: Path, count: int, seed: int) -> None:
    """Trains while so many workers are killed at random moments."""
    rng, made, stop = random.Random(seed), 0, threading.Event()

    def killer() -> None:
        nonlocal made
        while made < count and not stop.is_set():
            time.sleep(rng.random() * 0.02)
            if found := workers_of_this_process():
                os.kill(rng.choice(found).pid, signal.SIGKILL)
                made += 1

    with ahead(directory, workers=3, staleness=2, steps=10**6, restarts=10**6, pause_s=0.002) as source:
        publish(source, 0)
        thread, step, found = threading.Thread(target=killer), 0, []
        asking = threading.Thread(target=ask_beside, args=(source, stop, found))
        thread.start(), asking.start()
        try:
            while made < count:
                assert max(train(source, step + 1, first=step)) <= 2
                step += 1
        finally:
            stop.set()
            thread.join(10)
        assert max(train(source, step + 5, first=step)) <= 2
        asking.join(20)
        check_asked(found)
        assert found and not asking.is_alive()


def test_kills_at_random_moments(tmp_path: Path) -> None:
    kills(tmp_path, 12, seed=0)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    kills(tmp_path, 200, seed=1)


def test_workers_end_with_their_trainer(tmp_path: Path) -> None:
    if not (trainer := os.fork()):
        with ahead(tmp_path, workers=2, pause_s=60.0) as source:
            publish(source, 0)
            time.sleep(60)
        os._exit(0)
    children: list[psutil.Process] = []
    give_up = time.monotonic() + 20
    while len(children) < 2 and time.monotonic() < give_up:
        time.sleep(0.02)
        children = [p for p in psutil.Process(trainer).children() if is_stub(p)]
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert len(children) == 2 and alive == []
