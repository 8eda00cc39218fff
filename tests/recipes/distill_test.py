"""Distillation as a user runs it: on given rows and on own samples, on one rank and on layouts, resumed, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.source import load_decoder
from llmtrain.config.load import ConfigError, load
from llmtrain.config.recipes import RECIPES
from llmtrain.config.schema import ModelConfig
from llmtrain.rules.check import check
from llmtrain.trainer.frozen import build_scorer
from llmtrain.trainer.job import start_directory
from llmtrain.types import Batch

WORKER = Path(__file__).parents[1] / "several_runs.py"
ROWS = (
    *("train.steps=3", "checkpoint.every_steps=2", "distill.top_k=16", "optim.schedule=constant", "optim.lr=1e-3"),
    "train.micro_batch_seqs=4",
)
OWN = (
    *ROWS,
    *("distill.on_policy=true", "distill.prompts_per_step=4", "rollout.group_size=2", "rollout.max_new_tokens=12"),
    "rewards=[]",
)
TEACHERS = {"teacher": {"seed": 2, "hidden_size": 48, "vocab_size": 512}, "wider": {"seed": 3, "vocab_size": 544}}
PIPELINE = ("parallel.pp=2", "parallel.tp=2")
CONTEXT = ("parallel.cp=2", "engine.backend=fsdp")


def save_model(base: Path, name: str, tokenizer: Path, seed: int = 0, **fields: int) -> None:
    """Writes a Hugging Face directory with random values, larger than usual: its distributions are not flat."""
    from llmtrain.model.decoder import init_tensor, parameter_shapes
    from llmtrain.model.hf_write import save_hf

    config = load(str(base / "small.yaml"), []).model
    config = resolve_model(config.model_copy(update={**fields, "head_dim": None}))
    shapes = parameter_shapes(config)
    weights = ((name, 4 * init_tensor(name, shape, config, seed)) for name, shape in shapes.items())
    save_hf(str(base / name), config, weights, torch.float32, str(tokenizer), 1)


@pytest.fixture(scope="module")
def start(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration, a student, and two teachers: one of other width, one of more rows."""
    from tests.small_run import DOCUMENT

    base = tmp_path_factory.mktemp("distill")
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    save_model(base, "student", small_data / "tokenizer")
    for name, fields in TEACHERS.items():
        save_model(base, name, small_data / "tokenizer", **fields)
    rows = [json.loads(line) for line in (small_data / "shards/sums-train.jsonl").read_text().splitlines()]
    named = [row | {"teacher": ("teacher", "wider", None)[i % 3]} for i, row in enumerate(rows)]
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    return base


@pytest.fixture(scope="module")
def run(start: Path) -> Callable:
    """run(ranks, {run directory: overrides}) -> CompletedProcess of `llmtrain distill` with each, by the same ranks."""
    from tests.forked import run_forked

    def launch(ranks: int, runs: dict[Path, tuple[str, ...]]) -> subprocess.CompletedProcess[str]:
        arguments = [[*command(start), f"run_dir={run_dir}", *overrides] for run_dir, overrides in runs.items()]
        result = run_forked(ranks, WORKER, json.dumps(arguments), timeout_s=200)
        assert f"exit codes {[0] * len(runs)}" in result.stdout, result.stdout[-3000:]
        return result

    return launch


def command(start: Path, *teachers: str) -> list[str]:
    model = json.dumps({"init_from": str(start / "student")})
    paths = ", ".join(f"{{path: {start / name}}}" for name in teachers or TEACHERS)
    return [
        *("distill", str(start / "small.yaml"), f"model={model}", f"data.train={start / 'rows.jsonl'}"),
        f"distill.teacher=[{paths}]",
    ]


