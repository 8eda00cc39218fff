"""Measures a model as the section `eval` says: beside training every `eval.every_steps` steps, and for `llmtrain
eval`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.rng import random_state, set_random_state
from llmtrain.checkpoint.source import weight_source
from llmtrain.config.environment import ALL_SIDES, EnvironmentConfig
from llmtrain.config.schema import Config
from llmtrain.data.packing import TextRows
from llmtrain.data.prompts import PromptSet
from llmtrain.data.sampler import derive
from llmtrain.data.shards import holds_out
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.engine.build import Role, build_frozen
from llmtrain.envs.parts import episode_scores
from llmtrain.eval.generate import Classes, Judge, evaluate_problems
from llmtrain.eval.ranks import IDLE_S, Leading, agreed, lead, sharing
from llmtrain.eval.testtime.problems import Problems
from llmtrain.observe.beside import PREFIX
from llmtrain.observe.log import as_line, log
from llmtrain.observe.metrics import read_metrics
from llmtrain.parallel.mesh import Mesh
from llmtrain.rewards import Score, check_rows, scorer_of, stop_if_failing
from llmtrain.rollout.generator import Generator
from llmtrain.rollout.worker import ColocatedGenerator
from llmtrain.trainer.batches import evaluate_text, text_rows
from llmtrain.trainer.beside import Beside
from llmtrain.trainer.completions import completion_text, sampling_of
from llmtrain.trainer.environments import answering, make_of, prompts_of
from llmtrain.trainer.job import Job, data_dir
from llmtrain.trainer.record import is_due
from llmtrain.trainer.rollouts import local_generator


def sharded_text(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, float]:
    """Returns loss, perplexity and bits a byte on the held-out shards of `model.init_from`, a model that is divided
    among the ranks as the section `parallel` says, and sharded over all data-parallel ones (a collective)."""
    model = resolve_model(config.model).model_copy(update={"lora": None, "mtp_layers": 0})
    weights = agreed(mesh, lambda: weight_source(config.model.init_from, model, mesh))
    scorer = build_frozen(Role("model", model, config.parallel, config.engine, weights), mesh)
    rows = text_rows(config, "held_out", tokenizer)
    seqs, micro = config.eval.text_seqs, config.train.micro_batch_seqs
    return by_source(rows, lambda part: evaluate_text(scorer, part, seqs, micro, mesh, tokenizer))


def by_source(rows: TextRows, measure: Callable[[TextRows], dict[str, float]]) -> dict[str, Any]:
    """Returns what `measure` says of all rows, and under `text` what it says of those of each source by itself."""
    sources, total = [name for name, count in rows.rows.items() if count], measure(rows)
    if len(sources) == 1:
        return {**total, "text": {sources[0]: total}}
    return {**total, "text": {name: measure(rows.of_source(name)) for name in sources}}


def read_problems(config: Config, tokenizer: Tokenizer) -> PromptSet:
    """Returns the problems of `data.held_out`. Raises ValueError when one of the first `eval.problems` lacks what the
    first reward reads."""
    one_side(config.rollout.environment)
    problems, count = prompts_of(config, config.data.held_out, tokenizer), config.eval.problems
    check_rows(config.rewards[:1], problems.examples[:count], problems.places[:count])
    return problems


def one_side(environment: EnvironmentConfig | None) -> None:
    """Raises ValueError for an environment in which the policy plays several sides: who wins then says nothing."""
    if environment is not None and make_of(environment)().players > 1:
        raise ValueError(f"rollout.environment.function={environment.function}: {ALL_SIDES}")


def posed(config: Config, rows: PromptSet, tokenizer: Tokenizer) -> Problems:
    """Returns the first `eval.problems` of the rows, with what judges their answers: the first reward, or nothing where
    the environment rewards them itself.

    Each problem has a random stream of its own, from `seed` and its number: the answers do not depend on who samples
    them. Its judge raises RewardsFail when the reward fails too often.
    """
    count = min(config.eval.problems, len(rows))
    prompts = [rows.prompt(i, derive(config.seed, f"eval/{i}")) for i in range(count)]
    judge, classes = judging(config, rows) if config.rewards else (None, None)
    return Problems(prompts, rows.examples[:count], completion_text(config, tokenizer), judge, classes)


def judging(config: Config, rows: PromptSet) -> tuple[Judge, Classes]:
    """Returns how the first reward judges answers to rows, and how it numbers them."""
    reward, scorer = config.rewards[0], scorer_of(config.rewards[0])

    def judge(pairs: Sequence[tuple[int, str]]) -> list[Score]:
        scores = scorer.score([(text, rows.examples[i]) for i, text in pairs])
        stop_if_failing([reward], [{} if s.error is None else {reward.name: s.error} for s in scores])
        return scores

    return judge, scorer.classes


def problem_scores(
    config: Config, problems: Problems, tokenizer: Tokenizer, generator: Generator
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns pass@k, majority vote and greedy accuracy on the problems, and all completions."""
    p, sampling, samples = problems, sampling_of(config, tokenizer), config.eval.samples
    by_episode = None if config.rollout.environment is None else episode_scores(config.rollout.environment)
    judged = (p.decode, p.judge, p.classes)
    return evaluate_problems(generator, p.prompts, *judged, samples, sampling, by_episode=by_episode)


