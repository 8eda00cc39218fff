"""RAFT as a user runs it: equal to SFT on what was chosen, better from round to round, resumed, on several layouts."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.config.schema import RolloutConfig
from llmtrain.data.packing import Demonstrations
from llmtrain.engine.base import LossFn
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.recipes import raft
from llmtrain.trainer.gate import Gate
from llmtrain.trainer.job import Job
from llmtrain.trainer.replay import Replay
from llmtrain.types import IGNORE, Batch, Group, Sample, Scores, StepStats
from tests.recipes.stubs import StubEngine

WORKER = Path(__file__).parents[1] / "several_runs.py"


def scores_of(model: Decoder, batch: Batch) -> Scores:
    logits = model(batch.input_ids, batch.positions, batch.segment_ids, batch.ends).log_softmax(-1)
    logprobs = logits.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    entropies = -(logits.exp() * logits).sum(-1).detach()
    return Scores(*(torch.where(batch.loss_mask, x, 0.0) for x in (logprobs, entropies)))


class PlainEngine(StubEngine):
    """Keeps the loss and the gradient of every parameter of a plain decoder, which stays as it is."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(lambda batch: scores_of(model, batch))
        self.model, self.kept = model, []

    def score(self, batches: Sequence[Batch]) -> list[Scores]:
        with torch.no_grad():
            return super().score(batches)

    def train_step(
        self, microbatches: Sequence[Batch], loss: LossFn, denominator: torch.Tensor, position: int | None = None
    ) -> StepStats:
        self.model.zero_grad()
        total = sum(loss(self.scores(batch), batch)[0] for batch in microbatches) / float(denominator)
        total.backward()
        self.kept.append((float(total.detach()), {name: p.grad.clone() for name, p in self.model.named_parameters()}))
        with torch.no_grad():
            return super().train_step(microbatches, loss, denominator, position)


def sampled(batch: Batch) -> list[Group]:
    """The examples of unpacked rows as groups by prompt, each behind a wrong sample of the same prompt."""
    groups: dict[tuple[int, ...], Group] = {}
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        first = next(i for i, label in enumerate(labels) if label != IGNORE)
        prompt, answer = ids[: first + 1], [label for label in labels if label != IGNORE]
        group = groups.setdefault(tuple(prompt), [])
        for tokens, reward in (([9, 8, 7], 0.0), (answer, 1.0)):
            n = len(tokens)
            group.append(Sample(prompt, tokens, [True] * n, [-6.0] * n, [0] * n, True, reward=reward))
    return list(groups.values())


