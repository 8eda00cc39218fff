"""Every fault of a document is one line with place, rule and remedy; a good one survives its dump."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.load import ConfigError, dump, load, stage_config
from llmtrain.config.recipes import config_class
from llmtrain.config.schema import Config, ModelConfig, OptimConfig, RunConfig


def write(folder: Path, text: str, name: str = "x.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def fault(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parallel:\n  pp: 2\n  tensor: 2\n", "3: parallel.tensor: unknown key, did you mean parallel.tp?"),
        ("parallel:\n  pipeline: 2\n", "2: parallel.pipeline: unknown key, did you mean parallel.pp?"),
        ("optim:\n  learning_rate: 1\n", "2: optim.learning_rate: unknown key, did you mean optim.lr?"),
        ("learning_rate: 1\n", "1: learning_rate: unknown key, did you mean optim.lr?"),
        ("train: {grad_clip: 1}\n", "1: train.grad_clip: unknown key, did you mean optim.grad_clip?"),
        ("optm:\n  lr: 1\n", "1: optm: unknown key, did you mean optim?"),
        ("train:\n  step: 1\n", "2: train.step: unknown key, did you mean train.steps?"),
        ("model: {rope_scaling: {factr: 2}}", "1: model.rope_scaling.factr: unknown key, did you mean model.rope_sca"),
        (
            "data:\n  sources:\n    - {name: a, type: text, pth: z}\n",
            "3: data.sources.0.pth: unknown key, did you mean data.sources.0.path?",
        ),
        ("qqqqqq: 1\n", "1: qqqqqq: unknown key; remove it"),
        ("train:\n  steps: abc\n", "2: train.steps: value 'abc': must be a whole number. The default is 1000"),
        ("train:\n  steps: true\n", "2: train.steps: value True: must be a whole number. The default is 1000"),
        ("seed: -1\n", "1: seed: value -1: must be "),
        ("seed: 100000000000000000000000000\n", "1: seed: value 100000000000000000000000000: must be "),
        ("train:\n  steps: 1.5\n", "2: train.steps: value 1.5: must be a whole number. The default is 1000"),
        ("train:\n  steps: -1\n", "2: train.steps: value -1: must be greater than 0. The default is 1000"),
        (
            "rollout:\n  temperature: 1.0e-300\n",
            "2: rollout.temperature: value 1e-300: must be greater than or equal to 0.000001",
        ),
        ("optim: {lr: fast}\n", "1: optim.lr: value 'fast': must be a number. The default is 0.0003"),
        ("optim: {betas: [0.9]}\n", "1: optim.betas.1: is missing; add it"),
        ("name: 3\n", '1: name: value 3: must be text; put quotes around it. The default is "run"'),
        (
            "engine: {precision: bf8}\n",
            "1: engine.precision: value 'bf8': must be one of 'fp32', 'bf16', 'fp16', 'fp8' or 'auto'. The default is ",
        ),
        ("train: 3\n", "1: train: value 3: must be a section of keys"),
        ("data:\n  sources: [{name: a}]\n", "2: data.sources.0.type: is missing; add it"),
        ("data: {sources: 3}\n", "1: data.sources: value 3: must be a list"),
        ("seed: 1\nname: a\nseed: 2\n", "3: seed: written twice; remove one"),
        ("a: [1, 2\nb: 3\n", "2: broken YAML: expected ',' or ']', but got ':'"),
        ("a:\n\tb: 3\n", "2: broken YAML: found character '\\t' that cannot start any token"),
        ("a: !!python/name:os.system x\n", "1: tag tag:yaml.org,2002:python/name:os.system: is not known; remove it"),
        ("- 1\n", "1: must be a mapping of sections, such as `train:`"),
    ],
)
def test_a_fault_names_file_line_rule_and_remedy(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    message = fault(path)
    assert "\n" not in message
    assert message.startswith(f"{path}:{expected}")


def test_aliases_that_stand_for_millions_of_values_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    path, start = write(tmp_path, "\n".join(lines)), time.process_time()
    assert fault(path) == (
        f"{path}:5: aliases make this more than 100,000 values, the most that is read; use fewer, or write the values "
        "out"
    )
    assert time.process_time() - start < 1
    few = load(write(tmp_path, "name: &x few\nrun_dir: *x\n"), [])
    assert (few.name, few.run_dir) == ("few", "few")


def test_faults_of_the_whole_file(tmp_path: Path) -> None:
    assert fault(str(tmp_path / "no.yaml")).endswith(
        "cannot be read: No such file or directory; give the path of a YAML file"
    )
    assert "is empty" in fault(write(tmp_path, "# nothing\n"))
    assert "an alias refers to the section it stands in" in fault(write(tmp_path, "a: &a {b: *a}\n"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in fault(str(tmp_path / "b.yaml"))
    assert "Is a directory" in fault(str(tmp_path))


def test_all_faults_are_reported_one_line_each(tmp_path: Path) -> None:
    lines = fault(write(tmp_path, "train: {step: 1}\noptim:\n  lr: -1\n"), "log.wandb=on").splitlines()
    assert len(lines) == 3
    assert any("override 'log.wandb=on': log.wandb: value 'on'" in line for line in lines)


def test_numbers_and_words_read_as_people_mean_them(tmp_path: Path) -> None:
    text = "name: no\nlog: {wandb: off}\noptim: {lr: 3e-4, eps: 1E-8, min_lr: .5e-5}\ndata: {sources: []}\n"
    config = load(write(tmp_path, text), ["optim.weight_decay=2e-1", "tokenizer.train_bytes=4e6", "train.steps=1_000"])
    assert (config.name, config.log.wandb) == ("no", "off")
    assert (config.optim.lr, config.optim.eps, config.optim.min_lr, config.optim.weight_decay) == (
        3e-4,
        1e-8,
        5e-6,
        0.2,
    )
    assert (config.tokenizer.train_bytes, config.train.steps) == (4_000_000, 1000)


def test_overrides_win_and_reach_list_entries_by_name(tmp_path: Path) -> None:
    text = "data: {sources: [{name: a, type: stdlib}, {name: b, type: text}]}\nmodel: {num_layers: 2}\n"
    overrides = ["data.sources.b.weight=3", "data.sources.0.held_out=0.5", "model.rope_scaling.factor=4"]
    overrides += ["model={num_heads: 8}", "tokenizer.path=", "optim.betas=[0.8, 0.9]"]
    config = load(write(tmp_path, text), overrides)
    assert [(s.weight, s.held_out) for s in config.data.sources] == [(1.0, 0.5), (3.0, 0.05)]
    assert config.model.rope_scaling.factor == 4 and config.optim.betas == (0.8, 0.9)
    assert (config.model.num_layers, config.model.num_heads) == (2, 8)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.tensor=2", "override 'parallel.tensor=2': parallel.tensor: unknown key, did you mean parallel.tp?"),
        ("train.steps=x", "override 'train.steps=x': train.steps: value 'x': must be a whole number"),
        ("train.steps", "override 'train.steps': must have the form section.key=value"),
        ("data.sources.z.path=1", "override 'data.sources.z.path=1': data.sources has no entry 'z'; it has a"),
        ("seed.a=1", "override 'seed.a=1': seed: is a value, not a section; set it as a whole"),
        ("optim.betas=[1", "override 'optim.betas=[1': the value is broken YAML; quote it"),
    ],
)
def test_a_faulty_override_is_named(tmp_path: Path, override: str, expected: str) -> None:
    path = write(tmp_path, "seed: 1\ndata: {sources: [{name: a, type: stdlib}]}\n")
    assert fault(path, override).startswith(expected)


def test_include_is_merged_first_and_deeply(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path, "train: {steps: 5, seq_len: 64}\nmodel: {num_layers: 1}\n", "base/a.yaml")
    write(tmp_path, "include: a.yaml\ntrain:\n  seq_len: 32\n  oops: 1\n", "base/b.yaml")
    path = write(tmp_path, "include: [base/b.yaml]\ntrain: {micro_batch_seqs: 2}\n")
    assert fault(path).startswith(f"{tmp_path}/base/b.yaml:4: train.oops: unknown key")
    write(tmp_path, "include: a.yaml\ntrain:\n  seq_len: 32\n", "base/b.yaml")
    config = load(path, ["train.steps=7"])
    assert (config.train.steps, config.train.seq_len, config.train.micro_batch_seqs) == (7, 32, 2)
    assert config.model.num_layers == 1


def test_include_faults(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\ninclude: none.yaml\n")
    assert fault(path).startswith(f"{path}:2: include: '{tmp_path}/none.yaml' is not a file")
    write(tmp_path, "include: x.yaml\n", "y.yaml")
    assert "'x.yaml' includes itself" in fault(write(tmp_path, "include: y.yaml\n"))
    assert "must be a path or a list of paths" in fault(write(tmp_path, "include: {a: 1}\n"))


RUN = """
name: q
parallel: {pp: 2}
model: {num_layers: 4}
stages:
  - {name: pretrain, command: pretrain, ranks: 4, set: {train: {steps: 800}}}
  - name: sft
    command: sft
    set: {train: {steps: 600}, model: {init_from: "{run}/pretrain"}, data: {train: "{run}/data/t.jsonl"}}
