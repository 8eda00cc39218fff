"""Defines what every contestant of the post-training benchmark trains: rows of drawn lengths, and what is sampled."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmtrain.config.schema import OptimConfig

OPTIM = OptimConfig(lr=1e-5, min_lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant", warmup_steps=0)
STD_EPS = 1e-4  # TRL's, added to the deviation of a group
BETA, CENTER = 0.1, 0.01  # of DPO's rewards; of the term that centres rewards
WORDS = (  # common ones
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so "
    "these would other into has more her two like him see time could no make than first been its who now people my "
    "made over did down only way find use may water long little very after words called just where most know"
)


@dataclass(frozen=True)
class Lengths:
    """Describes lengths in words, drawn log-normally with a deviation of a factor 1.8."""

    least: int
    median: int
    most: int

    def draw(self, rng: random.Random) -> int:
        """Returns one length."""
        return min(self.most, max(self.least, round(self.median * math.exp(rng.gauss(0, math.log(1.8))))))


@dataclass(frozen=True)
class Case:
    """Describes a step of an algorithm."""

    algorithm: str  # the recipe
    rows: int  # demonstrations, pairs or prompts of a step
    prompt: Lengths
    answer: Lengths
    micro_tokens: int  # of one forward, padding counted
    samples: int = 1  # of each prompt
    spread: int = 0  # prompts whose samples differ in reward

    @property
    def sampled(self) -> bool:
        return self.samples > 1

    def with_rows(self, rows: int) -> Case:
        """Returns the case with another number of rows."""
        return replace(self, rows=rows, spread=min(self.spread, rows))

    def answers(self, rng: random.Random) -> list[str]:
        """Returns what answers a prompt: a demonstration, a pair, or all that is sampled."""
        count = 2 if self.algorithm in ("dpo", "reward") else self.samples
        return [f" {words(rng, self.answer.draw(rng))}" for _ in range(count)]


PAIRS = (Lengths(8, 24, 64), Lengths(8, 24, 96), 1024)
GROUPS = (Lengths(24, 36, 56), Lengths(8, 20, 40), 1024)
CASES = {
    "sft": Case("sft", 8, Lengths(8, 24, 64), Lengths(8, 32, 128), 1024),
    "dpo": Case("dpo", 4, *PAIRS),
    "reward": Case("reward", 4, *PAIRS),
    "ppo": Case("ppo", 4, *GROUPS, samples=8, spread=4),
    "grpo": Case("grpo", 4, *GROUPS, samples=8, spread=4),
    "grpo-no-spread": Case("grpo", 4, *GROUPS, samples=8, spread=2),
    "grpo-long": Case("grpo", 2, GROUPS[0], Lengths(32, 96, 160), 2048, samples=8, spread=2),
}


def words(rng: random.Random, count: int) -> str:
    """Returns a text of so many common words: in most tokenizers as many tokens."""
    return " ".join(rng.choices(WORDS.split(), k=count))


@dataclass(frozen=True)
class Task:
    """Holds one case for one model; all contestants get the same."""

    case: Case
    directory: str  # of the model, which has a scalar head where the case is `reward`
    scratch: str  # where files may be written
    precision: str  # fp32 or bf16
    steps: int  # at least as many as are measured
    backend: str = "deepspeed"  # ours
    rows: list[dict] = field(init=False)  # each step trains on all of them

    def __post_init__(self) -> None:
        rng, case = random.Random(0), self.case
        drawn = [(words(rng, case.prompt.draw(rng)), case.answers(rng)) for _ in range(case.rows)]
        object.__setattr__(self, "rows", [self._row(i, *each) for i, each in enumerate(drawn)])

    def _row(self, i: int, prompt: str, answers: list[str]) -> dict:
        if self.case.algorithm == "sft":
            return {"prompt": prompt, "completion": answers[0]}
        if not self.case.sampled:
            return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        right = [j % 2 == 0 or i >= self.case.spread for j in range(len(answers))]
        return {
            "prompt": prompt,
            "answer": "1",
            "samples": [f" {r:d}{text}" for r, text in zip(right, answers, strict=True)],
        }

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the model's tokenizer as transformers loads it."""
        return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=False)

    @property
    def longest_answer(self) -> int:
        """Returns `max_new_tokens`: samples that are drawn longer end there."""
        return self.case.answer.most

    def script(self) -> dict[tuple[int, ...], Iterator[list[int]]]:
        """Returns the completions by prompt, without end: those of a step, then those of the next, which are equal.

        They begin with 1 or 0, the reward, and end with the end token where they are shorter than the longest.
        """
        tokenizer, most = self.tokenizer(), self.longest_answer
        ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        texts = {tuple(ids(row["prompt"])): [ids(text) for text in row["samples"]] for row in self.rows}
        ended = {p: [[*x, tokenizer.eos_token_id][:most] for x in each] for p, each in texts.items()}
        return {prompt: cycle(each) for prompt, each in ended.items()}

    def lengths(self) -> list[list[int]]:
        """Returns for each row the tokens of its prompt and of each answer, their ends counted."""
        tokenizer = self.tokenizer()
        count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
        most = self.longest_answer if self.case.sampled else math.inf
        return [[count(row["prompt"]), *(min(most, count(text) + 1) for text in texts_of(row))] for row in self.rows]

    def document(self, run_dir: str) -> dict[str, Any]:
        """Returns the document of our recipe."""
        case, path = self.case, Path(run_dir) / "rows.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        algorithm = {
            "dpo": {"dpo": {"beta": BETA}},
            "reward": {"reward": {"center_coef": CENTER}},
            "grpo": {"grpo": {"prompts_per_step": case.rows, "std_eps": STD_EPS, "mismatch": "off"}},
            "ppo": {"ppo": {"prompts_per_step": case.rows, "minibatches": 1, "kl_coef": 0.05}},
        }
        sampling = {"group_size": case.samples, "max_new_tokens": self.longest_answer}
        return {
            "name": "benchmark",
            "run_dir": f"{run_dir}/run",
            "model": {"init_from": self.directory},
            "tokenizer": {"path": self.directory},
            "data": {"train": str(path), "pack": False},
            "engine": {"precision": self.precision, "backend": self.backend},
            "optim": OPTIM.model_dump(mode="json"),
            "train": {"steps": self.steps, "seq_len": case.micro_tokens, "micro_batch_tokens": case.micro_tokens}
            | {"global_batch_seqs": case.rows},
            **({"rollout": sampling, "rewards": [{"name": "first_integer"}]} if case.sampled else {}),
            **algorithm.get(case.algorithm, {}),
            "log": {"wandb": "off"},
        }


def texts_of(row: dict) -> list[str]:
    """Returns the answers of a row."""
    return row.get("samples") or [row[name] for name in ("completion", "chosen", "rejected") if name in row]
