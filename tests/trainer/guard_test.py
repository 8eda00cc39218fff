"""Steps that go wrong: left out, gone back from, or the end of the run, each the same again after a kill."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.config.schema import Config, GuardConfig
from llmtrain.observe.metrics import Events, MetricsFile, read_lines
from llmtrain.parallel.replicas import checksum, odd_ones
from llmtrain.trainer.guard import Guard, is_spike
from llmtrain.trainer.job import GuardState, Job, Updates
from llmtrain.trainer.record import Record
from tests.forked import run_alone

WORKERS = Path(__file__).parent
LAYOUTS = (
    {"zero_stage": 0, "dp_replicate": 2},
    {"zero_stage": 1, "dp_shard": 2},
    {"zero_stage": 2, "dp_shard": 2, "offload": "optimizer"},
    {"zero_stage": 3, "dp_shard": 2},
    {"backend": "fsdp", "dp_replicate": 2},
)
MORE = (
    {"zero_stage": 2, "dp_shard": 2},
    {"zero_stage": 3, "dp_shard": 2, "offload": "optimizer"},
    {"zero_stage": 1, "dp_shard": 2, "precision": "bf16"},
    {"zero_stage": 1, "tp": 2},
    {"zero_stage": 3, "tp": 2},
    {"backend": "fsdp", "dp_shard": 2},
    {"backend": "fsdp", "tp": 2, "precision": "bf16"},
)
SET = [
    *("train.steps=10", "train.eval_seqs=2", "train.global_batch_seqs=4", "train.micro_batch_seqs=4"),
    *("checkpoint.every_steps=3", "guard.spike_window=4", "guard.max_skips=1"),
]


@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["quick", "more"])
def test_a_step_left_out_changes_nothing(layouts: tuple[dict, ...], tmp_path: Path, forked: Callable) -> None:
    """Weights and optimizer state stay bit for bit, the next step is that of a run without it, and so is the step after
    going back to a checkpoint in the middle of a run."""
    result = forked(2, WORKERS / "guard_worker.py", json.dumps(layouts), tmp_path)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == len(layouts), result.stdout[-3000:]
    for line in lines:
        assert line["unchanged"] and line["next"] and line["rewound"] and line["same"], line
        assert line["broken"] == [[], [], [0, 1] if "tp" in line["layout"] else [1], [], []], line
        whole, flipped = line["flip"]
        assert whole == ""
        if line["layout"].get("zero_stage", 3) == 3 and "dp_shard" in line["layout"]:
            assert flipped == ""  # no copies
        else:
            assert "layers.1.attention_norm.weight" in flipped and "ranks 0 (" in flipped and ", 1 (" in flipped


def test_checksum_sees_every_bit() -> None:
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        tensor = torch.randn(3, 5).to(dtype)
        whole = checksum(tensor)
        seen = {int(whole)}
        for index in range(15):
            for bit in range(torch.iinfo(bits).bits):
                flipped = tensor.clone()
                flipped.view(bits).view(-1)[index] ^= -(2**bit) if bit == torch.iinfo(bits).bits - 1 else 2**bit
                seen.add(int(checksum(flipped)))
        assert len(seen) == 1 + 15 * torch.iinfo(bits).bits
    long = torch.zeros(2**20 + 3)  # two chunks
    other = long.clone()
    other[-1] = 1.0
    assert checksum(long) != checksum(other) and checksum(other.flip(0)) != checksum(other)
    assert checksum(torch.empty(0)) == 0


def test_the_majority_is_right() -> None:
    assert odd_ones([7, 7, 5]) == [2]
    assert odd_ones([5, 7]) == [0, 1]
    assert odd_ones([1, 1, 2, 2]) == [0, 1, 2, 3]
    assert odd_ones([3, 1, 1, 2, 1]) == [0, 3]


def test_spike_needs_a_full_window() -> None:
    window = [2.0, 2.2, 1.8, 2.0]  # deviation 0.141
    assert is_spike(2.5, window, 4, 3.0) and not is_spike(2.4, window, 4, 3.0)
    assert not is_spike(99.0, window, 5, 3.0)


def test_each_model_has_a_window_and_skips_of_its_own(tmp_path: Path) -> None:
    config = Config(
        run_dir=str(tmp_path), guard=GuardConfig(nonfinite="skip", spike="skip", spike_window=2, max_skips=1)
    )
    policy, critic = SimpleNamespace(), SimpleNamespace()
    mesh = SimpleNamespace(rank=0, all_gather_json=lambda value: [value])
    job = Job(config, None, None, mesh, None, None, {"policy": policy, "critic": critic})
    guard = Guard(job)
    for loss in (1.0, 1.1):
        assert policy.admit(loss, []) and critic.admit(100 * loss, [])
    assert not policy.admit(100.0, [])  # a spike of the policy, and usual for the critic
    assert critic.admit(100.0, []) and not critic.admit(float("nan"), [0])
    assert job.guard.updates == {"policy": Updates([1.0, 1.1], 1), "critic": Updates([pytest.approx(110.0), 100.0], 1)}
    assert guard.report() == {"skipped": 2} and guard.report() == {}
    with pytest.raises(FloatingPointError, match=r"step 1: critic: the loss is not finite .* guard.max_skips=1"):
        critic.admit(float("nan"), [0])
    events = read_lines(str(tmp_path / "events.jsonl"))
    assert [event.get("role") for event in events] == [None, "critic", "critic"]
    assert GuardState.of_checkpoint(asdict(job.guard)) == job.guard


def test_events_forget_what_comes_again(tmp_path: Path) -> None:
    events = Events(str(tmp_path / "events.jsonl"))
    assert events.go_on_after(0) == []
    lines = [{"step": 4, "event": "skip"}, {"step": 9, "event": "rewind"}, {"step": 8, "event": "skip"}]
    for line in lines:
        events.write(line)
    assert events.go_on_after(6) == lines[:2] == read_lines(str(tmp_path / "events.jsonl"))
    assert events.go_on_after(0) == []


@pytest.mark.parametrize(("error", "code"), [(FloatingPointError, 1), (SystemExit, 0), (None, 0)])
def test_the_record_is_closed_however_a_run_ends(tmp_path: Path, error: type[BaseException] | None, code: int) -> None:
    finished = []
    record = Record.__new__(Record)
    record.main, record.file = True, MetricsFile(str(tmp_path / "metrics.jsonl"), resume_step=0)
    record.sink = SimpleNamespace(finish=lambda exit_code: finished.append(exit_code))
    with contextlib.suppress(*([error] if error else [])), record:
        if error:
            raise error
    assert finished == [code]
    with pytest.raises(ValueError, match="closed file"):
        record.file.write({"step": 1})


@pytest.fixture(scope="module")
def runs(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Directory -> what its runs, one after the other, raised. The data of step 7 (from 0) spikes."""
    from tests.small_run import DOCUMENT

    base, poison = tmp_path_factory.mktemp("runs"), {"7": 1000}
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    nan, back, out = {"3": "nan", "5": "nan", "6": "nan"}, "guard.spike=rewind", "guard.nonfinite=skip"
    specs = [
        {"dir": "jump", "jump": [6, 2]},
        {"dir": "rewind", "poison": poison, "set": [back]},
        {"dir": "killed", "poison": poison, "set": [back], "die": [7, 2]},
        {"dir": "killed", "set": [back]},  # now only events.jsonl knows
        {"dir": "again", "poison": {"7": 1000, "8": 1000, "9": 1000}, "set": [back]},
        {"dir": "skip", "poison": {"4": "nan", "7": 1000}, "set": ["guard.spike=skip", out]},
        {"dir": "bounded", "poison": nan, "set": [out], "die": [6, 1]},
        {"dir": "bounded", "poison": nan, "set": [out]},
    ]
    specs = [{**spec, "dir": str(base / spec["dir"]), "set": [*SET, *spec.get("set", [])]} for spec in specs]
    result = run_alone(WORKERS / "spikes_worker.py", base / "small.yaml", json.dumps(specs))
    raised: dict[str, list[str]] = {"base": [str(base)]}
    for line in result.stdout.splitlines():
        if line.startswith('{"dir"'):
            each = json.loads(line)
            raised.setdefault(Path(each["dir"]).name, []).append(each["raised"])
    assert sum(map(len, raised.values())) == len(specs) + 1, result.stdout[-3000:]
    return raised


