"""Implements `llmtrain constitutional`: demonstrations from revised answers, preferences from comparisons, and how the
model's preferences agree with given ones, in one process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from llmtrain.config.load import dump
from llmtrain.config.schema import Config
from llmtrain.data.asked import asking, messages_of, spoken
from llmtrain.data.preferences import Preference, read_preferences
from llmtrain.data.principles import Principle, drawn, read_principles
from llmtrain.data.prompts import PromptSet
from llmtrain.data.rows import Example
from llmtrain.data.sampler import permuted
from llmtrain.observe.interval import wilson
from llmtrain.observe.log import as_line, log, make_run_dir
from llmtrain.observe.rows import own_directory, write_rows
from llmtrain.trainer.constitution import Comparison, Verdict, compared, revised
from llmtrain.trainer.environments import prompts_of
from llmtrain.trainer.job import resolved
from llmtrain.trainer.speaker import Said, Speaker, numbers_of, open_speaker

COMMAND = "llmtrain constitutional"
FILES = ("config.yaml", "constitutional.json", "sft.jsonl", "pairs.jsonl", "transcripts.jsonl")


def main(config: Config) -> None:
    """Writes sft.jsonl, pairs.jsonl, transcripts.jsonl, constitutional.json and config.yaml into the run directory.

    A job that was killed starts anew. Raises ValueError when the directory holds a run that trains, or files that are
    not ours.
    """
    make_run_dir(config.directory)
    principles = read_principles(config.constitutional.principles)
    with own_directory(config.directory, COMMAND, FILES) as directory:
        (directory / "config.yaml").write_text(dump(resolved(config)), encoding="utf-8")
        result = applied(open_speaker(config), principles, directory)
        (directory / "constitutional.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    log(as_line(result))


def applied(speaker: Speaker, principles: list[Principle], directory: Path) -> dict[str, Any]:
    """Revises, compares, writes the rows, and returns the measures."""
    config, settings = speaker.config, speaker.config.constitutional
    given = read_preferences(settings.agreement) if settings.agreement else []
    prompts = prompts_of(config, config.data.train, speaker.tokenizer)
    numbers = numbers_of("constitutional", settings, prompts)
    result = {"principles": len(principles), "first": numbers.start, "round": settings.round, "prompts": len(numbers)}
    transcripts: list[dict[str, Any]] = []
    if settings.revisions:
        rows, told, measures = demonstrations(speaker, principles, prompts, numbers)
        write_rows(directory / "sft.jsonl", rows)
        transcripts, result = transcripts + told, result | measures
    if settings.pairs_per_prompt:
        rows, told, measures = own_pairs(speaker, principles, prompts, numbers)
        write_rows(directory / "pairs.jsonl", rows)
        transcripts, result = transcripts + told, result | measures
    write_rows(directory / "transcripts.jsonl", transcripts)
    result |= agreement(speaker, principles, given) if given else {}
    return {**result, "completions": speaker.completions}


Made = tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]
"""Holds rows to train on, their transcripts, and measures."""


def demonstrations(speaker: Speaker, principles: list[Principle], prompts: PromptSet, numbers: Sequence[int]) -> Made:
    """Returns the rows of sft.jsonl, with what was said on the way to them."""
    drafts = revised(speaker, principles, prompts, numbers)
    kept = [draft for draft in drafts if draft.lost is None]
    rows = [{**asked(draft.example, speaker), "completion": draft.answer} for draft in kept]
    lost = Counter(draft.lost for draft in drafts)
    measures = {f"lost_{why.replace(' ', '_')}": lost[why] for why in ("no room", "cut off", "empty")}
    return rows, [draft.transcript for draft in drafts], {"revised": len(kept), **measures}


def asked(example: Example, speaker: Speaker) -> dict[str, Any]:
    """Returns the row of a prompt, without the beginning of an answer: answers here are whole."""
    row = asking(example, speaker.tokenizer.has_chat)
    return {name: value for name, value in row.items() if name != "prefill"}


@dataclass(frozen=True)
class Candidate:
    """Holds two samples of a prompt that may become a pair."""

    number: int  # of the prompt in the order of the seed
    example: Example
    comparison: Comparison
    finished: tuple[bool, bool]  # which of the two were not cut off


def own_pairs(speaker: Speaker, principles: list[Principle], prompts: PromptSet, numbers: Sequence[int]) -> Made:
    """Returns the rows of pairs.jsonl: pairs of samples of a prompt, which the model compares by a principle drawn for
    each pair. See `fate` for what is left out."""
    found = [c for group in candidates(speaker, principles, prompts, numbers) for c in group]
    differ = [each for each in found if each.comparison.first != each.comparison.second]
    verdicts = compared(speaker, [each.comparison for each in differ])
    judged = [(each, verdict, fate(each, verdict)) for each, verdict in zip(differ, verdicts, strict=True)]
    rows = [pair_row(speaker, each, verdict) for each, verdict, came in judged if came == "pair"]
    told = [transcript(each.number, each.comparison, verdict) for each, verdict, _ in judged]
    fates = Counter(came for _, _, came in judged)
    letters = [verdict.letter_a for verdict in verdicts if verdict is not None]
    measures = {
        **{"pairs": len(rows), "ties": len(found) - len(differ) + fates["tie"], "pairs_no_room": fates["no room"]},
        **{"pairs_cut_off": fates["cut off"], "letter_a": fmean(letters) if letters else None},
        "label_mean": fmean(row["label"] for row in rows) if rows else None,
    }
    return rows, told, measures


def candidates(
    speaker: Speaker, principles: list[Principle], prompts: PromptSet, numbers: Sequence[int]
) -> Iterator[list[Candidate]]:
    """Yields for each prompt its first and second sample, third and fourth, ..."""
    seed, count = speaker.config.seed, speaker.config.constitutional.pairs_per_prompt
    for number, group in zip(numbers, speaker.sample(prompts, numbers, "constitutional/pairs"), strict=True):
        example = prompts.parsed[prompts.around(number, seed)]
        answers = [speaker.said(sample) for sample in group[: 2 * count]]
        purposes = [f"pair/{number}/{i}" for i in range(count)]
        yield [
            candidate(number, example, one, other, drawn(principles, seed, f"principle/{purpose}"), purpose)
            for one, other, purpose in zip(answers[::2], answers[1::2], purposes, strict=True)
        ]


def candidate(number: int, example: Example, one: Said, other: Said, principle: Principle, purpose: str) -> Candidate:
    """Returns a candidate of two answers."""
    texts = (example.prefill + one.text, example.prefill + other.text)
    comparison = Comparison(messages_of(example), *texts, principle, purpose)
    return Candidate(number, example, comparison, (one.finished, other.finished))


def fate(each: Candidate, verdict: Verdict | None) -> str:
    """Returns what becomes of a candidate: `pair`, or why it is none: the question left no room, it is a tie, or the
    better answer was cut off, and its row would teach to end there."""
    if verdict is None:
        return "no room"
    if verdict.first_better == 0.5:
        return "tie"
    return "pair" if each.finished[verdict.first_better < 0.5] else "cut off"


def pair_row(speaker: Speaker, each: Candidate, verdict: Verdict) -> dict[str, Any]:
    """Returns a line of pairs.jsonl."""
    answers, first = (each.comparison.first, each.comparison.second), verdict.first_better > 0.5
    chosen, rejected = answers if first else answers[::-1]
    label = verdict.first_better if first else 1 - verdict.first_better
    about = {"chosen": chosen, "rejected": rejected, "label": label, "principle": each.comparison.principle.name}
    return {**asked(each.example, speaker), **about}


def transcript(number: int, comparison: Comparison, verdict: Verdict | None) -> dict[str, Any]:
    """Returns the line of transcripts.jsonl of a comparison."""
    thoughts = [] if verdict is None else [{"kind": "thought", "text": text} for text in verdict.thoughts]
    words = "the question left no room" if verdict is None else f"the first is better: {verdict.first_better:.3f}"
    turns = [{"kind": "first answer", "text": comparison.first}, {"kind": "second answer", "text": comparison.second}]
    choice = {"kind": "comparison", "text": words, "principle": comparison.principle.name}
    return {"problem": number, "prompt": spoken(comparison.messages), "turns": [*turns, *thoughts, choice]}


def agreement(speaker: Speaker, principles: list[Principle], given: Sequence[Preference]) -> dict[str, Any]:
    """Returns how often the model prefers the chosen answer of given preferences, with Wilson's 95 % interval; exactly
    0.5 counts half. Each is compared by a principle of its own."""
    seed, settings = speaker.config.seed, speaker.config.constitutional
    count = min(settings.agreement_pairs, len(given))
    chosen = [given[permuted(i, len(given), seed)] for i in range(count)]
    comparisons = [
        Comparison(
            each.messages, each.chosen, each.rejected, drawn(principles, seed, f"agreement/{i}"), f"agreement/{i}"
        )
        for i, each in enumerate(chosen)
    ]
    verdicts = [verdict for verdict in compared(speaker, comparisons) if verdict is not None]
    agreed = sum((v.first_better > 0.5) + (v.first_better == 0.5) / 2 for v in verdicts)
    low, high = wilson(agreed / len(verdicts), len(verdicts)) if verdicts else (None, None)
    return {
        "agreement": agreed / len(verdicts) if verdicts else None,
        **{"agreement_low": low, "agreement_high": high, "agreement_pairs": len(verdicts)},
        "agreement_no_room": count - len(verdicts),
        "agreement_letter_a": fmean(v.letter_a for v in verdicts) if verdicts else None,
    }
