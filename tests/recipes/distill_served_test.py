"""Distillation from a teacher behind a real server, whose log-probs transformers computes, on one rank and on layouts;
resumed; refused; ended when the server fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.checkpoint.source import load_decoder
from llmtrain.config.load import ConfigError, load
from llmtrain.config.recipes import RECIPES
from llmtrain.losses.distill import sampled_loss
from llmtrain.rollout.served import ServedModel
from llmtrain.rules.check import check
from llmtrain.trainer.batches import group_microbatches
from llmtrain.trainer.frozen import build_scorer
from llmtrain.trainer.job import start_directory
from llmtrain.trainer.served import PROBE, ask_samples
from llmtrain.types import Sample
from tests.parity.layouts_worker import scores_of
from tests.recipes.distill_test import CONTEXT, PIPELINE, WORKER, save_model
from tests.servers import Server, reply, serving
from tests.small_run import DOCUMENT

OWN = (
    *("train.steps=3", "checkpoint.every_steps=2", "optim.schedule=constant", "optim.lr=1e-3", "rewards=[]"),
    *("distill.on_policy=true", "distill.estimate=sampled", "distill.prompts_per_step=4"),
    *("rollout.group_size=2", "rollout.max_new_tokens=12", "distill.server_deadline_s=20"),
)


class Teacher:
    """Answers requests for the log-probs of a prompt as vLLM does, with a model of transformers."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self.longest, self.first_id, self.answers_left = 64, [], 10**9

    def __call__(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        prompt, self.answers_left = body["prompt"], self.answers_left - 1
        ids = prompt[0] if isinstance(prompt, list) else [*self.first_id, *self.tokenizer(prompt).input_ids]
        if body["model"] != "teacher":
            return reply(handler, 404, {"error": {"message": f"The model {body['model']} does not exist."}})
        if len(ids) > self.longest:
            return reply(handler, 400, {"error": {"message": f"longer than {self.longest}"}})
        if self.answers_left < 0:
            return reply(handler, 500, {"error": {"message": "EngineDeadError"}})
        with torch.no_grad():
            logprobs = self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        said = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        found = {"token_logprobs": [None, *said, -0.5], "tokens": [f"token_id:{i}" for i in [*ids, 3]]}
        reply(handler, 200, {"choices": [{"index": 0, "text": "", "logprobs": found, "prompt_token_ids": ids}]})


@pytest.fixture(scope="module")
def start(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration, rows of which two in three name a teacher, others that name none, a student
    and two teachers."""
    base = tmp_path_factory.mktemp("served")
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    save_model(base, "student", small_data / "tokenizer")
    for seed, name in ((2, "teacher"), (3, "other")):
        save_model(base, name, small_data / "tokenizer", seed=seed)
    rows = [json.loads(line) for line in (small_data / "shards/sums-train.jsonl").read_text().splitlines()]
    named = [row | {"teacher": ("teacher", "other", None)[i % 3]} for i, row in enumerate(rows)]
    for name, written in (("rows", named), ("plain", rows)):
        (base / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return base


@pytest.fixture
def teacher(start: Path) -> Teacher:
    return Teacher(start / "teacher")


@pytest.fixture
def server(teacher: Teacher) -> Iterator[Server]:
    with serving(teacher) as server:
        yield server


def command(start: Path, run_dir: Path, first: str, *overrides: str, second: str | None = "other") -> list[str]:
    """`llmtrain distill` with the first teacher, of weight 1, and the other, of weight 2, from its directory; without
    the other on rows that name none."""
    others = f", {{path: {start / second}, weight: 2}}" if second else ""
    return [
        *("distill", str(start / "small.yaml"), f"model={json.dumps({'init_from': str(start / 'student')})}"),
        *(
            f"data.train={start / ('rows.jsonl' if second else 'plain.jsonl')}",
            f"distill.teacher=[{{{first}}}{others}]",
            f"run_dir={run_dir}",
        ),
        *(*OWN, *overrides),
    ]


def at(server: Server) -> str:
    return f"path: '{server.url}', model: teacher"


def numbers(run_dir: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(m["loss"], m["grad_norm"], m["entropy"], m["tokens"]) for m in lines]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted((run_dir / "checkpoints/step-00000003").glob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def run(forked: Callable, ranks: int, *commands: list[str]) -> str:
    result = forked(ranks, WORKER, json.dumps(commands), timeout_s=200)
    assert f"exit codes {[0] * len(commands)}" in result.stdout, result.stdout[-3000:]
    return result.stdout


def test_the_same_as_a_teacher_whose_weights_are_here(
    start: Path, server: Server, forked: Callable, tmp_path: Path
) -> None:
    """Alone, and beside one whose weights are here; on one rank and on layouts: loss, norm of the gradient, weights."""
    here = f"path: {start / 'teacher'}"
    one, two = [tmp_path / name for name in ("here", "there")]
    both, four = tmp_path / "both", tmp_path / "four"
    run(forked, 1, command(start, one, here), command(start, two, at(server)))
    assert len(numbers(one)) == 3 and all(line[0] > 0.01 and line[1] > 0.01 for line in numbers(one))
    for served, local in zip(numbers(two), numbers(one), strict=True):
        assert served == pytest.approx(local, rel=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-5, atol=1e-5)
    sent = [body["prompt"] for _, _, body in server.asked]
    assert [type(prompt) for prompt in sent[:11]] == [str] * 9 + [list] * 2
    assert len(sent) <= 11 + 3 * 8  # of one teacher
    run(forked, 2, command(start, both, at(server), *CONTEXT, "train.steps=2"))
    run(forked, 4, command(start, four, at(server), *PIPELINE, "train.steps=2"))
    for layout in (both, four):
        for many, single in zip(numbers(layout), numbers(one)[:2], strict=True):
            assert many == pytest.approx(single, rel=1e-4)


def test_loss_and_every_gradient_are_those_of_the_local_teacher(
    start: Path, server: Server, teacher: Teacher, stub_job: Callable
) -> None:
    """Groups behind a shared prompt, of answers of unequal lengths, in which a tool wrote a token."""
    job = stub_job("distill", "rollout.temperature=1")
    g = torch.Generator().manual_seed(0)
    lists = torch.randint(0, 512, (6, 15), generator=g).tolist()
    groups = [[sample_of(lists[2 * i][:5], ids) for ids in (lists[2 * i][5:], lists[2 * i + 1][:4])] for i in range(3)]
    ask_samples(job.mesh, ServedModel(server.url, "teacher"), groups, "teacher_0", lambda sample: True)
    columns = ("teacher_0", "share_0")
    for sample in chain.from_iterable(groups):
        sample.columns["share_0"] = [1.0] * len(sample.ids)
    (batch,) = group_microbatches(stub_job("distill", "train.micro_batch_tokens=512"), groups, columns)
    (here,) = build_scorer(job, "distill.teacher", str(start / "teacher")).score([batch])
    torch.testing.assert_close(batch.extra["teacher_0"], here.logprobs, rtol=1e-5, atol=1e-5)
    assert batch.loss_mask.sum() == 3 * 14 - 6 and here.logprobs[batch.loss_mask].max() < 0
    found = {}
    for name, said in (("there", batch.extra["teacher_0"]), ("here", here.logprobs)):
        student = load_decoder(str(start / "student"), job.model, torch.float32)
        scores = scores_of(student, batch)
        loss, _ = sampled_loss(scores, replace(batch, extra={**batch.extra, "teacher_0": said}), teachers=1)
        loss.backward()
        found[name] = loss.detach(), {key: value.grad for key, value in student.named_parameters()}
    torch.testing.assert_close(found["there"][0], found["here"][0], rtol=1e-5, atol=1e-5)
    for key, gradient in found["here"][1].items():
        largest = gradient.abs().max().item()
        assert largest > 0 and (found["there"][1][key] - gradient).abs().max().item() <= 1e-5 * largest, key


def sample_of(prompt: list[int], ids: list[int]) -> Sample:
    """A sample of a student that gives each token 1/e; the third token is a tool's."""
    n = len(ids)
    return Sample(prompt, ids, [i != 2 for i in range(n)], [-1.0] * n, [0] * n, True)


def test_a_resumed_run_finds_its_teacher_at_another_address(
    start: Path, teacher: Teacher, forked: Callable, tmp_path: Path
) -> None:
    whole, again, layout = tmp_path / "whole", tmp_path / "again", ("parallel.dp_shard=2",)
    with serving(teacher) as server:
        run(forked, 2, command(start, whole, at(server), *layout, second=None))
    shutil.copytree(whole / "checkpoints/step-00000002", again / "checkpoints/step-00000002")
    with serving(teacher) as server:
        run(forked, 2, command(start, again, at(server), *layout, second=None))
        other = command(start, again, f"path: '{server.url}', model: big, name: teacher", *layout, second=None)
    with pytest.raises(ValueError, match=r"distill.teacher.model=\['big'\]: must stay \['teacher'\], with"):
        start_directory(load(other[1], other[2:]), RECIPES["distill"])
    assert numbers(again) == numbers(whole)[2:]
    assert all(weights(again)[name].equal(tensor) for name, tensor in weights(whole).items())


def test_a_run_ends_on_all_ranks_when_its_teacher_does(
    start: Path, server: Server, teacher: Teacher, forked: Callable, tmp_path: Path
) -> None:
    teacher.answers_left = 10 + 8 + 3
    words = command(start, tmp_path / "run", at(server), "rollout.placement=separate", "rollout.workers=1", second=None)
    done = forked(3, "llmtrain", *words, timeout_s=100)
    assert done.returncode == 1 and f'{server.url}/completions: status 500, {{"error"' in done.stdout, done.stdout[
        -3000:
    ]
    assert len(numbers(tmp_path / "run")) == 1 and "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"first_id": [1]}, None),
        ({"first_id": [1, 2]}, r"distill.teacher.teacher=http.*: its tokenizer gives .12345 .* the ids \[1, 2, "),
        ({"longest": 60}, r'completions: status 400, {"error": {"message": "longer than 60"}}'),
        ({"answers_left": 9}, "completions: status 500"),
    ],
)
def test_a_server_must_show_that_it_can_answer(
    start: Path,
    server: Server,
    teacher: Teacher,
    stub_job: Callable,
    change: dict[str, Any],
    fault: str | None,
) -> None:
    from llmtrain.recipes.distill import find_servers
    from llmtrain.trainer.environments import prompts_of

    words = command(start, start / "unused", at(server), "rollout.max_new_tokens=44")[2:]
    job = stub_job("distill", *[word for word in words if not word.startswith("run_dir=")])
    vars(teacher).update(change)
    prompts = prompts_of(job.config, job.config.data.train, job.tokenizer)
    if fault is None:
        assert list(find_servers(job, prompts)) == [0]
        lengths = sorted(len(body["prompt"][0]) for _, _, body in server.asked[9:])
        probe = job.tokenizer.encode(PROBE, parse_special=False)
        assert lengths == sorted([len(probe), max(map(len, prompts.ids)) + 44])
        return
    with pytest.raises((ValueError, OSError), match=fault):
        find_servers(job, prompts)


