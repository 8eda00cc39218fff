"""A block of stages is written out round by round; what cannot be a block is refused, all faults with their places."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from llmtrain import cli
from llmtrain.config.load import ConfigError, dump, load, stage_config
from llmtrain.config.schema import RunConfig, StageConfig

RUN = """\
name: loop
train: {steps: 4}
stages:
  - {name: sft, command: sft}
  - name: rounds
    repeat: 3
    stages:
      - {name: "judge-{round}", command: eval, set: {seed: "{round}", eval: {label: "a {round} of {x}"}}}
      - name: dpo-{round}
        command: sft
        set:
          model: {init_from: "{run}/dpo-{previous}"}
          train: {steps: 9}
        first: {model: {init_from: "{run}/sft"}, rollout: {stop: ["{previous}."]}}
  - {name: export, command: export, set: {model: {init_from: "{run}/dpo-{last}"}}}
"""


def write(folder: Path, *changes: tuple[str, str]) -> str:
    text = RUN
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "x.yaml"
    path.write_text(text)
    return str(path)


def run(path: str, *overrides: str) -> RunConfig:
    config = load(path, list(overrides))
    assert isinstance(config, RunConfig)
    return config


def faults(path: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


def test_rounds_are_stages_with_their_numbers_filled_in(tmp_path: Path) -> None:
    config = run(write(tmp_path))
    names = ["sft", "judge-1", "dpo-1", "judge-2", "dpo-2", "judge-3", "dpo-3", "export"]
    assert [stage.name for stage in config.stages] == names
    assert {type(stage).model_fields.keys() == StageConfig.model_fields.keys() for stage in config.stages} == {True}
    assert [stage_config(config, f"judge-{i}").seed for i in (1, 2, 3)] == [1, 2, 3]  # a number, not a text
    assert [stage_config(config, f"judge-{i}").eval.label for i in (1, 3)] == ["a 1 of {x}", "a 3 of {x}"]
    starts = [stage_config(config, name).model.init_from for name in ("dpo-1", "dpo-2", "dpo-3", "export")]
    assert starts == ["runs/loop/sft", "runs/loop/dpo-1", "runs/loop/dpo-2", "runs/loop/dpo-3"]
    assert [stage_config(config, f"dpo-{i}").train.steps for i in (1, 2)] == [9, 9]  # `first` is merged, not instead
    assert [stage_config(config, f"dpo-{i}").rollout.stop for i in (1, 2)] == [["0."], []]
    (tmp_path / "dump.yaml").write_text(dump(config))
    assert run(str(tmp_path / "dump.yaml")) == config


def test_a_stage_with_the_number_0_is_where_the_first_round_starts(tmp_path: Path) -> None:
    config = run(write(tmp_path, ("name: sft", "name: dpo-0"), ('model: {init_from: "{run}/sft"}, ', "")))
    assert stage_config(config, "dpo-1").model.init_from == "runs/loop/dpo-0"


def test_a_second_block_begins_behind_the_first(tmp_path: Path) -> None:
    more = """\
  - repeat: 2
    stages:
      - {name: "b-{round}", command: sft, set: {model: {init_from: "{run}/dpo-{last}"}}}
  - {name: end, command: eval, set: {model: {init_from: "{run}/b-{last}"}}}