def numbers(run_dir: Path) -> list[tuple[float, ...]]:
    """What does not depend on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(m["loss"], m["grad_norm"], m["teacher_covered"], m["student_covered"], m["tokens"]) for m in lines]


def test_layouts_do_the_same_and_a_killed_run_goes_on_bit_for_bit(start: Path, run: Callable, tmp_path: Path) -> None:
    one = {name: tmp_path / f"one-{name}" for name in ("rows", "own")}
    run(1, {one["rows"]: ROWS, one["own"]: OWN})
    for name in one:
        assert len(numbers(one[name])) == 3 and numbers(one[name])[0][0] > 0.1
        assert all(0 < covered <= 1.00001 for line in numbers(one[name]) for covered in line[2:4]), numbers(one[name])
    whole = {name: tmp_path / f"four-{name}" for name in one}
    resumed = {name: tmp_path / f"again-{name}" for name in one}
    waits = ("distill.teachers_wait=true",)
    run(4, {whole["rows"]: (*ROWS, *PIPELINE), whole["own"]: (*OWN, *PIPELINE)})
    for name in one:
        shutil.copytree(whole[name] / "checkpoints/step-00000002", resumed[name] / "checkpoints/step-00000002")
    run(4, {resumed["rows"]: (*ROWS, *PIPELINE, *waits), resumed["own"]: (*OWN, *PIPELINE, *waits)})
    for name in one:
        for here, there in zip(numbers(whole[name]), numbers(one[name]), strict=True):
            assert here == pytest.approx(there, rel=1e-4)
        assert numbers(resumed[name]) == numbers(whole[name])[2:]
        for file in (whole[name] / "checkpoints/step-00000003").glob("*.safetensors"):
            again = load_file(resumed[name] / "checkpoints/step-00000003" / file.name)
            assert all(again[key].equal(tensor) for key, tensor in load_file(file).items())


def test_adapters_learn_on_any_layout(start: Path, run: Callable, tmp_path: Path) -> None:
    adapted = ("model.lora={rank: 2}", "train.steps=2")
    one, four = tmp_path / "one", tmp_path / "four"
    run(1, {one / "rows": (*ROWS, *adapted), one / "own": (*OWN, *adapted)})
    run(4, {four / "rows": (*ROWS, *adapted, *PIPELINE), four / "own": (*OWN, *adapted, *PIPELINE)})
    for name in ("rows", "own"):
        assert all(line[1] > 0 for line in numbers(one / name))
        for here, there in zip(numbers(four / name), numbers(one / name), strict=True):
            assert here == pytest.approx(there, rel=1e-4)


def test_a_rank_of_its_own_samples(start: Path, run: Callable, tmp_path: Path) -> None:
    apart = (*OWN, "train.steps=2", "rollout.placement=separate", "rollout.workers=1")
    run(3, {tmp_path / "apart": apart})
    run(1, {tmp_path / "one": (*OWN, "train.steps=2")})
    for here, there in zip(numbers(tmp_path / "apart"), numbers(tmp_path / "one"), strict=True):
        assert here == pytest.approx(there, rel=1e-4)


def test_a_teacher_of_more_rows_speaks_of_the_students_ids(start: Path, stub_job: Callable) -> None:
    """Of its 544 rows the 512 are kept that the tokenizer uses: its distribution is that of these alone."""
    job, path = stub_job("distill"), str(start / "wider")
    ids = torch.randint(0, 512, (2, 8), generator=torch.Generator().manual_seed(0))
    at, everything = torch.arange(8).expand(2, 8), torch.arange(512).expand(2, 8, 512)
    (scores,) = build_scorer(job, "distill.teacher", path).score([Batch(ids, ids, ids >= 0, at, candidates=everything)])
    plain = load_decoder(path, resolve_model(ModelConfig(init_from=path)), torch.float32)
    with torch.no_grad():
        expected = plain(ids, at)[..., :512].log_softmax(-1)
    torch.testing.assert_close(scores.candidates, expected, rtol=1e-5, atol=1e-5)
    assert scores.candidates.exp().sum(-1).flatten().tolist() == pytest.approx([1.0] * 16, rel=1e-5)


def test_on_context_ranks_with_fsdp(start: Path, run: Callable, tmp_path: Path) -> None:
    """The whole vocabulary, JSD; and the sampled token alone."""
    rows = (*ROWS, "distill.top_k=0", "distill.divergence=jsd", "train.steps=2")
    own = (*OWN, "distill.estimate=sampled", "train.steps=2")
    run(1, {tmp_path / "rows": rows})
    run(2, {tmp_path / "rows2": (*rows, *CONTEXT), tmp_path / "own2": (*own, *CONTEXT)})
    for here, there in zip(numbers(tmp_path / "rows2"), numbers(tmp_path / "rows"), strict=True):
        assert here == pytest.approx(there, rel=1e-4) and here[2:4] == pytest.approx((1.0, 1.0), abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "own2/metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0 and line["logprob_gap_max"] < 1e-3 for line in lines)


def test_a_run_goes_on_with_the_teachers_that_it_had(start: Path, run: Callable, tmp_path: Path) -> None:
    """Neither with other weights in a teacher's directory, nor with other shares."""
    shutil.copytree(start / "teacher", tmp_path / "teacher")
    teachers = f"distill.teacher=[{{path: {tmp_path / 'teacher'}}}, {{path: {start / 'wider'}, weight: WEIGHT}}]"
    given = [*command(start)[:-1], f"run_dir={tmp_path / 'run'}", *ROWS]
    run(1, {tmp_path / "run": (teachers.replace("WEIGHT", "2"), "train.steps=2")})
    for change, fault in ((False, "distill.teacher.weight="), (True, "distill.teacher.teacher=")):
        if change:
            shutil.copy(start / "wider/model.safetensors", tmp_path / "teacher/model.safetensors")
        with pytest.raises(ValueError, match=f"{fault}.*: must stay .*"):
            config = load(given[1], [*given[2:], teachers.replace("WEIGHT", "2" if change else "3")])
            start_directory(config, RECIPES["distill"])


