"""What a step took, written down and taken again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtrain.checkpoint.group import LocalGroup
from llmtrain.config.schema import Config
from llmtrain.rollout.source import Shuffled
from llmtrain.trainer.recorded import Recording, Replayed, made_with, read_groups
from llmtrain.types import Group, Sample

PROMPTS = SimpleNamespace(
    at=lambda number, seed: number % 5, prompt_ids=lambda row: [1] * (row + 1), examples=[{"row": i} for i in range(5)]
)

MADE = {
    **{"rollout.group_size": 2, "rollout.temperature": 0.7, "rollout.max_staleness": 0, "rollout.router_replay": False},
    "rewards": [{"name": "own", "weight": 0.5}],
}


def group(number: int) -> Group:
    """Two samples with everything that a source fills in; one third is no short decimal, and no fp32."""
    row = number % 5
    first = Sample([1] * (row + 1), [number, 7], [True, False], [-0.5, 0.0], [3, 4], True, 1 / 3, {"own": 1 / 3})
    second = Sample([1] * (row + 1), [9], [True], [-0.125], [4], False, -1.0, {"own": -1.0}, {"own": "späť"})
    first.example = second.example = {"row": row}
    return [first, second]


class Source:
    """Gives group(number), and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def ask(self, numbers: range) -> list[Group]:
        self.asked.append(numbers)
        return [group(n) for n in numbers]

    def publish(self, weights: Any, version: int) -> None:
        self.asked.append((weights, version))

    def close(self) -> None:
        self.asked.append("closed")

    def report(self) -> dict[str, float]:
        return {"queue_groups": 2.0}


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Steps 12 and 13 of a run with two prompts a step; the first asks twice, and changes what it gets."""
    source, directory = Source(), tmp_path / "rollouts"
    recording = Recording(source, LocalGroup(), str(directory), 2, MADE)
    recording.publish("weights", 11)
    taken = recording.ask(range(22, 24))
    assert taken == [group(22), group(23)]
    taken[0][0].reward, taken[0][0].columns = 50.0, {"advantages": [1.0, 1.0]}
    recording.ask(range(24, 26))
    recording.publish("weights", 12)
    recording.take(12)
    recording.close()
    assert recording.report() == {"queue_groups": 2.0}
    assert source.asked == [
        *(("weights", 11), range(22, 24), range(24, 26)),
        *(("weights", 12), range(24, 26), "closed"),
    ]
    return directory


def replayed(directory: Path, version: int, prompts: Any = PROMPTS, **other: Any) -> Replayed:
    source = Replayed(LocalGroup(), str(directory), prompts, 2, Shuffled(prompts, 0), MADE | other)
    source.publish("weights", version)
    return source


def test_a_file_for_each_time_that_a_step_asks(recorded: Path) -> None:
    names = [f"step-{name}.safetensors" for name in ("00000012", "00000012-2", "00000013")]
    assert {path.name for path in recorded.iterdir()} == set(names)


def test_what_was_taken_is_taken_again(recorded: Path) -> None:
    source = replayed(recorded, 11)
    assert source.ask(range(22, 24)) == [group(22), group(23)]  # as it came, not as the step made it
    assert source.ask(range(24, 26)) == [group(24), group(25)]
    source.publish("weights", 12)
    assert source.take(12) == [group(24), group(25)] and source.report() == {}


def test_other_prompts_are_refused(recorded: Path) -> None:
    with pytest.raises(ValueError, match=r"12.safetensors: holds other prompts than 20 to 21, .*; replay with the doc"):
        replayed(recorded, 11).ask(range(20, 22))
    other = copy.copy(PROMPTS)
    other.prompt_ids = lambda row: [2] * (row + 1)
    with pytest.raises(ValueError, match=r"prompt 22 has other tokens here; replay with the same data"):
        replayed(recorded, 11, other).ask(range(22, 24))


def test_what_a_record_is_of() -> None:
    rollout = {"group_size": 2, "temperature": 0.7}
    rewards = [{"function": "mine.py:own", "weight": 0.5}]
    assert made_with(Config.model_validate({"name": "x", "rollout": rollout, "rewards": rewards})) == MADE
    rollout["environment"] = {"game": "nim", "threads": 3, "weights": {"won": 2}}
    own = {"tools": [], "game": "nim", "args": {}, "max_turns": 8, "weights": {"won": 2.0}}
    found = made_with(Config.model_validate({"name": "x", "rollout": rollout, "rewards": rewards}))
    assert found == MADE | {"rollout.environment": own}


def test_a_record_of_other_settings_is_refused(recorded: Path) -> None:
    source = replayed(recorded, 11, **{"rollout.temperature": 1.0, "rewards": []})
    with pytest.raises(ValueError) as failure:
        source.ask(range(22, 24))
    path, remedy = f"{recorded}/step-00000012.safetensors", "replay with the document of the run that was recorded"
    assert str(failure.value).removeprefix("rank 0: ").splitlines() == [
        f"rollout.temperature=1.0: {path} was made with 0.7; {remedy}",
        f"rewards=[]: {path} was made with {MADE['rewards']}; {remedy}",
    ]


def test_episodes_come_back(tmp_path: Path) -> None:
    """With the rows of both sides, what they share of the prompt, and tokens that no policy wrote; one side never
    spoke."""
    game = {**MADE, "rollout.environment": {"game": "nim", "weights": {"won": 2.0}}}
    row = PROMPTS.prompt_ids(4)
    sides = [
        Sample(row[:2], [1, 9, 8, 7], [False, True, False, True], [0.0, -0.5, 0.0, -1.5], [3, 3, 3, 4], True, 1.0),
        Sample(row[:2], [], [], [], [], True, -1.0, {"won": -1.0}, {"environment": "broken"}),
    ]
    for sample in sides:
        sample.example = {"row": 4}
    source = Source()
    source.ask = lambda numbers: [sides] * len(numbers)
    recording = Recording(source, LocalGroup(), str(tmp_path), 1, game)
    recording.publish("weights", 4)
    recording.take(4)
    assert replayed(tmp_path, 4, **game).ask(range(4, 5)) == [sides]
    with pytest.raises(ValueError, match=r"rollout\.environment=None: .* was made with \{'game': 'nim'"):
        replayed(tmp_path, 4).ask(range(4, 5))


def test_runs_of_an_agent_come_back(tmp_path: Path) -> None:
    """With all rows of each attempt, parts and errors, and a prompt that is none of the data's."""
    made = {**MADE, "rollout.agent": {"function": "run"}, "rollout.agent.function": "ab12"}
    rows = [
        Sample([7, 8], [1, 9], [False, True], [0.0, -0.5], [3, 3], True, 1.0, {"agent": 1.0}, attempt=0),
        Sample([7, 8], [4], [True], [-1.5], [3], False, 1.0, {"agent": 1.0}, attempt=0),
        Sample([7, 8], [2], [False], [0.0], [3], False, -1.0, {}, {"environment": "KeyError"}, attempt=1),
    ]
    for sample in rows:
        sample.example = {"row": 4}
    source = Source()
    source.ask = lambda numbers: [rows] * len(numbers)
    recording = Recording(source, LocalGroup(), str(tmp_path), 1, made)
    recording.publish("weights", 4)
    recording.take(4)
    assert replayed(tmp_path, 4, **made).ask(range(4, 5)) == [rows]
    other = copy.copy(PROMPTS)
    other.examples = [{"row": i + 1} for i in range(5)]
    with pytest.raises(ValueError, match=r"is of other rows than these prompts are here; replay with the same data"):
        replayed(tmp_path, 4, other, **made).ask(range(4, 5))
    for key, value in (("rollout.agent", {"function": "go"}), ("rollout.agent.function", "cd34")):
        with pytest.raises(ValueError, match=rf"^(rank 0: )?{key}=.*was made with"):
            replayed(tmp_path, 4, **{**made, key: value}).ask(range(4, 5))