"""


def test_a_stage_is_the_document_with_its_set_merged_over(tmp_path: Path) -> None:
    run = load(write(tmp_path, RUN), [])
    assert isinstance(run, RunConfig)
    sft = stage_config(run, "sft")
    assert not isinstance(sft, RunConfig) and sft.parallel.pp == 2 and sft.train.steps == 600
    assert (sft.name, sft.directory) == ("sft", "runs/q/sft")
    assert (sft.model.init_from, sft.data.train) == ("runs/q/pretrain", "runs/q/data/t.jsonl")


def test_an_override_wins_over_a_stage_too(tmp_path: Path) -> None:
    run = load(write(tmp_path, RUN), ["train.steps=3", "stages.sft.set.train.steps=2", "train.seq_len=64"])
    assert [stage_config(run, n).train.steps for n in ("pretrain", "sft")] == [3, 2]
    assert stage_config(run, "sft").train.seq_len == 64
    assert "seq_len" not in run.stages[0].set["train"]


def test_faults_of_stages(tmp_path: Path) -> None:
    path = write(tmp_path, RUN.replace("{steps: 600}", "{stepz: 600}"))
    assert fault(path) == f"{path}:9: stages.1.set.train.stepz: unknown key, did you mean train.steps?"
    path = write(tmp_path, RUN.replace("name: sft", "name: pretrain"))
    assert "name 'pretrain': must be unique" in fault(path)
    assert "follows from the stage's name" in fault(write(tmp_path, RUN.replace("set: {train", "set: {name: x, train")))
    assert "stages: is empty" in fault(write(tmp_path, "stages: []\n"))
    assert "value 'pretain': must be one of 'data'" in fault(
        write(tmp_path, RUN.replace("command: pretrain", "command: pretain"))
    )


words = (
    st.sampled_from(["3e-4", "off", "null", "", "1e6", "a: b", "2026-11-21", "~", "'", "x\ny", "1_0", ".inf"])
    | st.text()
)


@settings(max_examples=60, deadline=None)
@given(name=words, lr=st.floats(1e-12, 1e12), path=st.none() | words)
def test_a_dump_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, name: str, lr: float, path: str) -> None:
    config = config_class()(name=name, optim=OptimConfig(lr=lr), tokenizer={"path": path})
    file = write(tmp_path_factory.getbasetemp(), dump(config), "dump.yaml")
    assert load(file, []) == config


def test_a_dump_keeps_what_a_preset_or_a_stage_gives(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(preset="llama3-8b", num_layers=2))
    again = load(write(tmp_path, dump(config)), [])
    assert again.model.model_fields_set == {"preset", "num_layers"}
    run = load(write(tmp_path, RUN), [])
    again = load(write(tmp_path, dump(run)), [])
    assert again == run and stage_config(again, "sft") == stage_config(run, "sft")
    assert again.model.model_fields_set == {"num_layers"}


def test_loading_and_checking_imports_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {preset: llama3-8b}\n")
    code = (
        "import sys, llmtrain.cli; from llmtrain.config.load import load; from llmtrain.rules.check import check; "
        f"check(load({path!r}, ['train.seq_len=64']), 1, 'pretrain'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_keys_of_earlier_versions_are_read_as_what_they_are_now(tmp_path: Path) -> None:
    old = (
        "name: q\ngrpo: {reward: math, minibatches: 2}\n"
        "stages:\n  - {name: a, command: grpo, set: {grpo: {reward: math}}}\n"
    )
    run = load(write(tmp_path, old), ["grpo.reward=first_integer"])
    assert [reward.name for reward in run.rewards] == ["first_integer"] and run.grpo.minibatches == 2
    assert [reward.name for reward in stage_config(run, "a").rewards] == ["first_integer"]
    path = write(tmp_path, "rewards: [{name: math}]\ngrpo:\n  reward: math\n")
    assert fault(path) == f"{path}:3: grpo.reward: is now `rewards`, which is written too; remove one"
    path = write(tmp_path, "grpo:\n  reward: maths\n")
    assert fault(path).startswith(f"{path}:2: rewards.0.name: value 'maths': must be one of 'reasoning_gym'")


def test_a_later_layer_wins_over_keys_that_moved(tmp_path: Path) -> None:
    """Today's configurations with commands of earlier versions, and the other way round."""
    shipped = Path(__file__).parents[2] / "configs"
    for path in (shipped / "grpo/largest.yaml", shipped / "quickstart.yaml"):
        assert [r.name for r in load(str(path), ["grpo.reward=math"]).rewards] == ["math"]
        assert [r.name for r in load(str(path), ["grpo={reward: math, minibatches: 4}"]).rewards] == ["math"]
    old = write(tmp_path, f"include: {shipped}/grpo/largest.yaml\ngrpo: {{reward: math}}\n", "old.yaml")
    assert [r.name for r in load(old, []).rewards] == ["math"]
    assert [r.name for r in load(old, ["rewards=[{name: reasoning_gym}]"]).rewards] == ["reasoning_gym"]
    with pytest.raises(ConfigError, match=r"plugins: value 'mine': must be a list of modules"):
        load(old, ["plugins=mine"])