def test_other_token_ids_are_refused(start: Path, small_data: Path, tmp_path: Path, forked: Callable) -> None:
    shutil.copytree(start / "teacher", tmp_path / "teacher")
    tokenizer = json.loads((tmp_path / "teacher/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = (next(token for token, i in vocabulary.items() if i == wanted) for wanted in (300, 301))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "teacher/tokenizer.json").write_text(json.dumps(tokenizer))
    rows = f"data.train={small_data / 'shards/sums-train.jsonl'}"
    arguments = [*command(start)[:-1], f"distill.teacher={tmp_path / 'teacher'}", f"run_dir={tmp_path / 'run'}", rows]
    result = forked(1, "llmtrain", *arguments, *ROWS, timeout_s=60)
    assert result.returncode != 0 and "(2 tokens differ); both must be equal: take a model of the same" in result.stdout
    (tmp_path / "teacher/tokenizer.json").unlink()
    result = forked(1, "llmtrain", *arguments, *ROWS, timeout_s=60)
    assert result.returncode != 0 and "no tokenizer.json there, and its token ids must be" in result.stdout


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["distill.teacher=[]"], r"distill.teacher: must be set, .*; give the directory"),
        (["distill.teacher=nowhere"], r"distill.teacher.nowhere=nowhere: does not exist; give the directory"),
        (["distill.teacher=[{path: T}, {path: T}]"], r"distill.teacher: teacher is the name of two teachers; give one"),
        (["distill.estimate=sampled"], r"distill.estimate=sampled: needs distill.on_policy=true, .*; set it"),
        (["rollout.placement=separate"], r"rollout.placement=separate: needs distill.on_policy=true, .*; use coloc"),
        (["distill.on_policy=true", "distill.temperature=2"], r"distill.temperature=2: must be rollout.temperature=1"),
        (
            ["distill.on_policy=true", "distill.estimate=sampled", "distill.divergence=forward"],
            r"distill.divergence=forward: not with distill.estimate=sampled, .*; remove one",
        ),
        (["distill.beta=0.1"], r"distill.beta=0.1: is of distill.divergence=jsd, not forward; remove it, or set dis"),
        (["distill.beta=0.1", "distill.on_policy=true"], r"distill.beta=0.1: is of .*=jsd, not reverse; remove it, or"),
        (["distill.on_policy=true", "guard.spike=skip"], r"guard.spike=skip: must be off with distill.on_policy, .*"),
        (["distill.on_policy=true", "train.epochs=1"], r"train.epochs=1: only .* counts epochs; set train.steps"),
        (["train.global_batch_seqs=7"], r"train.global_batch_seqs=7: must be a multiple of micro_batch_seqs"),
        (["model.num_heads=3", "parallel.tp=3"], r"distill.teacher.teacher: model.num_heads=4: must be a multiple of"),
        (["distill.beta=1"], r"distill.beta: value 1: must be less than 1"),
    ],
)
def test_what_cannot_work_is_refused_with_its_remedy(start: Path, overrides: list[str], expected: str) -> None:
    given = [each.replace("path: T", f"path: {start / 'teacher'}") for each in overrides]
    paths = command(start, "teacher")[3:]
    ranks = 3 if "parallel.tp=3" in overrides else 1
    with pytest.raises(ConfigError, match=expected):
        check(load(str(start / "small.yaml"), [*paths, *given]), ranks, "distill")


def test_a_document_that_works_is_planned(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llmtrain import cli

    jsd, rows = (*ROWS, "distill.divergence=jsd", "distill.beta=0.1"), "8 x 64 tokens = 512 a step"
    for more, words in ((jsd, rows), (ROWS, rows), (OWN, "4 prompts x 2 samples x 12 tokens")):
        check(load(str(start / "small.yaml"), [*command(start)[2:], *more]), 1, "distill")
        assert cli.main(["plan", *command(start)[1:], *more]) == 0
        planned = capsys.readouterr().out
        assert "(distill)\n" in planned and words in planned and "the frozen teacher wider" in planned
