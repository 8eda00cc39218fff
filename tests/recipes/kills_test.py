"""Each recipe as a process that is killed at random moments, started again until it ends: as if it had not been."""

from __future__ import annotations

import json
import math
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmtrain.checkpoint.manifest import list_checkpoints, read_manifest
from llmtrain.config.recipes import RECIPES
from llmtrain.observe.metrics import read_lines
from tests.forked import run_killed

ON_DEVICE = ("peak_bytes",)  # with all that ends in _s, what depends on the machine and its clock
RECORDS = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
LIMIT_S = 150  # of a run that nobody disturbs
EVERY_STEP = ("checkpoint.every_steps=1", "checkpoint.background=true")
SAMPLED = ("rewards=[{name: first_integer}]", "rollout.max_new_tokens=16", "train.steps=6")
HELD_OUT = ("train.eval_every_steps=4",)
TEACHER = "distill.teacher={base}/teacher"
OWN = "rewards=[{function: '{base}/mine.py:score'}]"  # which runs in processes of its own, in the sandbox
SEPARATE = ("rollout.placement=separate", "rollout.workers=1")


@dataclass(frozen=True)
class Job:
    """What `llmtrain COMMAND` is given beside what all have."""

    command: str
    rows: str  # the name of a file of rows
    overrides: tuple[str, ...]
    head: str = "lm"
    ranks: int = 1


CRITIC = ("ppo.prompts_per_step=8", "ppo.epochs=2", "ppo.critic_warmup_steps=1", "ppo.kl_coef=0.05")
CRITIC += ("ppo.kl_target=0.01", "ppo.kl_horizon=100", "rollout.group_size=1", "ppo.mismatch=truncate")
GROUPS = ("grpo.prompts_per_step=4", "grpo.minibatches=2", "grpo.dynamic_rounds=2", "grpo.epochs=2")
GROUPS += ("grpo.mismatch=truncate",)
JOBS = {
    "pretrain": Job("pretrain", "sums", (*HELD_OUT, "train.batch_ramp=[{from_tokens: 1024, global_batch_seqs: 16}]")),
    "sft": Job("sft", "sums", (*HELD_OUT, "data.replay_seqs=4", "train.micro_batch_tokens=256")),
    "reward": Job("reward", "pairs", HELD_OUT, head="scalar"),
    "dpo": Job("dpo", "pairs", (*HELD_OUT, *EVERY_STEP, "dpo.reference=precomputed")),
    "dpo with adapters": Job("dpo", "pairs", ('model.lora={"rank": 4}',)),
    "raft": Job("raft", "problems", (*SAMPLED, OWN, "raft.prompts_per_step=8", "raft.minibatches=2", "raft.epochs=2")),
    "grpo": Job("grpo", "problems", (*SAMPLED, *GROUPS, "grpo.kl_coef=0.1", "data.replay_seqs=4")),
    "grpo with a worker": Job("grpo", "problems", (*SAMPLED, *GROUPS, *SEPARATE), ranks=3),
    "ppo": Job("ppo", "problems", (*SAMPLED, *CRITIC, *EVERY_STEP)),
    "ppo on four ranks": Job(
        "ppo", "problems", (*SAMPLED, *CRITIC, "checkpoint.every_steps=1", "parallel.pp=2", "parallel.tp=2"), ranks=4
    ),
    "distill": Job("distill", "sums", (*HELD_OUT, TEACHER, "distill.top_k=16")),
    "distill on own samples": Job(
        "distill", "problems", (*SAMPLED, TEACHER, "distill.on_policy=true", "distill.prompts_per_step=8")
    ),
}