"""
    path = write(tmp_path)
    Path(path).write_text(RUN + more)
    config = run(path)
    assert [s.name for s in config.stages[-3:]] == ["b-1", "b-2", "end"]
    starts = [stage_config(config, name).model.init_from for name in ("b-1", "b-2", "end")]
    assert starts == ["runs/loop/dpo-3", "runs/loop/dpo-3", "runs/loop/b-2"]


def test_an_override_that_would_make_rounds_alike_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "seeds.yaml"
    path.write_text(
        "name: x\nmodel: {num_layers: 1}\nstages:\n- name: rounds\n  repeat: 2\n  stages:\n"
        '  - {name: "eval-{round}", command: eval, set: {seed: "{round}", eval: {label: "r {round}", samples: 4}}}\n'
    )
    line = "sets seed to '{round}', another value in each round, and this would make all rounds alike"
    with pytest.raises(ConfigError, match=re.escape(line)):
        load(str(path), ["seed=3"])
    assert [stage.set["seed"] for stage in run(str(path), "eval.samples=2").stages] == [1, 2]
    assert [stage.set["seed"] for stage in run(str(path), "stages.eval-2.set.seed=7").stages] == [1, 7]


def test_overrides_reach_the_block_every_round_and_one_round(tmp_path: Path) -> None:
    path = write(tmp_path)
    steps = [stage_config(c := run(path, "train.steps=2"), f"dpo-{i}").train.steps for i in (1, 2, 3)]
    assert steps == [2, 2, 2] and len(c.stages) == 8  # also what a stage of a block sets
    config = run(
        *(path, "stages.dpo-2.set.train.steps=7", "stages.rounds.repeat=2", "rollout.stop=[z]"),
        *("stages.rounds.stages.dpo-{round}.set.train.steps=5", "stages.0.ranks=2", "stages.judge-1.ranks=3"),
    )
    assert [stage.name for stage in config.stages] == ["sft", "judge-1", "dpo-1", "judge-2", "dpo-2", "export"]
    assert [stage_config(config, name).train.steps for name in ("sft", "dpo-1", "dpo-2")] == [4, 5, 7]
    assert [stage_config(config, f"dpo-{i}").rollout.stop for i in (1, 2)] == [["z"], ["z"]]  # over `first` too
    line = "sets model.init_from to '{run}/dpo-{previous}', another value in each round"
    assert line in "".join(faults(path, "model.init_from=z"))
    assert [stage.ranks for stage in config.stages] == [2, 3, 1, 1, 1, 1]
    assert faults(path, "stages.dpo-4.ranks=2") == [
        "override 'stages.dpo-4.ranks=2': stages has no entry 'dpo-4'; it has sft, judge-1, dpo-1, judge-2, dpo-2, "
        "judge-3, dpo-3, export"
    ]
    assert faults(path, "stages.dpo-2.set.train.stepz=7") == [
        "override 'stages.dpo-2.set.train.stepz=7': stages.1.stages.1.set.train.stepz: unknown key, did you mean "
        "train.steps?"
    ]


def test_keys_of_earlier_versions_in_a_block(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        ("train: {steps: 9}", "grpo: {reward: math}"),
        ('first: {model: {init_from: "{run}/sft"}, ', "first: {grpo: {reward: first_integer}, model: {init_from: a}, "),
    )
    config = run(path)
    rewards = [stage_config(config, f"dpo-{i}").rewards[0].name for i in (1, 2, 3)]
    assert rewards == ["first_integer", "math", "math"]
    rewards = [stage_config(run(path, "grpo.reward=math"), f"dpo-{i}").rewards[0].name for i in (1, 2)]
    assert rewards == ["math", "math"]


REPEAT = "6: stages.1.repeat: "
START = (
    "12: stages.1.stages.1.set.model.init_from: value '{run}/dpo-{previous}': round 1 has no round before it; say what "
    "it takes with `first: {model: {init_from: ...}}` in the stage, or call a stage before the block 'dpo-0'"
)
INIT = "12: stages.1.stages.1.set.model.init_from: value '{run}/"
MEANS = "means nothing here; in a block write {run}, {round}, {previous}"
OUTSIDE = "means nothing here; {round} and {previous} are known in a block with `repeat`, {last} behind one"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("repeat: 3", "repeat: 0", f"{REPEAT}value 0: must be greater than or equal to 1"),
        ("repeat: 3", "repeat: 101", f"{REPEAT}value 101: must be less than or equal to 100"),
        ("repeat: 3", "repeat: 1e20", f"{REPEAT}value {10**20}: must be less than or equal to 100"),
        ("repeat: 3", "repeat: three", f"{REPEAT}value 'three': must be a whole number"),
        ("repeat: 3", "repeat: true", f"{REPEAT}value True: must be a whole number"),
        ("    repeat: 3\n", "", "5: stages.1.repeat: is missing; add it"),
        ("repeat: 3", "repeats: 3", "6: stages.1.repeats: unknown key, did you mean stages.1.repeat?"),
        ("name: rounds", "name: sft", "5: stages.1.name: name 'sft': must be unique, of letters, digits, `-`, "),
        ("name: rounds", "name: a b", "5: stages.1.name: name 'a b': must be unique, of letters, digits, `-`, "),
        (
            "name: rounds",
            "command: sft",
            "5: stages.1.command: is a key of a stage, and this is a block; write it in the stages of the block",
        ),
        ("name: dpo-{round}", "name: dpo", "9: stages.1.stages.1.name: name 'dpo': must hold {round}, as in 'dpo-{r"),
        ("name: dpo-{round}", 'name: "judge-{round}"', "9: stages.judge-1: name 'judge-1': must be unique, of letter"),
        ("name: sft", "name: dpo-3", "9: stages.dpo-3: name 'dpo-3': must be unique, of letters, digits, `-`, `_` an"),
        ("name: dpo-{round}", "nam: dpo", "9: stages.1.stages.1.nam: unknown key, did you mean stages.1.stages.1.na"),
        ("command: eval", "command: evil", "8: stages.1.stages.0.command: value 'evil': must be one of 'data', 'tok"),
        ("steps: 9", "stepz: 9", "13: stages.1.stages.1.set.train.stepz: unknown key, did you mean train.steps?"),
        ("steps: 9", "steps: x", "13: stages.1.stages.1.set.train.steps: value 'x': must be a whole number. The de"),
        ("rollout: {stop", "rolout: {stop", "14: stages.1.stages.1.first.rolout: unknown key, did you mean rollout?"),
        ('model: {init_from: "{run}/sft"}, ', "", START),
        (
            'first: {model: {init_from: "{run}/sft"}, rollout: {stop: ["{previous}."]}}',
            "first: 3",
            "14: stages.1.stages.1.first: value 3: must be a section of keys",
        ),
        (
            "dpo-{previous}",
            "dpo-{prev}",
            f"{INIT}dpo-{{prev}}': {{prev}} means nothing here",
        ),
        ("dpo-{previous}", "dpo-{round-1}", f"{INIT}dpo-{{round-1}}': {{round-1}} means nothing here"),
        (
            "dpo-{previous}",
            "dpo-{last}",
            f"{INIT}dpo-{{last}}': {{last}} means nothing here",
        ),
        (
            'seed: "{round}"',
            "seed: {round}",
            "8: stages.1.stages.0.set.seed: is a section; a placeholder needs quotes",
        ),
        ("name: loop", "name: loop-{round}", f"1: name: value 'loop-{{round}}': {{round}} {OUTSIDE}"),
        ("name: sft", 'name: "sft-{round}"', f"4: stages.0.name: value 'sft-{{round}}': {{round}} {OUTSIDE}"),
        (
            "dpo-{last}",
            "dpo-{round}",
            "15: stages.2.set.model.init_from: value '{run}/dpo-{round}': {round} means nothing here; behind a block "
            "{last} is its last round, {round} and {previous} are known in it only",
        ),
        (
            '{name: "judge-{round}", command: eval, set',
            '{repeat: 2, stages: [{name: "a-{round}", command: eval}], set',
            "8: stages.1.stages.0: is a block in a block; write the stages of its rounds out",
        ),
        ("  - {name: sft, command: sft}\n", "  - {name: sft, command: sft, first: {}}\n", "4: stages.0.first: unknown"),
    ],
)
def test_a_fault_is_told_once_with_its_place(tmp_path: Path, old: str, new: str, expected: str) -> None:
    found = faults(write(tmp_path, (old, new)))
    assert len([line for line in found if line.startswith(expected)]) == 1, found
    assert {line.split(":")[0] for line in found} <= {expected.split(":")[0], "5"}, found


def test_unknown_words_are_named_with_the_known_ones(tmp_path: Path) -> None:
    found = faults(write(tmp_path, ("dpo-{previous}", "dpo-{prev}")))
    assert found[0].endswith(f"{{prev}} {MEANS}")


def test_all_faults_at_once_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path,
        *(("repeat: 3", "repeat: 0"), ("name: rounds", "command: sft"), ("dpo-{previous}", "dpo-{prev}")),
        *(("steps: 9", "stepz: 9"), ("dpo-{last}", "dpo-{round}")),
    )
    assert cli.main(["run", path]) == 2
    told = [line.removeprefix(f"{path}:") for line in capsys.readouterr().err.splitlines()]
    assert [line.split(":")[0] for line in told] == ["5", "6", "12", "15", "13"] and not (tmp_path / "runs").exists()
    assert cli.main(["--help", path]) == 0 and "commands:" in capsys.readouterr().out


def test_what_is_no_list_of_stages_is_told_by_the_schema(tmp_path: Path) -> None:
    path = write(tmp_path)
    for text, expected in (
        ("stages: 3\n", "1: stages: value 3: must be a list"),
        ("stages: [3]\n", "1: stages.0: value 3: must be a section of keys"),
        ("stages: [{repeat: 2, stages: [3]}]\n", "1: stages.0.stages.0: value 3: must be a section of keys"),
        ("stages: [{repeat: 2, stages: 3}]\n", "1: stages.0.stages: value 3: must be a list"),
        ("stages: [{repeat: 2, stages: []}]\n", "1: stages.0.stages: value []: List should have at least 1 item after"),
        ("stages: [{repeat: 2}]\n", "1: stages.0.stages: is missing; add it"),
    ):
        Path(path).write_text(text)
        assert faults(path)[0].startswith(expected), faults(path)


def test_a_hundred_rounds_are_read_in_seconds(tmp_path: Path) -> None:
    began = time.process_time()
    config = run(write(tmp_path, ("repeat: 3", "repeat: 100")))
    assert len(config.stages) == 202 and config.stages[-2].name == "dpo-100"
    assert time.process_time() - began < 10


PLANNED = """\
model: {num_layers: 2}
tokenizer: {path: "{run}/tokenizer"}
train: {steps: 4, seq_len: 64}
data: {path: "{run}/data", sources: [{name: topics, type: topics}]}
log: {wandb: off}
stages:
  - {name: p-0, command: pretrain}
  - repeat: 2
    stages:
      - {name: "p-{round}", command: pretrain, set: {model: {init_from: "{run}/p-{previous}"}}}
"""


def test_each_round_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the model of the round before, which is not there yet."""
    path = tmp_path / "x.yaml"
    path.write_text(PLANNED)
    assert cli.main(["plan", str(path)]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if "(pretrain)" in line] == [f"p-{i} (pretrain)" for i in (0, 1, 2)]
    sizes = [line for line in out if line.startswith("  parameters")]
    assert len(sizes) == 3 and len({*sizes}) == 1
