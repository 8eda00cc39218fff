"""What a probe and what checksums find: generators that are wrong in one way each, against a trainer's own scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.load import load
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.engine.precision import compute_dtype
from llmtrain.model.decoder import Decoder, init_tensor, initialize, parameter_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import inputs_of
from llmtrain.rollout import native
from llmtrain.rollout.native import NativeGenerator
from llmtrain.trainer.gate import Disagreement
from llmtrain.trainer.verify import compare_checksums, load_verified, probe, probe_prompts
from llmtrain.types import Batch, Prompt, Sampling, Scores
from tests.recipes.conftest import one_rank  # noqa: F401  a fixture

WRONG = "layers.2.feedforward.down.weight"


class Trainer:
    """Scores with a model, and gives its weights, as an engine of one rank does."""

    def __init__(self, model: Decoder) -> None:
        self.model = model

    @torch.no_grad()
    def score(self, batches: Sequence[Batch]) -> list[Scores]:
        return [Scores(*self.model(b.input_ids, **inputs_of(b, True))) for b in batches]

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        own = self.model.state_dict().items()
        return ((name, x) for name, x in own if name != "head.weight" or not self.model.config.tie_embeddings)

    @torch.no_grad()
    def update(self) -> None:
        """Moves every weight by up to a thousandth, as a step with this learning rate does."""
        for p in self.model.parameters():
            p.add_(1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).sign())


class Stale(NativeGenerator):
    """Takes the first weights alone, and says that it has the newest."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if version == 0:
            return super().load_weights(weights, version)
        for _ in weights:
            pass
        self.version = version


class Late(Stale):
    """Keeps the first weights, and says so."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        super().load_weights(weights, version)
        self.version = 0


class OneTensor(NativeGenerator):
    """Loses one tensor on the way."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        super().load_weights(((n, torch.zeros_like(x) if n == WRONG else x) for n, x in weights), version)


class OneBit(NativeGenerator):
    """Has one number of one tensor wrong, in its last bit."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        super().load_weights(weights, version)
        flat = (
            self.model.get_parameter(WRONG)
            .detach()
            .view(torch.int32 if self.model.norm.weight.dtype == torch.float32 else torch.int16)
        )
        flat[3, 5] ^= 1


class PackedHead(NativeGenerator):
    """Computes logits by a copy of the first head, whatever comes later, as an engine that packs weights may."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        super().load_weights(weights, version)
        if version == 0:
            packed = self.model.head.weight.detach().clone()
            self.model.head.forward = lambda x, *more: x @ packed.T


