"""What distillation hands to student, teachers, generator and gate, in absolute values. Divergences have tests of their
own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrain.config.recipes import RECIPES
from llmtrain.data.mix import MixSettings
from llmtrain.data.packing import Demonstrations, TextRows
from llmtrain.recipes import distill
from llmtrain.trainer import rollouts
from llmtrain.trainer.gate import Disagreement
from llmtrain.trainer.job import Job
from llmtrain.trainer.served import PROBE
from llmtrain.types import Batch, Prompt, Scores
from tests.recipes.conftest import run_steps
from tests.recipes.stubs import LR, NORM, StubGenerator, StubScorer

V = 512
STUDENT, TEACHER, OTHER = {0: 0.5, 1: 0.25, 2: 0.125}, {1: 0.5, 0: 0.25, 3: 0.125}, {3: 0.5, 1: 0.25, 0: 0.125}
LN2 = math.log(2)


def logprobs_of(likely: dict[int, float]) -> torch.Tensor:
    """Log-probs of the vocabulary: those given, and what is left for all others alike."""
    rest = (1 - sum(likely.values())) / (V - len(likely))
    return torch.tensor([likely.get(i, rest) for i in range(V)]).log()


def says(likely: dict[int, float], shift: float = 0.0) -> Callable[[Batch], Scores]:
    """Returns scores of a model that says the same everywhere; of what a generator sampled, its log-probs + `shift`."""
    table = logprobs_of(likely)

    def scores(batch: Batch) -> Scores:
        there = batch.labels >= 0
        own = table[batch.labels.clamp(min=0)] + shift
        logprobs = torch.where(there, batch.extra.get("old_logprobs", own - shift) + shift, 0.0)
        result = Scores(logprobs, torch.where(there, 2.0, 0.0))
        if batch.top_k:
            best, ids = table.topk(batch.top_k)
            shape = (*there.shape, batch.top_k)
            result.candidates, result.candidate_ids = best.expand(shape).clone(), ids.expand(shape).clone()
        elif batch.candidates is not None:
            result.candidates = table[batch.candidates]
        return result

    return scores


class StubTeacher(StubScorer):
    """Scores by a function; remembers its moves."""

    def __init__(self, likely: dict[int, float]) -> None:
        super().__init__(says(likely))
        self.moves: list[str] = []

    def score(self, batches: list[Batch]) -> list[Scores]:
        self.moves.append("score")
        return super().score(batches)

    def to_host(self) -> None:
        self.moves.append("host")

    def to_device(self) -> None:
        self.moves.append("device")


class StubServer:
    """Stands for a server: gives each token the log-prob -1.5, but the second of a prompt -1, and texts the student's
    ids. Keeps what it was asked."""

    def __init__(self, encode: Callable[[str], list[int]], *where: object) -> None:
        self.encode, self.where, self.asked, self.texts = encode, where, [], []

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        self.asked.append(sequences)
        return [[-1.0, *[-1.5] * (len(ids) - 2)] for ids in sequences]

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        self.texts += texts
        return [self.encode(text) for text in texts]


class Run:
    """A job of distillation with stubs: the teachers by name, what each step returned, what was built."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job, self.engine, self.steps, self.totals = job, job.engine, [], []
        self.engine.scores = says(STUDENT)
        self.teachers = {"one": StubTeacher(TEACHER), "two": StubTeacher(OTHER)}
        self.built: list[tuple[str, str]] = []
        self.servers: list[StubServer] = []
        self.generator = StubGenerator(self.answers, job.tokenizer.eos_id)
        stubs = {
            "join": lambda config, recipe: job,
            "train": run_steps(self.steps),
            "build_engine": lambda job, updates: self.totals.append(updates),
            "build_scorer": self.scorer,
            "ServedModel": self.server,
            "shutdown": lambda: None,
        }
        for name, stub in stubs.items():
            monkeypatch.setattr(distill, name, stub)
        monkeypatch.setattr(rollouts, "build_generator", lambda job: self.generator)

    def scorer(self, job: Job, key: str, path: str) -> StubTeacher:
        self.built.append((key, path))
        return self.teachers[path]

    def server(self, *where: object) -> StubServer:
        self.servers.append(StubServer(lambda text: self.job.tokenizer.encode(text, parse_special=False), *where))
        return self.servers[-1]

    def answers(self, prompt: Prompt) -> list[list[int]]:
        """Five tokens, and three that are cut short."""
        return [[8, 9, 8, 9, self.job.tokenizer.eos_id], [8, 9, 8]]

    def go(self) -> Run:
        distill.main(self.job.config)
        return self

    def taken(self, step: int) -> list[list[int]]:
        """The ids of all rows of an update, in order."""
        return [row for batch in self.engine.updates[step][0] for row in batch.input_ids.tolist()]