@pytest.mark.parametrize("pack", [False, True])
def test_equal_to_sft_on_the_chosen(stub_job: Callable[..., Job], tmp_path: Path, pack: bool) -> None:
    """Loss and every gradient, of two right answers a prompt, whose prompt is computed once here and twice there."""
    rows = [{"prompt": f"say {i % 4}:", "answer": f" {i % 4} {'x' * i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = stub_job("raft", "raft.minibatches=1", "rollout.max_logprob_gap=100.0", "train.micro_batch_seqs=1")
    model = Decoder(job.model)
    initialize(model, job.model, seed=0)
    demonstrations = Demonstrations(str(tmp_path / "rows.jsonl"), job.tokenizer, 64, seed=1, pack=pack)
    batch = demonstrations.batch(range(len(demonstrations)))
    expected = PlainEngine(model)
    expected.train_step([batch], token_loss, batch.loss_mask.sum())
    alone = Demonstrations(str(tmp_path / "rows.jsonl"), job.tokenizer, 64, seed=1, pack=False)
    groups = sampled(alone.batch(range(8)))
    assert [len(group) for group in groups] == [4] * 4
    job.engines["policy"] = found = PlainEngine(model)
    chosen = raft.choose(groups, job.config.raft)
    raft.update(job, chosen, 0, Replay(job), Gate(RolloutConfig(max_logprob_gap=100.0), "fp32", job.mesh))
    ((loss, gradients),), ((loss_here, gradients_here),) = expected.kept, found.kept
    assert loss_here == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert float((gradients_here[name] - gradient).norm() / gradient.norm()) < 1e-6, name


SETTINGS = (
    *("train.steps=3", "rewards=[{name: first_integer}]", "raft.prompts_per_step=8", "raft.minibatches=2"),
    *("raft.epochs=2", "rollout.group_size=8", "rollout.max_new_tokens=24", "checkpoint.every_steps=2"),
    *("optim.lr=1e-3", "optim.schedule=constant", "train.micro_batch_seqs=4"),
)
SEPARATE = ("rollout.placement=separate", "rollout.workers=1")
LAYOUT = ("parallel.pp=2", "parallel.tp=2")


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(run_dir: Path) -> list[tuple[float, ...]]:
    """What does not depend on the clock."""
    return [(m["loss"], m["grad_norm"], m["reward_mean"], m["kept_fraction"], m["lr"]) for m in metrics(run_dir)]


@pytest.fixture(scope="module")
def start(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration, problems answered by a digit, and an untrained Hugging Face model."""
    from llmtrain.config.load import load
    from llmtrain.model.decoder import init_tensor, parameter_shapes
    from llmtrain.model.hf_write import save_hf
    from tests.small_run import DOCUMENT

    base = tmp_path_factory.mktemp("raft")
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    problems = [{"prompt": f"say {i % 3} {'x' * (i % 5)}:", "answer": str(i % 3)} for i in range(16)]
    (base / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    config = load(str(base / "small.yaml"), []).model
    weights = ((name, init_tensor(name, shape, config, 0)) for name, shape in parameter_shapes(config).items())
    save_hf(str(base / "hf"), config, weights, torch.float32, str(small_data / "tokenizer"), 1)
    return base


@pytest.fixture(scope="module")
def run(start: Path) -> Callable:
    """run(ranks, {run directory: overrides}) -> CompletedProcess of `llmtrain raft` with each, by the same ranks."""
    from tests.forked import run_forked

    def launch(ranks: int, runs: dict[Path, tuple[str, ...]]) -> subprocess.CompletedProcess[str]:
        paths = (f"model={json.dumps({'init_from': str(start / 'hf')})}", f"data.train={start / 'problems.jsonl'}")
        arguments = [
            ["raft", str(start / "small.yaml"), *paths, f"run_dir={run_dir}", *SETTINGS, *overrides]
            for run_dir, overrides in runs.items()
        ]
        return run_forked(ranks, WORKER, json.dumps(arguments), timeout_s=240)

    return launch


def assert_good(result: subprocess.CompletedProcess[str], runs: int) -> None:
    assert f"exit codes {[0] * runs}" in result.stdout, result.stdout[-3000:]


def interrupted(run_dir: Path, other: Path) -> Path:
    """Another run directory that holds what a run had saved after its second step."""
    shutil.copytree(run_dir / "checkpoints/step-00000002", other / "checkpoints/step-00000002")
    return other


def assert_same_bits(run_dir: Path, resumed: Path) -> None:
    assert numbers(resumed) == numbers(run_dir)[2:]
    files = list((run_dir / "checkpoints/step-00000003").glob("*.safetensors"))
    for file in files:
        again = load_file(resumed / "checkpoints/step-00000003" / file.name)
        assert all(again[name].equal(tensor) for name, tensor in load_file(file).items())
    assert files


@pytest.fixture(scope="module")
def separate(run: Callable, start: Path) -> Path:
    """Two trainers and one rollout worker."""
    assert_good(run(3, {start / "separate": SEPARATE}), 1)
    return start / "separate"


def test_resumed_bit_for_bit_with_a_worker(separate: Path, run: Callable, tmp_path: Path) -> None:
    lines = metrics(separate)
    assert [line["step"] for line in lines] == [1, 2, 3] == [line["weight_version"] for line in lines]
    assert all(line["logprob_gap_max"] < 1e-4 for line in lines)  # fp32: generator and trainer agree
    assert all(0 < line["kept_fraction"] == line["reward_mean"] < 1 for line in lines)
    assert_good(run(3, {interrupted(separate, tmp_path / "resumed"): SEPARATE}), 1)
    assert_same_bits(separate, tmp_path / "resumed")


def test_a_pipeline_does_the_same_and_is_resumed_bit_for_bit(separate: Path, run: Callable, tmp_path: Path) -> None:
    """Four ranks that sample in turn; with replay and the clipped losses it runs there too."""
    more = ("data.replay_seqs=4", "train.seq_len=256", "train.steps=1", "raft.mismatch=truncate")
    whole = tmp_path / "whole"
    assert_good(run(4, {whole: LAYOUT}), 1)
    for here, there in zip(numbers(whole), numbers(separate), strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-6)  # same tokens: only the order of sums differs
    runs = {interrupted(whole, tmp_path / "resumed"): LAYOUT}
    runs |= {tmp_path / name: (*LAYOUT, *more, f"raft.variant={name}") for name in ("raft++", "reinforce-rej")}
    assert_good(run(4, runs), 3)
    assert_same_bits(whole, tmp_path / "resumed")
    for name in ("raft++", "reinforce-rej"):
        lines = metrics(tmp_path / name)
        assert all(5 < line["replay_loss"] < 7 and 0 <= line["clip_fraction"] < 1 for line in lines)  # about ln 512
        assert all(line["mismatch_weight"] == pytest.approx(1.0, abs=1e-4) for line in lines)  # fp32: the same numbers


def test_reward_rises_from_round_to_round(run: Callable, start: Path, tmp_path: Path) -> None:
    """All problems have one answer, which the untrained policy gives now and then."""
    problems = tmp_path / "one.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"say{'.' * i}", "answer": "7"}) + "\n" for i in range(16)))
    more = (f"data.train={problems}", "train.steps=4", "rollout.group_size=32", "optim.lr=1e-2", "raft.minibatches=4")
    assert_good(run(1, {tmp_path / "run": more}), 1)
    rewards = [line["reward_mean"] for line in metrics(tmp_path / "run")]
    assert rewards == sorted(rewards) and rewards[0] < 0.1 and rewards[-1] > 0.4, rewards


def test_adapters_learn_on_any_layout(run: Callable, tmp_path: Path) -> None:
    adapted = ("model.lora={rank: 2}", "train.steps=2")
    assert_good(run(1, {tmp_path / "one": adapted}), 1)
    assert_good(run(4, {tmp_path / "four": (*adapted, *LAYOUT)}), 1)
    assert any(line[1] > 0 for line in numbers(tmp_path / "one"))
    for here, there in zip(numbers(tmp_path / "four"), numbers(tmp_path / "one"), strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-6)
