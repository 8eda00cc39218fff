"""The benchmark of generators: its work, its ratios and its verdicts."""

from __future__ import annotations

import pytest

from benchmarks.rollout import measurement, prompts_of, ratio, verdicts, workloads
from llmtrain.types import Prompt


@pytest.mark.parametrize(("streams", "equal", "ragged"), [(1, 2, 4), (8, 16, 32), (64, 64, 128)])
def test_the_work(streams: int, equal: int, ragged: int) -> None:
    works = {w.name: w for w in workloads(streams, 96)}
    assert {name: w.prompts * w.samples for name, w in works.items()} == {"equal": equal, "ragged": ragged}
    assert all(w.streams == streams and streams % w.samples == 0 for w in works.values())
    prompts = prompts_of(works["ragged"], 49152)
    assert prompts == prompts_of(works["ragged"], 49152) and isinstance(prompts[0], Prompt)
    assert all(16 <= len(p.ids) <= 112 and min(p.ids) >= 778 for p in prompts)  # none is a stop token
    assert {len(p.ids) for p in prompts_of(works["equal"], 49152)} == {64}


def test_ratios_are_those_within_a_round() -> None:
    """A machine that is half as fast in the second round changes nothing."""
    fast, slow = {"tokens": 100, "cpu_s": 1.0}, {"tokens": 50, "cpu_s": 1.0}
    runs = {"native": [fast, {"tokens": 60, "cpu_s": 1.2}], "vllm": [slow, {"tokens": 25, "cpu_s": 1.0}]}
    assert ratio(runs, "vllm") == 2.0


def test_an_engine_of_another_process_counts() -> None:
    turn = {"values": [7], "wall_s": 2.0, "cpu_s": 1.0, "peak_bytes": 10, "children_bytes": 5}
    assert measurement(turn) == {"tokens": 7, "wall_s": 2.0, "cpu_s": 1.0, "peak_bytes": 15}


def record(streams: int, name: str, rate: float, times: dict[str, float]) -> dict:
    results = {"native": {"tokens_per_cpu_s": rate}}
    return {"workload": {"streams": streams, "name": name}, "results": results, "native_times_as_fast_as": times}


def test_the_verdicts() -> None:
    records = [record(8, "equal", 100.0, {"vllm": 1.25}), record(8, "ragged", 90.0, {"vllm": 0.99})]
    assert verdicts(records) == [
        "8 equal: 1.25x of vLLM: met",
        "8 ragged: 0.99x of vLLM: MISSED",
        "8 ragged: 0.90x of equal lengths: MISSED",
    ]
    assert verdicts([record(1, "ragged", 5.0, {"transformers": 2.0})]) == []