class Evaluation:
    """Measures the main model of a job beside its training, and leaves no trace there: weights, random streams and what
    the recipe carries are as if it had not been."""

    def __init__(self, job: Job) -> None:
        self.job, self.every_steps = job, job.config.eval.every_steps
        self.rows: TextRows | None = None
        self.problems: PromptSet | None = None
        if self.every_steps and job.step < job.config.train.steps:
            self.rows, self.problems = held_out_text(job), held_out_problems(job)
            if self.rows is None and self.problems is None:
                raise ValueError(
                    f"eval.every_steps={self.every_steps}: {data_dir(job.config)} holds no text out and data.held_out "
                    "names no problems; raise data.sources[].held_out, or set it to 0"
                )
            self.waiting = job.mesh.side_group(IDLE_S)
            self.beside, self.found_late = Beside(self.waiting), {}
            log(self.words())

    def words(self) -> str:
        """Returns what is measured, for the log."""
        e, job = self.job.config.eval, self.job
        text = [] if self.rows is None else [f"{min(e.text_seqs, len(self.rows))} rows of held-out text"]
        count = 0 if self.problems is None else min(e.problems, len(self.problems))
        asked = [f"{count} problems, each once greedily and {e.samples} times by sampling"] if count else []
        return f"every {self.every_steps} of {job.config.train.steps} steps: {', and '.join(text + asked)}"

    def at_start(self) -> dict[str, float]:
        """Returns the level that the run starts from, if none of its steps is done; else nothing (a collective). A run
        that goes on measures problems again, beside its training, that were asked where it was saved and not answered
        when it ended."""
        if self.every_steps and self.job.step == 0:
            return self.measure()
        if self.beside_training and is_due(self.job.step, self.every_steps) and self._unanswered():
            self.ask_beside(self.problems)
        return {}

    def after_step(self) -> dict[str, float]:
        """Returns the measures where they are due after this step, among them the last (a collective)."""
        last = self.job.step == self.job.config.train.steps
        due = is_due(self.job.step, self.every_steps) or (last and self.every_steps > 0)
        return self.measure() if due else {}

    def late(self) -> dict[int, dict[str, float]]:
        """Returns what was measured of earlier steps beside training and has been found since the last call, by these;
        on rank 0 alone."""
        if not self.beside_training:
            return {}
        found, self.found_late = self.found_late | self.beside.found(), {}
        return found

    def before_save(self) -> dict[int, dict[str, float]]:
        """Waits for what must be found before this step is saved, and returns it as `late` does (a collective): that of
        an earlier step, whose weights a run that goes on from here has no more, and at the end all."""
        step = self.beside.step if self.beside_training else None
        if step is not None and (step < self.job.step or step == self.job.config.train.steps):
            self.found_late |= self.beside.settle()
        return self.late()

    @property
    def beside_training(self) -> bool:
        """Returns whether the workers that sample ahead answer the problems, while the trainers go on."""
        return self.problems is not None and self.job.ahead is not None

    def ask_beside(self, problems: PromptSet) -> None:
        """Has the workers answer the problems with the newest weights, once those before are answered (a
        collective)."""
        self.found_late |= self.beside.settle()
        job, began = self.job, time.perf_counter()
        step, pinned = job.step, job.ahead.pinned()

        def work(generator: Leading) -> dict[str, float]:
            asked = posed(job.config, problems, job.tokenizer)
            found = plain(problem_scores(job.config, asked, job.tokenizer, generator)[0])
            log(f"evaluated beside training, step {step}: {as_line(found)}")
            return prefixed(found) | {"eval_beside_s": time.perf_counter() - began}

        self.beside.begin(step, None if pinned is None else partial(lead, pinned.ranks, pinned, work))

    def _unanswered(self) -> bool:
        """Returns whether the line of this step lacks what problems were to give (a collective)."""
        path = os.path.join(self.job.config.directory, "metrics.jsonl")
        lines = read_metrics(path) if self.job.mesh.rank == 0 and os.path.exists(path) else []
        own = [line for line in lines if line["step"] == self.job.step]
        return self.waiting.all_gather_json(any(f"{PREFIX}problems" not in line for line in own))[0]

    def measure(self) -> dict[str, float]:
        """Returns the measures by their names in metrics.jsonl, `eval/loss`, `eval/pass@1`, ..., and the seconds that
        they took; those of problems on rank 0 alone, and not yet those that are asked beside training (a
        collective)."""
        began, state, job = time.perf_counter(), random_state(), self.job
        found: dict[str, float] = {}
        if self.rows is not None:
            seqs, micro = job.config.eval.text_seqs, job.config.train.micro_batch_seqs
            found |= evaluate_text(job.engine, self.rows, seqs, micro, job.mesh, job.tokenizer)
        if self.beside_training:
            self.ask_beside(self.problems)
        elif self.problems is not None:
            found |= self.solved(self.problems)
        set_random_state(state)
        if found:
            log(f"evaluated, step {job.step}: {as_line(found)}")
        return prefixed(found) | {"eval_s": time.perf_counter() - began}

    def solved(self, problems: PromptSet) -> dict[str, float]:
        """Returns what the newest weights make of the problems, on rank 0 (a collective)."""
        job, generator = self.job, self.job.generator or whole_model(self.job)
        asked = posed(job.config, problems, job.tokenizer)
        found = lead(self.waiting, generator, lambda g: problem_scores(job.config, asked, job.tokenizer, g))
        generator.sleep()  # the cache was as large as the evaluation needs it
        generator.wake()
        return {} if found is None else plain(found[0])


