"""Writes down what each step took from a source of rollouts, and feeds a run from that instead of sampling.

A file for each time that a step asks: `rollouts/step-00000012.safetensors` in the run directory, the second time
`step-00000012-2.safetensors`. Steps count from 1, as in metrics.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmtrain.checkpoint.group import CheckpointGroup, together
from llmtrain.config.schema import Config
from llmtrain.data.prompts import PromptSet
from llmtrain.rollout.generator import RolloutSource, Weights
from llmtrain.rollout.source import Order
from llmtrain.rollout.wire import groups_of, tensors_of
from llmtrain.trainer.identity import Contents
from llmtrain.types import Group, Sample

Made = dict[str, Any]
"""Maps the keys of a document that say what a record is of to their values, as JSON."""
KEPT = ("group_size", "temperature", "max_staleness", "router_replay")  # of rollout
OF_EPISODES = {"tools", "game", "args", "max_turns", "weights"}  # of rollout.environment
OF_RUNS = {"function", "args", "command", "weights"}  # of rollout.agent
AGENT, EPISODES = "rollout.agent", "rollout.environment"


def made_with(config: Config, contents: Contents | None = None) -> Made:
    """Returns what must be the same where a record is replayed: otherwise its groups, log-probs or rewards would mean
    another loss. Of `contents`, what the run reads, these are the files of its agent, wherever they lie."""
    r = config.rollout
    kept = {f"rollout.{name}": getattr(r, name) for name in KEPT}
    if r.environment is not None:
        kept[EPISODES] = r.environment.model_dump(mode="json", include=OF_EPISODES)
    if (agent := r.agent) is not None:
        name = (agent.function or "").rpartition(":")[2] if agent.file else agent.function
        kept[AGENT] = agent.model_dump(mode="json", include=OF_RUNS) | {"function": name}
        kept |= {key: found["sha256"] for key, found in (contents or {}).items() if key.startswith(f"{AGENT}.")}
    return kept | {"rewards": [{"name": each.name, "weight": each.weight} for each in config.rewards]}


class Turns:
    """Counts which step asks, and how often it has."""

    def __init__(self, directory: str) -> None:
        self.directory, self.version, self.turn = directory, 0, 0

    def publish(self, version: int) -> None:
        self.version, self.turn = version, 0

    def next(self) -> str:
        """Returns the path of the next file."""
        self.turn += 1
        again = f"-{self.turn}" if self.turn > 1 else ""
        return os.path.join(self.directory, f"step-{self.version + 1:08d}{again}.safetensors")


class Recording:
    """Hands on what another source gives, once it is written down by trainer 0."""

    def __init__(
        self, source: RolloutSource, group: CheckpointGroup, directory: str, prompts_per_step: int, made: Made
    ) -> None:
        self.source, self.group, self.prompts_per_step, self.made = source, group, prompts_per_step, made
        self.turns, self.report, self.close = Turns(directory), source.report, source.close

    def take(self, step: int) -> list[Group]:
        """Returns the groups of a step; see RolloutSource."""
        return self.ask(range(step * self.prompts_per_step, (step + 1) * self.prompts_per_step))

    def ask(self, numbers: range) -> list[Group]:
        """Returns the groups of these prompts; see RolloutSource. Raises OSError on every trainer when they cannot be
        written."""
        groups, path = self.source.ask(numbers), self.turns.next()
        numbered = dict(zip(numbers, groups, strict=True))
        together(self.group, lambda: write_groups(path, numbered, self.made) if self.group.rank == 0 else None)
        return groups

    def publish(self, weights: Weights, version: int) -> None:
        """Hands over the weights; see RolloutSource."""
        self.turns.publish(version)
        self.source.publish(weights, version)


class Replayed:
    """Implements a `RolloutSource` that gives what another run of the same document took."""

    def __init__(
        self,
        group: CheckpointGroup,
        directory: str,
        prompts: PromptSet,
        prompts_per_step: int,
        order: Order,
        made: Made,
    ) -> None:
        """`made` is what this run would write; a file of other settings is refused."""
        self.group, self.prompts, self.prompts_per_step, self.order = group, prompts, prompts_per_step, order
        self.turns, self.made = Turns(directory), made

    def take(self, step: int) -> list[Group]:
        """Returns the groups of a step; see RolloutSource."""
        return self.ask(range(step * self.prompts_per_step, (step + 1) * self.prompts_per_step))

    def ask(self, numbers: range) -> list[Group]:
        """Returns the groups of these prompts, with their rewards; see RolloutSource. Raises on every trainer OSError
        for a file that is not there, ValueError for one that holds others."""
        path, rows, found = self.turns.next(), self.order.choose(numbers), []
        together(self.group, lambda: found.extend(self._read(path, numbers, rows)))
        self.order.note(rows, found)
        return found

    def publish(self, weights: Weights, version: int) -> None:
        """Notes which step comes; nobody samples with the weights."""
        self.turns.publish(version)

    def close(self) -> None:
        """Does nothing; see RolloutSource."""

    def report(self) -> dict[str, float]:
        """Returns nothing; see RolloutSource."""
        return {}

    def _read(self, path: str, numbers: range, rows: Sequence[int]) -> list[Group]:
        groups, made, digests = read_groups(path)
        remedy = "replay with the document of the run that was recorded"
        keys = dict.fromkeys([*self.made, *made])
        other = [(key, made.get(key), self.made.get(key)) for key in keys if made.get(key) != self.made.get(key)]
        if other:
            raise ValueError("\n".join(f"{k}={now}: {path} was made with {was}; {remedy}" for k, was, now in other))
        if list(groups) != list(numbers):
            asked = f"{numbers.start} to {numbers.stop - 1}, which the step takes"
            raise ValueError(f"{path}: holds other prompts than {asked}; {remedy}")
        if digests and digests != [digest(self.prompts.examples[row]) for row in rows]:
            raise ValueError(f"{path}: is of other rows than these prompts are here; replay with the same data")
        for number, row in zip(numbers, rows, strict=True):
            for sample in groups[number]:
                if AGENT not in made and sample.prompt_ids != self._shared(row, sample, made):
                    raise ValueError(f"{path}: prompt {number} has other tokens here; replay with the same data")
                sample.example = self.prompts.examples[row]
        return list(groups.values())

    def _shared(self, row: int, sample: Sample, made: Made) -> list[int]:
        """Returns what the prompt of a sample must be; of episodes it is what all sides begin with."""
        own = self.prompts.prompt_ids(row)
        return own[: len(sample.prompt_ids)] if EPISODES in made else own


def write_groups(path: str, groups: Mapping[int, Group], made: Made) -> None:
    """Writes rewarded groups, by the numbers of their prompts, and what they were made with; whole, or not at all.
    Raises OSError."""
    prompts = [group[0].prompt_ids for group in groups.values()]
    tensors = tensors_of(groups) | {
        "prompt_ids": torch.tensor(list(chain.from_iterable(prompts)), dtype=torch.int32),
        "prompt_tokens": torch.tensor(list(map(len, prompts))),
    }
    scores = [[s.reward, s.parts, s.errors] for group in groups.values() for s in group]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        notes = {"scores": json.dumps(scores), "made": json.dumps(made)}
        if AGENT in made or EPISODES in made:  # whose prompts, what all rows share, do not tell of which row they are
            notes["rows"] = json.dumps([digest(group[0].example) for group in groups.values()])
        save_file(tensors, path, notes)  # to a file beside it, which is then renamed
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def read_groups(path: str) -> tuple[dict[int, Group], Made, list[str]]:
    """Returns what `write_groups` wrote, and of an agent or episodes the digest of the row of each group. Raises
    OSError for a file that is not there, ValueError for a broken one."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            notes = {"rows": "[]", **file.metadata()}
            scores, made, digests = (json.loads(notes[name]) for name in ("scores", "made", "rows"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: is not there; was the run recorded (rollout.record), and so far?") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no record of rollouts: {error}") from error
    ids = tensors["prompt_ids"].tolist()
    ends = pairwise(accumulate(tensors["prompt_tokens"].tolist(), initial=0))
    numbers = dict.fromkeys(tensors["heads"][:, 0].tolist())
    groups = groups_of(tensors, {n: ids[first:end] for n, (first, end) in zip(numbers, ends, strict=True)})
    for sample, (reward, parts, errors) in zip(chain.from_iterable(groups.values()), scores, strict=True):
        sample.reward, sample.parts, sample.errors = reward, parts, errors
    return groups, made, digests


def digest(example: Mapping[str, Any]) -> str:
    """Returns what tells a row of a file from others."""
    return hashlib.sha256(json.dumps(example, sort_keys=True, default=str).encode()).hexdigest()
