"""Reads preference rows: a prompt with two answers, of which one is better. Each becomes a `Group` of two samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from llmtrain.config.schema import DataConfig
from llmtrain.data.encode import Draft, Encoder
from llmtrain.data.faults import Faults
from llmtrain.data.groups import group_length
from llmtrain.data.jsonl import kind
from llmtrain.data.prompts import AS_IT_IS
from llmtrain.data.room import Room
from llmtrain.data.rows import Example, Record, found_fields, read_examples
from llmtrain.data.sampler import derive, permuted
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.types import Group, Sample

LABEL, MARGIN = "label", "margin"  # fields of a row, and columns of its samples
USUAL = {LABEL: 1.0, MARGIN: 0.0}  # of a row that has no such field
MEANING = {
    LABEL: "a number from 0 to 1, the probability that `chosen` is the better one",
    MARGIN: "a finite number, by how much the reward of `chosen` is to be higher",
}


class Pairs:
    """Holds the pairs of a file, the chosen answer first, both behind one prompt.

    What is trained is each answer with the token that ends it, as `Demonstrations` has it. With `at_end` it is the
    place of the last token alone, for a value that a scalar head gives there (`at_last_token`). A pair lies in one row:
    the prompt once, then both answers. `columns` names the fields `label` and `margin` if any row has them; `fill` says
    where the chosen sample holds the value. Raises ValueError with all faults of the file, each with its line.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        at_end: bool = False,
        settings: DataConfig = AS_IT_IS,
    ) -> None:
        self.seed, faults = derive(seed, "pairs"), Faults(path)
        room = Room(seq_len, f"train.seq_len={seq_len}", settings.overlong, faults)
        found = []
        for where, example, pair, bos in encode_pairs(path, tokenizer, settings, faults):
            pair = [at_last_token(sample) for sample in pair] if at_end else pair
            kept = room.pair(where, pair, group_length(pair), bos)
            found += [] if kept is None else [(example.record, kept)]
        faults.raise_any()
        room.report(path, len(found))
        self.pairs = [pair for _, pair in found]
        self.columns = tuple(name for name in USUAL if any(record.get(name) is not None for record, _ in found))
        for record, pair in found:
            for name in self.columns:
                fill(pair, name, (number(record, name), 0.0))

    def __len__(self) -> int:
        """Returns the number of pairs in an epoch."""
        return len(self.pairs)

    def index(self, sample: int) -> int:
        """Returns which pair of the file the run's `sample`-th is: each once an epoch, in a new order each time."""
        return permuted(sample, len(self), self.seed)

    def groups(self, samples: Sequence[int]) -> list[Group]:
        """Returns the pairs of these sample numbers."""
        return [self.pairs[self.index(sample)] for sample in samples]

    def tokens(self, samples: Sequence[int]) -> int:
        """Returns how many tokens these pairs have, each prompt counted once."""
        return sum(map(group_length, self.groups(samples)))


def fill(pair: Group, name: str, values: Sequence[float]) -> None:
    """Gives each of two samples a column that is 0 but at its last trained token, where it has its value."""
    for sample, value in zip(pair, values, strict=True):
        last = max(i for i, trained in enumerate(sample.trained) if trained)
        sample.columns[name] = [float(value) if i == last else 0.0 for i in range(len(sample.ids))]


def at_last_token(sample: Sample) -> Sample:
    """Returns the sample as a scalar head is to see it: its last token is an input too, and the only place in the mask.

    A row holds as inputs what stands before each of `ids` (`data.groups`), so a token more is put behind them, which
    nobody sees; columns are left out. Of the sample `a <end>` the value is the one at `<end>`.
    """
    n = len(sample.ids) + 1
    return replace(
        sample,
        ids=[*sample.ids, sample.ids[-1]],
        trained=[False] * (n - 1) + [True],
        logprobs=[0.0] * n,
        versions=[0] * n,
        columns={},
    )


def encode_pairs(
    path: str, tokenizer: Tokenizer, settings: DataConfig, faults: Faults
) -> Iterator[tuple[str, Example, Group, int]]:
    """Yields (`file:line`, example, pair, tokens that begin every text) of each row that can be used; the others go to
    `faults`."""
    examples = read_examples(path, settings, faults, answered=False)
    encoder = Encoder(tokenizer, [example for _, example in examples], settings.trained_turns == "all")
    drafted: list[tuple[str, Example, list[Draft]]] = []
    for where, example in examples:
        try:
            check_fields(example)
            drafted.append(
                (where, example, [encoder.demonstration(each) for each in answers(example, encoder.all_turns)])
            )
        except ValueError as error:
            faults.add(where, str(error))
    tokens = encoder.encode(draft for _, _, drafts in drafted for draft in drafts)
    for where, example, drafts in drafted:
        try:
            yield where, example, pair_of(next(tokens), next(tokens)), len(drafts[0].first_ids)
        except ValueError as error:
            faults.add(where, str(error))


def check_fields(example: Example) -> None:
    """Raises ValueError, without a place, when the row is no preference, or its `label` or `margin` cannot be one."""
    if example.rejected is None:
        found = found_fields(example.record)
        raise ValueError(f"the row is no preference; found {found}; give `prompt`, `chosen` and `rejected`")
    for name in USUAL:
        number(example.record, name)


def number(record: Record, name: str) -> float:
    """Returns the label or margin of a row, the usual one where it is missing or null. Raises ValueError, without a
    place, when it cannot be one."""
    value = USUAL[name] if record.get(name) is None else record[name]
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or (name == LABEL and not 0 <= value <= 1):
        shown = value if numeric else kind(value)
        raise ValueError(f"field {name!r} must be {MEANING[name]}, found {shown}; mend or remove it")
    return float(value)


def answers(example: Example, all_turns: bool) -> list[Example]:
    """Returns two demonstrations of a preference, the chosen one first. With `all_turns`, those of the prompt are still
    not trained."""
    prompt, rejected = example.prompt, example.rejected
    if all_turns and isinstance(prompt, list):
        prompt = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]
    one = replace(example, prompt=prompt, rejected=None)
    return [one, replace(one, turns=rejected) if isinstance(rejected, list) else replace(one, answer=rejected)]


def pair_of(chosen: tuple[list[int], list[bool]], rejected: tuple[list[int], list[bool]]) -> Group:
    """Returns the pair of two encoded demonstrations: (tokens, which are trained) each.

    The prompt is what both begin with before anything is trained. A template that ties the first characters of an
    answer to the prompt leaves the last tokens of the prompt to the samples: inputs that are not trained. Raises
    ValueError, without a place, when nothing tells the answers apart, or no token stands before both.
    """
    if chosen[0] == rejected[0]:
        raise ValueError("`chosen` and `rejected` are the same tokens; remove the row")
    pairs = zip(*chosen, *rejected, strict=False)
    shared = next((i for i, (a, first, b, second) in enumerate(pairs) if a != b or first or second), 0)
    if not shared:
        raise ValueError("no token stands before both answers; give the row a prompt")
    return [sample_of(ids, trained, shared) for ids, trained in (chosen, rejected)]


def sample_of(ids: Sequence[int], trained: Sequence[bool], prompt_tokens: int) -> Sample:
    """Returns the sample of one encoded demonstration; nobody has sampled it, so its log-probs are 0."""
    prompt, own, flags = list(ids[:prompt_tokens]), list(ids[prompt_tokens:]), list(trained[prompt_tokens:])
    return Sample(prompt, own, flags, [0.0] * len(own), [0] * len(own), finished=True)