@pytest.fixture(scope="module")
def base(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration, the models `start` and `teacher`, and a file of each kind of rows."""
    from tests.small_run import DOCUMENT

    base = tmp_path_factory.mktemp("kills")
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    for seed, name in enumerate(("start", "teacher")):
        save_model(base, name, small_data / "tokenizer", seed)
    (base / "mine.py").write_text("def score(completion, example):\n    return float('e' in completion)\n")
    problems = [{"prompt": f"say {i % 3} {'x' * (i % 5)}:", "answer": str(i % 3)} for i in range(32)]
    pairs = [{"prompt": f"say {i % 9} {'x' * (i % 5)}:", "chosen": str(i % 9), "rejected": "9 and"} for i in range(48)]
    sums = (small_data / "shards/sums-train.jsonl").read_text().splitlines()
    rows = {"problems": problems, "pairs": pairs, "sums": [json.loads(line) for line in sums]}
    for name, lines in rows.items():
        (base / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_killed(1, "llmtrain", "--help", after_s=LIMIT_S)  # so that what processes are forked from is there
    return base


def save_model(base: Path, name: str, tokenizer: Path, seed: int) -> None:
    """Writes a Hugging Face directory with random values."""
    import torch

    from llmtrain.config.load import load
    from llmtrain.model.decoder import init_tensor, parameter_shapes
    from llmtrain.model.hf_write import save_hf

    config = load(str(base / "small.yaml"), []).model
    shapes = parameter_shapes(config)
    weights = ((name, init_tensor(name, shape, config, seed)) for name, shape in shapes.items())
    save_hf(str(base / name), config, weights, torch.float32, str(tokenizer), 1)


def arguments(job: Job, base: Path, run_dir: Path) -> list[str]:
    rows, document = base / f"{job.rows}.jsonl", str(base / "small.yaml")
    start = [f"model.init_from={base / 'start'}"] * RECIPES[job.command].starts_trained
    more = [f"data.train={rows}", f"data.held_out={rows}", f"model.head={job.head}", "train.steps=16"]
    own = [override.replace("{base}", str(base)) for override in ("checkpoint.every_steps=2", *job.overrides)]
    return [job.command, document, f"run_dir={run_dir}", *start, *more, *own]


def traces(run_dir: Path) -> tuple[int, set[tuple[str, int]]]:
    """How many steps stand in metrics.jsonl, the last of which may have been cut short, and what unfinished saves
    left."""
    path, checkpoints = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    steps = len(path.read_text().splitlines()) if path.exists() else 0
    unfinished = [*checkpoints.glob("*.tmp"), *checkpoints.glob("*.trash")]
    return steps, {(each.name, each.stat().st_mtime_ns) for each in unfinished}


def phase(run_dir: Path, before: tuple[int, set[tuple[str, int]]]) -> str:
    """What a process was doing when it was killed, that had found the traces `before`."""
    steps, unfinished = traces(run_dir)
    if unfinished - before[1]:
        return f"saving, after step {steps}"
    return f"starting, at step {steps}" if steps <= before[0] else f"after step {steps}"


def recorded(run_dir: Path) -> dict[str, list[dict]]:
    """All lines of the records, without what depends on the clock."""
    files = {name: read_lines(str(run_dir / name)) for name in RECORDS if (run_dir / name).exists()}
    return {name: [dict(filter(lasting, line.items())) for line in lines] for name, lines in files.items()}


def lasting(item: tuple[str, object]) -> bool:
    return not item[0].endswith("_s") and item[0] not in ON_DEVICE


def held(run_dir: Path) -> dict[str, str]:
    """Checksums of the last checkpoint: weights, moments and random state of every rank."""
    newest = list_checkpoints(str(run_dir / "checkpoints"))[-1]
    files = read_manifest(newest)
    return {f"{Path(newest).name}/{name}": files[name]["sha256"] for name in files if name.startswith("rank-")}


def disturbed(job: Job, base: Path, run_dir: Path, moments_s: Iterator[float]) -> list[str]:
    """Runs to the end, killed at each of these moments after a start as long as there are any. Returns the phases."""
    phases: list[str] = []
    while True:
        before, moment_s = traces(run_dir), next(moments_s, None)
        done = run_killed(job.ranks, "llmtrain", *arguments(job, base, run_dir), after_s=moment_s or LIMIT_S)
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 0, done.stdout[-3000:]
            return phases
        assert moment_s is not None, done.stdout[-3000:]
        phases.append(phase(run_dir, before))


def assert_kills_change_nothing(name: str, base: Path, place: Path, kills: int) -> None:
    """Kills the job so many times, which may take several runs, at moments drawn uniformly over the time that one takes
    which nobody disturbs. Each ends as that one, bit for bit."""
    job, draw, whole = JOBS[name], random.Random(name), place / "whole"
    duration_s, phases, number = math.inf, [], 0
    while len(phases) < kills:
        run_dir, began = place / f"killed-{number}" if number else whole, time.monotonic()
        left = kills - len(phases) if number else 0
        found = disturbed(job, base, run_dir, (draw.uniform(0, duration_s) for _ in range(left)))
        if not found:  # the first run, and one that was faster than it
            duration_s = min(duration_s, time.monotonic() - began)
        assert recorded(run_dir) == recorded(whole) and held(run_dir) == held(whole), found
        phases, number = phases + found, number + 1
    lines = recorded(whole)["metrics.jsonl"]
    assert len(lines) in (6, 16) and any(line["grad_norm"] > 0 for line in lines) and held(whole)
    print(f"{name}: {duration_s:.1f} s; {number - 1} runs with {len(phases)} kills: {'; '.join(phases)}")


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_few_kills_change_nothing(base: Path, tmp_path: Path, name: str) -> None:
    assert_kills_change_nothing(name, base, tmp_path, kills=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", JOBS)
def test_kills_change_nothing_in_any_recipe(base: Path, tmp_path: Path, name: str) -> None:
    assert_kills_change_nothing(name, base, tmp_path, kills=10)


def test_every_recipe_is_killed() -> None:
    assert {job.command for job in JOBS.values()} == set(RECIPES)