def lines_of(runs: dict[str, list[str]], name: str, file: str = "metrics.jsonl") -> list[dict]:
    timing = ("tokens_per_s", "step_s", "peak_bytes")
    lines = read_lines(str(Path(runs["base"][0]) / name / file))
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def weights_of(runs: dict[str, list[str]], name: str) -> list[torch.Tensor]:
    reader = CheckpointReader(str(Path(runs["base"][0]) / name / "checkpoints/step-00000010"))
    return [reader.full(n, key).clone() for n in reader.names() for key in ("weight", "exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("name", ["rewind", "killed"])
def test_rewind_is_a_run_without_that_data(runs: dict[str, list[str]], name: str) -> None:
    """Equal, bit for bit, to a run whose data order leaves out the two steps' worth; also when killed after it."""
    assert runs[name] == ([""] if name == "rewind" else ["Interrupted", ""])
    assert [line["step"] for line in lines_of(runs, name)] == list(range(1, 11))
    assert lines_of(runs, name) == lines_of(runs, "jump")
    assert all(a.equal(b) for a, b in zip(weights_of(runs, name), weights_of(runs, "jump"), strict=True))
    event = {"step": 8, "event": "rewind", "to_step": 6, "steps": 2, "tokens": 2 * 4 * 64}
    assert lines_of(runs, name, "events.jsonl") == [event]


def test_rewinds_are_bounded(runs: dict[str, list[str]]) -> None:
    """Behind the first spike lies another one: the second rewind to the same checkpoint is one too many."""
    assert "guard.max_skips=1" in runs["again"][0] and "step 6" in runs["again"][0]
    assert [line["event"] for line in lines_of(runs, "again", "events.jsonl")] == ["rewind", "rewind"]


def test_skips_are_logged(runs: dict[str, list[str]]) -> None:
    assert runs["skip"] == [""]
    lines = lines_of(runs, "skip")
    assert [line["step"] for line in lines if line.get("skipped") == 1] == [5, 8]
    assert lines[4]["loss"] is None and lines[4]["grad_norm"] is None and lines[7]["loss"] > 1000
    assert [line["tokens"] for line in lines] == [256 * step for step in range(1, 11)]
    events = lines_of(runs, "skip", "events.jsonl")
    assert [(e["step"], e["event"]) for e in events] == [(5, "skip"), (8, "skip")]


def test_skips_in_a_row_are_bounded_over_a_kill(runs: dict[str, list[str]]) -> None:
    """Steps 4, 6 and 7 are not finite, one in a row is allowed; the run is killed between 6 and 7."""
    first, second = runs["bounded"]
    assert first == "Interrupted" and "step 7" in second and "guard.max_skips=1" in second