URL = "http://127.0.0.1:1/v1"
AT = f"path: '{URL}', model: teacher"


@pytest.mark.parametrize(
    ("first", "overrides", "expected"),
    [
        (
            AT,
            ["distill.on_policy=false", "distill.estimate=vocabulary"],
            r"teacher=http://127.0.0.1:1/v1: a server giv",
        ),
        (
            AT,
            ["distill.estimate=vocabulary"],
            r"not of the vocabulary; set distill.on_policy=true and distill.estimate",
        ),
        (
            AT,
            ["rollout.temperature=0.7"],
            r"rollout.temperature=0.7: must be 1 with distill.teacher.teacher, .*; set it",
        ),
        (
            AT,
            ["distill.server_deadline_s=30"],
            r"server_deadline_s=30: must be below half of engine.timeout_s=60, .*; lower it",
        ),
        (f"path: '{URL}', name: a", [], r"distill.teacher.a.model: must be set, .* name .*; GET /v1/models lists them"),
        (
            f"{AT}, token_env: NO_SUCH",
            [],
            r"distill.teacher.teacher.token_env=NO_SUCH: is not set in .*; export it, or",
        ),
        (
            f"{AT}, token_env: TWO_LINES",
            [],
            r"token_env=TWO_LINES: must hold printable ASCII in one line; correct what",
        ),
        ("path: 'http://me:word@host/v1', model: x", [], r"distill.teacher.x=http://host/v1: must be http://host:port"),
        (
            "path: 'http://host/v1?key=word', model: x",
            [],
            r"distill.teacher.x=http://host/v1: must be http.*; correct it",
        ),
        ("path: 'http://host:x/v1', model: x", [], r"distill.teacher.x=http://host:x/v1: must be http"),
        ("path: 'http:///v1', model: x", [], r"distill.teacher.x=http:///v1: must be http"),
        (
            "path: T, model: x",
            [],
            r"distill.teacher.teacher.model=x: is for a server, path=.*teacher is none; remove it",
        ),
        ("path: T, token_env: X", [], r"distill.teacher.teacher.token_env=X: is for a server, .*; remove it"),
    ],
)
def test_what_cannot_work_with_a_server_is_refused(
    start: Path, monkeypatch: pytest.MonkeyPatch, first: str, overrides: list[str], expected: str
) -> None:
    monkeypatch.setenv("TWO_LINES", "word\nword")
    words = command(start, start / "unused", first.replace("path: T", f"path: {start / 'teacher'}"), *overrides)
    with pytest.raises(ConfigError, match=expected) as found:
        check(load(words[1], words[2:]), 1, "distill")
    assert "word" not in str(found.value)


def test_what_works_is_planned_without_a_model_of_its_own(
    start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain import cli

    monkeypatch.setenv("TOKEN", "word")
    words = command(start, start / "unused", f"{AT}, token_env: TOKEN")
    check(load(words[1], words[2:]), 1, "distill")
    assert cli.main(["plan", *words[1:]]) == 0
    planned = capsys.readouterr().out
    assert "the frozen teacher other" in planned and "the frozen teacher teacher" not in planned