class OldPrefixes(NativeGenerator):
    """Keeps what prompts begin with from call to call, by their tokens, and does not drop it with the weights."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list:
        common = native.Decoding._common

        def kept(decoding: native.Decoding, rows: Sequence[list[int]]) -> native.Stem | None:
            key = tuple(min(rows))
            stems = self.__dict__.setdefault("stems", {})
            stems[key] = stems.get(key) or common(decoding, rows)
            return stems[key]

        native.Decoding._common = kept
        try:
            return super().generate(prompts, sampling)
        finally:
            native.Decoding._common = common


@pytest.fixture
def start(small: Path, small_data: Path, one_rank: Mesh) -> Callable[..., Any]:  # noqa: F811
    """start(generator class, *overrides) -> a job whose generator has the weights of version 0, verified."""

    def make(kind: type[NativeGenerator], *overrides: str) -> Any:
        config = load(str(small), ["rollout.temperature=0.7", *overrides])
        resolved = resolve_model(config.model)
        dtype = compute_dtype(config.engine.precision)
        own, theirs = (Decoder(resolved).to(dtype) for _ in range(2))
        initialize(own, resolved, 1)
        tokenizer = load_tokenizer(str(small_data / "tokenizer"))
        job = SimpleNamespace(config=config, model=resolved, mesh=one_rank, tokenizer=tokenizer, engine=Trainer(own))
        job.generator = kind(theirs, 8, "cpu", config.train.seq_len)
        return job

    return make


def synced(job: Any, version: int) -> None:
    load_verified(job, job.engine.full_weights(), version)


def updated(job: Any) -> None:
    """Syncs the first weights, takes a step and syncs again."""
    synced(job, 0)
    job.engine.update()
    synced(job, 1)


@pytest.mark.parametrize("verify", ["probe", "checksum"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_right_generator_passes(start: Callable[..., Any], verify: str, precision: str) -> None:
    job = start(NativeGenerator, f"rollout.verify={verify}", f"engine.precision={precision}")
    updated(job)
    assert job.generator.version == 1


def test_the_probe_takes_the_path_of_samples(start: Callable[..., Any]) -> None:
    """Two prompts that differ in their last token alone: one forward of 39 tokens, one of two rows of a token each,
    one step of the cache with four samples of both."""
    job, shapes = start(NativeGenerator), []
    block = job.generator.model.layers["0"]
    block.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape[:2])))
    synced(job, 0)
    assert shapes == [(1, 39), (2, 1), (8, 1)]


def test_prompts_are_as_long_as_rows_allow(start: Callable[..., Any]) -> None:
    first, second = probe_prompts(start(NativeGenerator))
    assert len(first.ids) == len(second.ids) == 40
    assert first.ids[:-1] == second.ids[:-1] and first.ids != second.ids
    short = start(NativeGenerator, "train.seq_len=12", "rollout.max_new_tokens=8")
    assert [len(prompt.ids) for prompt in probe_prompts(short)] == [10, 10]
    synced(short, 0)


def test_each_copy_gets_both_prompts(start: Callable[..., Any]) -> None:
    """Prompt i goes to copy i modulo 3."""
    job = start(NativeGenerator, "rollout.placement=separate", "rollout.workers=3")
    prompts = probe_prompts(job)
    assert [[p.ids for p in prompts[copy::3]] for copy in range(3)] == [[prompts[0].ids, prompts[-1].ids]] * 3


FOUND = {
    # by the probe, by checksums: the first tensor that they name, and how many
    Stale: (True, ("embed.weight", 38)),
    OneTensor: (True, (WRONG, 1)),
    OneBit: (False, (WRONG, 1)),
    PackedHead: (True, None),
    OldPrefixes: (True, None),
}


@pytest.mark.parametrize("kind", FOUND)
def test_who_finds_what(start: Callable[..., Any], kind: type[NativeGenerator]) -> None:
    by_probe, by_checksums = FOUND[kind]
    job = start(kind, "rollout.verify=off")
    job.generator.load_weights(job.engine.full_weights(), 0)
    job.generator.generate(probe_prompts(job), Sampling(2, 4))  # keeps prefixes, where any are kept
    job.engine.update()
    sent = dict(NativeGenerator(job.engine.model, 1, "cpu").checksums()[0])
    job.generator.load_weights(job.engine.full_weights(), 1)
    if by_probe:
        with pytest.raises(Disagreement, match=r"version 1 were sent, .* differ by [\d.]+ .*max_logprob_gap=0.001: "):
            probe(job, 1)
    else:
        probe(job, 1)
    if by_checksums:
        told = rf"version 1 as .* first in {by_checksums[0]} of copy 0 \({by_checksums[1]} tensors differ there\)"
        with pytest.raises(Disagreement, match=told):
            compare_checksums(job, sent, 1)
    else:
        compare_checksums(job, sent, 1)


@pytest.mark.parametrize("kind", FOUND)
def test_checksum_is_both_and_finds_each(start: Callable[..., Any], kind: type[NativeGenerator]) -> None:
    job = start(kind, "rollout.verify=checksum")
    with pytest.raises(Disagreement, match=r"rollout.verify=checksum"):
        updated(job)


def test_a_probe_finds_in_bf16_what_is_above_its_limit(start: Callable[..., Any]) -> None:
    """A limit of 1 nat lets weights pass that are old by one step; checksums do not."""
    updated(start(Stale, "engine.precision=bf16"))
    with pytest.raises(Disagreement, match="differ by"):
        updated(start(Stale, "engine.precision=bf16", "rollout.max_logprob_gap=0.02"))
    with pytest.raises(Disagreement, match=r"embed.weight of copy 0 \(29 tensors"):  # 9 norms: 1.001 is 1 in bf16
        updated(start(Stale, "engine.precision=bf16", "rollout.verify=checksum"))


def test_a_version_that_is_old_is_found_by_name(start: Callable[..., Any]) -> None:
    with pytest.raises(Disagreement, match="samples with weights of version 0 after those of version 1 were sent"):
        updated(start(Late, "rollout.max_logprob_gap=100"))


def test_numbers_that_are_none_are_a_gap(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    job = start(NativeGenerator)
    nan = torch.tensor(torch.nan)
    monkeypatch.setattr(job.engine, "score", lambda batches: [Scores(nan.expand(b.labels.shape)) for b in batches])
    with pytest.raises(Disagreement, match="differ by inf"):
        synced(job, 0)


def test_off_compares_nothing(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    job = start(Stale, "rollout.verify=off")
    monkeypatch.setattr(job.engine, "score", None)
    monkeypatch.setattr(job.generator, "generate", None)
    monkeypatch.setattr(job.generator, "checksums", None)
    updated(job)


LETTERS = "def score(completion, example):\n    return completion.count('e') / max(1, len(completion))\n"


@pytest.fixture
def untrained(small: Path, small_data: Path, tmp_path: Path) -> list[str]:
    """Returns the arguments of a run of two steps from random weights, rewarded for the letter e."""
    model = resolve_model(load(str(small), []).model)
    weights = ((name, init_tensor(name, shape, model, 0)) for name, shape in parameter_shapes(model).items())
    save_hf(str(tmp_path / "hf"), model, weights, torch.float32, str(small_data / "tokenizer"), 1)
    (tmp_path / "mine.py").write_text(LETTERS)
    rewards = [{"function": f"{tmp_path}/mine.py:score", "unsandboxed": True}]
    start = (f"model={json.dumps({'init_from': str(tmp_path / 'hf')})}", f"rewards={json.dumps(rewards)}")
    return ["grpo", str(small), *start, "train.steps=2", "optim.warmup_steps=0", "checkpoint.every_steps=0"]


def test_workers_are_compared_across_the_link(untrained: list[str], tmp_path: Path, forked: Callable) -> None:
    """One trainer, two workers, of which the second may take no weights after the first. A run in which nothing is
    wrong has the same numbers whether or not it is verified."""
    runs = {"off": False, "checksum": False, "probe stale": True, "checksum stale": True}

    def arguments(name: str) -> list[str]:
        own = (f"run_dir={tmp_path / name}", f"rollout.verify={name.split()[0]}")
        return [*untrained, "rollout.placement=separate", "rollout.workers=2", *own]

    asked = json.dumps([[stale, arguments(name)] for name, stale in runs.items()])
    done = forked(3, Path(__file__).with_name("verify_worker.py"), asked, timeout_s=120)
    assert "exit codes [0, 0, 1, 1]" in done.stdout, done.stdout[-4000:]
    assert "after weights of version 1 were sent, generator and trainer differ by" in done.stdout
    assert "first in embed.weight of copy 1 (38 tensors differ there), of 2 copies" in done.stdout

    def numbers(name: str) -> list[tuple[float, ...]]:
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [tuple(line[key] for key in ("loss", "grad_norm", "reward_mean", "logprob_gap_max")) for line in lines]

    assert len(numbers("off")) == 2 and all(grad_norm > 0 for _, grad_norm, *_ in numbers("off"))
    assert numbers("off") == numbers("checksum")  # which probes too