@pytest.fixture
def start(stub_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """start(*overrides) -> Run, ready to go: one teacher, two candidates, two steps."""

    def make(*overrides: str) -> Run:
        settings = ("distill.teacher=one", "distill.top_k=2", "train.steps=2")
        return Run(stub_job("distill", *settings, *overrides), monkeypatch)

    return make


def rows_of(job: Job, turn: int) -> list[list[int]]:
    """The eight rows of a turn, in the order of the seed (1), as wide as the longest needs."""
    rows, samples = Demonstrations(job.config.data.train, job.tokenizer, 64, seed=1), range(8 * turn, 8 * turn + 8)
    longest = max(len(rows.row(sample)["labels"]) for sample in samples)
    return rows.batch(samples, -(-longest // 16) * 16).input_ids.tolist()


def trained(batches: list[Batch]) -> int:
    return sum(int(batch.loss_mask.sum()) for batch in batches)


TWO = "distill.teacher=[{path: one, weight: 1}, {path: two, weight: 3}]"
ON_POLICY = (
    *("distill.on_policy=true", "distill.prompts_per_step=4", "rollout.group_size=2", "rollout.max_new_tokens=7"),
    *("rollout.temperature=0.8", "rewards=[]"),
)


def test_a_step_on_given_rows(start: Callable[..., Run]) -> None:
    """Forward KL over the teacher's two likeliest and the rest: 1/2 ln 2 - 1/4 ln 2 + 1/4 ln (1/4 / 1/4)."""
    run = start("distill.temperature=2.0").go()
    assert run.totals == [2] and run.built == [("distill.teacher.one", "one")] and len(run.steps) == 2
    for step, (metrics, tokens) in enumerate(run.steps):
        batches, denominator, _ = run.engine.updates[step]
        assert [len(batch.input_ids) for batch in batches] == [2] * 4 and tokens == 8 * 64
        assert run.taken(step) == rows_of(run.job, step)
        assert denominator == trained(batches) > 0 and {batch.temperature for batch in batches} == {2.0}
        assert all((batch.candidates == torch.tensor([1, 0])).all() for batch in batches)
        assert metrics == pytest.approx(
            {
                **{"loss": 0.25 * LN2, "grad_norm": NORM, "lr": LR, "entropy": 2.0},
                **{"teacher_covered": 0.75, "student_covered": 0.75},
            },
            rel=1e-5,
        )
    asked = run.teachers["one"].scored
    assert [{(batch.top_k, batch.temperature) for batch in batches} for batches in asked] == [{(2, 2.0)}] * 2
    assert run.engine.scored == []


def test_one_teacher_is_asked_once_a_step_for_its_own_candidates(start: Callable[..., Run]) -> None:
    assert len(start().go().teachers["one"].scored) == 2


def test_the_reverse_kl_is_over_the_likeliest_of_the_student(start: Callable[..., Run]) -> None:
    """Token 2, which the student likes and the teacher does not, is there; the teacher's 3 is not."""
    run = start("distill.divergence=reverse", "distill.top_k=3").go()
    rest = (1 - 0.875) / (V - 3)
    expected = 0.5 * LN2 - 0.25 * LN2 + 0.125 * math.log(0.125 / rest) + 0.125 * math.log(0.125 / (0.25 - rest))
    assert [metrics["loss"] for metrics, _ in run.steps] == pytest.approx([expected] * 2, rel=1e-4)
    for scored in run.engine.scored:
        assert {batch.top_k for batch in scored} == {3}
    for scored in run.teachers["one"].scored:
        assert {batch.top_k for batch in scored} == {0} and scored[0].candidates[0, 0].tolist() == [0, 1, 2]
    assert len(run.engine.scored) == len(run.teachers["one"].scored) == 2


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("top_k", [0, V, 600])
def test_the_whole_vocabulary(start: Callable[..., Run], kind: str, top_k: int) -> None:
    run = start(f"distill.divergence={kind}", f"distill.top_k={top_k}", "distill.beta=0.25", "train.steps=1").go()
    s, t = logprobs_of(STUDENT).double(), logprobs_of(TEACHER).double()
    m = (0.75 * s.exp() + 0.25 * t.exp()).log()
    forward, reverse = (t.exp() * (t - s)).sum(), (s.exp() * (s - t)).sum()
    jsd = 0.25 * (t.exp() * (t - m)).sum() + 0.75 * (s.exp() * (s - m)).sum()
    expected = {"forward": forward, "reverse": reverse, "jsd": jsd}[kind]
    assert run.steps[0][0]["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert distill.loss_of(run.job).keywords["whole"]  # no rest, which would be rounding
    batch = run.engine.updates[0][0][0]
    assert batch.candidates.shape == (*batch.input_ids.shape, V)
    assert len(run.teachers["one"].scored) == 1 and run.engine.scored == []


def test_two_teachers_by_their_weights(start: Callable[..., Run]) -> None:
    """Shares 1/4 and 3/4. The likeliest of both by share x probability: 3 (.375) and 1 (.1875, of the second)."""
    run = start(TWO).go()
    rest = 0.125 / (V - 3)

    def divergence(teacher: dict[int, float]) -> float:
        pairs = [(teacher.get(i, rest), STUDENT.get(i, rest)) for i in (3, 1)]
        pairs.append((1 - sum(t for t, _ in pairs), 1 - sum(s for _, s in pairs)))
        return sum(t * math.log(t / s) for t, s in pairs)

    expected = 0.25 * divergence(TEACHER) + 0.75 * divergence(OTHER)
    assert run.built == [("distill.teacher.one", "one"), ("distill.teacher.two", "two")]
    assert [metrics["loss"] for metrics, _ in run.steps] == pytest.approx([expected] * 2, rel=1e-4)
    assert {tuple(run.engine.updates[0][0][0].candidates[0, -1].tolist())} <= {(3, 1), (1, 3)}
    assert [len(teacher.scored) for teacher in run.teachers.values()] == [4, 4]  # candidates, then their log-probs


def test_a_row_names_its_teacher(start: Callable[..., Run], tmp_path: Path) -> None:
    """Of 16 rows each second names the second teacher, and each fourth none: shares by the tokens of each."""
    names = ["one", "two", None, "two"] * 4
    rows = [
        {"prompt": f"say {i}", "completion": " x" * 3, **({"teacher": n} if n else {})} for i, n in enumerate(names)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (f"data.train={tmp_path / 'rows.jsonl'}", "data.pack=false", "train.global_batch_seqs=16")
    run = start(TWO, *overrides, "train.steps=1").go()
    shares = [
        (float(batch.extra["share_0"][row][mask].unique()), float(batch.extra["share_1"][row][mask].unique()))
        for batch in run.engine.updates[0][0]
        for row, mask in enumerate(batch.loss_mask)
    ]
    assert sorted(shares) == [(0.0, 1.0)] * 8 + [(0.25, 0.75)] * 4 + [(1.0, 0.0)] * 4
    wanted = {(1.0, 0.0): {1, 0}, (0.0, 1.0): {3, 1}, (0.25, 0.75): {3, 1}}
    found = [
        set(batch.candidates[i, m][0].tolist())
        for batch in run.engine.updates[0][0]
        for i, m in enumerate(batch.loss_mask)
    ]
    assert found == [wanted[share] for share in shares]
    rows[2]["teacher"] = rows[5]["teacher"] = "three"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more in ((), ON_POLICY):
        with pytest.raises(ValueError, match=r"rows.jsonl:3: teacher='three': must be one of one, two .*\n.*jsonl:6: "):
            start(TWO, *overrides, *more).go()


def test_teachers_that_wait_come_to_score_alone(start: Callable[..., Run]) -> None:
    assert start("distill.teachers_wait=true").go().teachers["one"].moves == ["host", *["device", "score", "host"] * 2]
    assert start().go().teachers["one"].moves == ["score"] * 2


def test_replay_brings_text_by_its_weight(start: Callable[..., Run]) -> None:
    run = start("data.replay_seqs=4", "data.replay_weight=0.5")
    run.engine.scores = lambda b: says(STUDENT)(b) if "teacher_0" in b.extra else Scores(-3.0 * b.loss_mask)
    run.go()
    text = TextRows(run.job.config.data.path, "train", 64, 1, True, mix=MixSettings())
    for step, (metrics, tokens) in enumerate(run.steps):
        own, replayed = run.engine.updates[step][0][:4], run.engine.updates[step][0][4:]
        ids = [row for batch in replayed for row in batch.input_ids.tolist()]
        assert ids == text.batch(range(4 * step, 4 * step + 4)).input_ids.tolist()
        assert {batch.candidates.shape[2:] for batch in (*own, *replayed)} == {(2,)}  # a pipeline wants one form
        assert {batch.candidates.shape[:2] == batch.input_ids.shape for batch in (*own, *replayed)} == {True}
        assert run.engine.updates[step][1] == trained(own) and tokens == (8 + 4) * 64
        assert metrics["loss"] == pytest.approx(0.25 * LN2 + 0.5 * 3, rel=1e-5)


@pytest.mark.parametrize("seqs", [0, 4])
@pytest.mark.parametrize("more", [(), ON_POLICY])
def test_rows_beside_text_are_to_have_its_form(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], seqs: int
) -> None:
    asked = []
    for name in ("demonstration_microbatches", "group_microbatches"):
        made = getattr(distill, name)
        monkeypatch.setattr(distill, name, lambda *a, fixed_width, make=made: asked.append(fixed_width) or make(*a))
    run = start(*more, f"data.replay_seqs={seqs}", "data.replay_weight=0.5")
    own = says(STUDENT)
    run.engine.scores = lambda b: own(b) if "replay" not in b.extra else Scores(-3.0 * b.loss_mask)
    run.go()
    assert asked == [seqs > 0] * 2
    assert [metrics["loss"] for metrics, _ in run.steps] == pytest.approx([0.25 * LN2 + 1.5 * (seqs > 0)] * 2, rel=1e-5)


def test_rewinds_epochs_and_held_out_rows(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    noted = []
    monkeypatch.setattr(distill, "note_evaluation", lambda job, scores: noted.append((job.step, scores["loss"])))
    run = start("train.steps=5", "train.eval_every_steps=2", "train.eval_seqs=3")
    run.job.guard.rewinds = [[1, 2, 1024]]
    run.engine.scores = lambda b: says(STUDENT)(b) if b.candidates is not None else Scores(-2.0 * (b.labels >= 0))
    run.go()
    assert [run.taken(step) for step in range(3)] == [rows_of(run.job, turn) for turn in (0, 3, 4)]
    assert noted == [(step, pytest.approx(2.0)) for step in (0, 2, 4, 5)]
    config = run.job.config
    settings = config.train.model_copy(update={"epochs": 0.5, "steps": 1})
    run = start()
    run.job.config = run.job.config.model_copy(update={"train": settings})
    rows = Demonstrations(config.data.train, run.job.tokenizer, 64, seed=1)
    assert run.go().totals == [-(-len(rows) * 5 // 80)]


def test_microbatches_by_tokens_have_the_same_tokens_and_shares(start: Callable[..., Run]) -> None:
    """Two rows of at most 64 tokens a microbatch, the last of which may be empty."""
    rows = start("data.pack=false", "train.steps=1").go().engine.updates[0]
    run = start("data.pack=false", "train.steps=1", "train.micro_batch_tokens=128").go()
    batches, denominator, stats = run.engine.updates[0]
    assert (
        denominator == rows[1] == trained(batches) == sum(float(b.extra["share_0"][b.loss_mask].sum()) for b in batches)
    )
    assert all(b.input_ids.numel() <= 128 for b in batches) and len({b.input_ids.shape for b in batches}) == 1
    assert stats.loss == pytest.approx(rows[2].loss, rel=1e-6)


def test_rows_without_an_example_have_the_columns_of_all(start: Callable[..., Run]) -> None:
    job = start().job
    batch = distill.demonstrations(job, job.config.data.train).rows([[], [0]], 64)
    assert batch.extra["share_0"][0].eq(0).all() and batch.extra["share_0"][1][batch.loss_mask[1]].eq(1).all()


def test_a_step_on_own_samples(start: Callable[..., Run]) -> None:
    """Reverse KL over the student's two likeliest: ids 0 and 1, the same value as the forward one."""
    run = start(*ON_POLICY).go()
    assert run.totals == [2] and run.generator.loaded == [(0, 0), (1, 1), (2, 2)] and run.generator.closed
    for step, (metrics, tokens) in enumerate(run.steps):
        asked, sampling = run.generator.asked[step]
        assert len(asked) == 4 and (sampling.max_new_tokens, sampling.num_samples) == (7, 2)
        assert sampling.temperature == 0.8
        batches, denominator, _ = run.engine.updates[step]
        assert denominator == trained(batches) == tokens == 4 * 8 and {batch.temperature for batch in batches} == {0.8}
        assert all((batch.candidates == torch.tensor([0, 1])).all() for batch in batches)
        expected = {"loss": 0.25 * LN2, "entropy": 2.0, "student_covered": 0.75, "logprob_gap_max": 0.0}
        expected |= {
            "step_samples": 8,
            "response_tokens_mean": 4.0,
            "finished_fraction": 0.5,
            "weight_version": step + 1,
            "lr": LR,
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert "reward_mean" not in metrics
    assert [{batch.top_k for batch in scored} for scored in run.engine.scored] == [{0}, {2}, {2}]  # the gate, once
    assert [{batch.top_k for batch in scored} for scored in run.teachers["one"].scored] == [{0}, {0}]


def test_a_resumed_run_goes_on_with_its_version_and_prompts(start: Callable[..., Run]) -> None:
    whole, resumed = start(*ON_POLICY, "train.steps=3").go(), start(*ON_POLICY, "train.steps=3")
    resumed.job.step = 2
    resumed.go()
    assert [version for version, _ in resumed.generator.loaded] == [2, 3]
    assert resumed.generator.asked == whole.generator.asked[2:]


def test_the_sampled_token_alone(start: Callable[..., Run]) -> None:
    """The teachers say 0.5 less and 0.25 more than the generator, in shares 1/4 and 3/4: the loss is the difference."""
    run = start(*ON_POLICY, "distill.estimate=sampled", TWO)
    run.teachers["one"].scores, run.teachers["two"].scores = says(TEACHER, -0.5), says(OTHER, 0.25)
    run.go()
    for metrics, _ in run.steps:
        assert metrics["loss"] == pytest.approx(0.25 * 0.5 - 0.75 * 0.25, abs=1e-6)
    for batches, _, _ in run.engine.updates:
        assert {batch.candidates for batch in batches} == {None}
    assert [len(teacher.scored) for teacher in run.teachers.values()] == [2, 2] and len(run.engine.scored) == 1


SERVED = "{path: 'http://host:1/v1', model: big, name: one, token_env: TOKEN}"


def test_a_server_is_asked_about_each_sample_of_its_teacher(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It says 0.5 less than the generator, the other teacher 0.25 more. Of four prompts, each of which has answers of 5
    and 3 tokens, one names the server, one the other teacher, and two none: shares 1/4 and 3/4."""
    monkeypatch.setenv("TOKEN", "word")
    rows = [{"prompt": f"say {i}", **({"teacher": n} if n else {})} for i, n in enumerate(["one", "two", None, None])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (f"distill.teacher=[{SERVED}, {{path: two, weight: 3}}]", f"data.train={tmp_path / 'rows.jsonl'}")
    keys = ("distill.estimate=sampled", "distill.server_threads=3", "distill.server_deadline_s=7")
    run = start(*ON_POLICY, *settings, *keys)
    run.teachers["two"].scores = says(OTHER, 0.25)
    run.go()
    (server,) = run.servers
    assert server.where == ("http://host:1/v1", "big", "word", 3, 7.0) and run.built == [("distill.teacher.two", "two")]
    prompts = [run.job.tokenizer.encode(row["prompt"]) for row in rows]
    assert len(server.texts) == 1 + 4 and server.texts[1:] == [row["prompt"] for row in rows]
    probe, longest = server.asked[0]
    assert probe == server.encode(PROBE) and len(longest) == max(map(len, prompts)) + 7 and len(server.asked) == 1 + 2
    wanted = [prompt + answer for i, prompt in enumerate(prompts) if i != 1 for answer in run.answers(Prompt([]))]
    for step, (metrics, _) in enumerate(run.steps):
        assert sorted(server.asked[1 + step]) == sorted(wanted)
        expected = (8 * 0.5 - 8 * 0.25 + 16 * (0.25 * 0.5 - 0.75 * 0.25)) / 32
        assert metrics["loss"] == pytest.approx(expected, abs=1e-6) and metrics["server_s"] >= 0
    for batch in run.engine.updates[0][0]:
        share, said = batch.extra["share_0"], batch.extra["teacher_0"]
        assert torch.equal(said, torch.where((share > 0) & batch.loss_mask, -1.5, 0.0))
    assert [len(teacher.scored) for teacher in run.teachers.values()] == [0, 2]
    assert "server_s" not in start(*ON_POLICY).go().steps[0][0]


def test_a_server_without_a_token(start: Callable[..., Run]) -> None:
    settings = (f"distill.teacher={SERVED.replace('token_env: TOKEN', 'weight: 2')}", "distill.estimate=sampled")
    run = start(*ON_POLICY, *settings).go()
    assert run.servers[0].where == ("http://host:1/v1", "big", None, 8, 120.0) and run.built == []
    assert [metrics["loss"] for metrics, _ in run.steps] == pytest.approx([0.5, 0.5], abs=1e-6)


def test_rewards_are_recorded_where_they_are_named(start: Callable[..., Run], tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"say {i}:", "answer": "7"}) + "\n" for i in range(8)))
    run = start(*ON_POLICY, "rewards=[{name: first_integer}]", f"data.train={problems}", "log.samples=1")
    seven = run.job.tokenizer.encode(" 7", parse_special=False)
    run.generator.answers = lambda prompt: [[*seven, run.job.tokenizer.eos_id], [8, 9]]
    run.go()
    assert [metrics["reward_mean"] for metrics, _ in run.steps] == [0.5, 0.5]
    assert run.steps[0][0]["reward/first_integer"] == 0.5
    lines = (Path(run.job.config.directory) / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward"] for line in lines] == [1.0, 1.0]


def test_the_gate_stops_before_the_first_update_and_at_a_later_one(start: Callable[..., Run]) -> None:
    run = start(*ON_POLICY)
    run.engine.scores = says(STUDENT, 0.01)
    with pytest.raises(Disagreement, match=r"step 1: generator and trainer differ by 0\.01"):
        run.go()
    assert run.engine.updates == [] and run.generator.closed
    run = start(*ON_POLICY, "train.steps=3")
    plain, spoiled = says(STUDENT), says(STUDENT, 0.01)
    run.engine.scores = lambda batch: (spoiled if len(run.engine.updates) == 1 else plain)(batch)
    with pytest.raises(Disagreement, match="step 2: "):
        run.go()
    assert len(run.steps) == 1


def test_what_a_document_makes_of_the_recipe(start: Callable[..., Run]) -> None:
    given, own = (RECIPES["distill"].of(start(*more).job.config) for more in ((), ON_POLICY))
    assert given.fixed_batch and not given.samples and given is RECIPES["distill"]
    assert own.samples and own.branches and not own.judged and not own.fixed_batch
    size = own.step_size(start(*ON_POLICY).job.config)
    assert (size.tokens, size.seqs) == (4 * 2 * 7, None)