def test_what_a_record_of_an_agent_is_of() -> None:
    """The place of a file does not count, its contents do."""

    def made(agent: dict[str, Any], contents: dict[str, str]) -> dict[str, Any]:
        config = Config.model_validate({"name": "x", "rollout": {"agent": agent}})
        return made_with(config, {key: {"path": "p", "sha256": sha} for key, sha in contents.items()})

    found = made({"function": "a/b.py:run", "processes": 3}, {"rollout.agent.function": "ab", "data.train": "cd"})
    assert found["rollout.agent"] == {"function": "run", "args": None, "command": [], "weights": {}}
    assert found["rollout.agent.function"] == "ab" and "data.train" not in found
    assert made({"function": "mine.runs:run"}, {})["rollout.agent"]["function"] == "mine.runs:run"
    asked = made({"command": ["bash", "x.sh"], "weights": {"good": 2}}, {})["rollout.agent"]
    assert asked == {"function": None, "args": None, "command": ["bash", "x.sh"], "weights": {"good": 2.0}}


def test_a_step_that_is_not_there_is_named(recorded: Path) -> None:
    with pytest.raises(OSError, match=r"step-00000014\.safetensors: is not there; was the run recorded"):
        replayed(recorded, 13).take(13)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def foreign(path: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"weight": zeros(2)}, path)


@pytest.mark.parametrize("spoil", [cut, foreign, lambda path: path.write_text("{}")])
def test_a_broken_file_is_named(recorded: Path, spoil: Callable[[Path], Any]) -> None:
    path = recorded / "step-00000012.safetensors"
    spoil(path)
    with pytest.raises(ValueError, match=r"step-00000012\.safetensors: is no record of rollouts"):
        read_groups(str(path))


def test_a_record_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("a file")
    recording = Recording(Source(), LocalGroup(), str(tmp_path / "rollouts"), 2, MADE)
    with pytest.raises(OSError, match="rollouts"):
        recording.take(0)


def test_episodes_of_other_rows_are_refused(tmp_path: Path) -> None:
    """Where histories were rewritten, the prompt that all rows share is too short to tell of which row of the data they
    are."""
    made = {**MADE, "rollout.environment": {"game": None}}
    rows = [Sample([1], [1, 7], [False, True], [0.0, -0.5], [3, 3], True, example={"row": 4}, attempt=0)]
    source = Source()
    source.ask = lambda numbers: [rows]
    recording = Recording(source, LocalGroup(), str(tmp_path), 1, made)
    recording.publish("weights", 4)
    recording.ask(range(4, 5))
    other = SimpleNamespace(at=PROMPTS.at, prompt_ids=PROMPTS.prompt_ids, examples=[{"row": -i} for i in range(5)])
    order = Shuffled(other, 0)

    def again(prompts: Any, order: Shuffled) -> list[Group]:
        source = Replayed(LocalGroup(), str(tmp_path), prompts, 1, order, made)
        source.publish("weights", 4)
        return source.ask(range(4, 5))

    assert again(PROMPTS, Shuffled(PROMPTS, 0)) == [rows]
    with pytest.raises(ValueError, match="is of other rows than these prompts are here"):
        again(other, order)