def plain(scores: dict[str, Any]) -> dict[str, float]:
    """Returns the measures without their intervals."""
    return {name: value for name, value in scores.items() if not isinstance(value, dict)}


def prefixed(found: dict[str, float]) -> dict[str, float]:
    """Returns the measures by their names in metrics.jsonl."""
    return {f"{PREFIX}{name}": value for name, value in found.items()}


def held_out_text(job: Job) -> TextRows | None:
    """Returns the held-out rows of the job's shards; None where there are none, or `eval.text` is false."""
    there = job.recipe.packs_text or job.config.data.path is not None
    if not job.config.eval.text or not there or not holds_out(data_dir(job.config)):
        return None
    return text_rows(job.config, "held_out", job.tokenizer)


def held_out_problems(job: Job) -> PromptSet | None:
    """Returns the problems of `data.held_out`; None where it is not set, or `eval.problems` is 0."""
    wanted = job.config.eval.problems and job.config.data.held_out is not None
    return read_problems(job.config, job.tokenizer) if wanted else None


def whole_model(job: Job) -> ColocatedGenerator:
    """Returns a generator with the newest weights, whole on every trainer (a collective), that plays episodes where
    there is an environment: for a recipe that samples nothing itself. Whoever drops it frees them."""
    local = local_generator(job)
    generator = sharing(local, job.mesh, answering(job.config, job.tokenizer, local).generate)
    generator.load_weights(job.engine.full_weights(), job.step)
    return generator
