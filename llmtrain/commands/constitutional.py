"""Implements `llmtrain constitutional`: demonstrations from revised answers, preferences from comparisons, and how the
model's preferences agree with given ones, in one process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from llmtrain.config.load import dump
from llmtrain.config.schema import Config
from llmtrain.data.asked import asking, messages_of, spoken
from llmtrain.data.preferences import read_preferences
from llmtrain.data.principles import Principle, drawn, read_principles
from llmtrain.data.prompts import PromptSet
from llmtrain.data.sampler import permuted
from llmtrain.eval.interval import wilson
from llmtrain.observe.log import log, make_run_dir
from llmtrain.observe.rows import own_directory, write_rows
from llmtrain.trainer.completions import prompts_of
from llmtrain.trainer.constitution import Comparison, Verdict, compared, revised
from llmtrain.trainer.job import resolved
from llmtrain.trainer.speaker import Speaker, open_speaker

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
    shown = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in result.items())
    log("  ".join(shown))


def applied(speaker: Speaker, principles: list[Principle], directory: Path) -> dict[str, Any]:
    """Revises, compares, writes the rows, and returns the measures."""
    config, settings = speaker.config, speaker.config.constitutional
    given = read_preferences(settings.agreement) if settings.agreement else []
    prompts = prompts_of(config, config.data.train, speaker.tokenizer)
    first = settings.first + settings.round * settings.prompts
    numbers = range(first, first + settings.prompts)
    result = {"principles": len(principles), "first": first, "round": settings.round, "prompts": len(numbers)}
    transcripts: list[dict[str, Any]] = []
    if settings.revisions:
        drafts = revised(speaker, principles, prompts, numbers)
        kept = [draft for draft in drafts if draft.lost is None]
        write_rows(
            directory / "sft.jsonl", ({**asked(draft.example, speaker), "completion": draft.answer} for draft in kept)
        )
        transcripts += [draft.transcript for draft in drafts]
        lost = Counter(draft.lost for draft in drafts)
        result |= {
            "revised": len(kept),
            **{f"lost_{why.replace(' ', '_')}": lost[why] for why in ("no room", "cut off", "empty")},
        }
    if settings.pairs_per_prompt:
        rows, told, measures = own_pairs(speaker, principles, prompts, numbers)
        write_rows(directory / "pairs.jsonl", rows)
        transcripts += told
        result |= measures
    write_rows(directory / "transcripts.jsonl", transcripts)
    return result | (agreement(speaker, principles, given) if given else {})


def asked(example: Any, speaker: Speaker) -> dict[str, Any]:
    """Returns the row of a prompt, without the beginning of an answer: answers here are whole."""
    row = asking(example, speaker.tokenizer.has_chat)
    return {name: value for name, value in row.items() if name != "prefill"}


def own_pairs(
    speaker: Speaker, principles: list[Principle], prompts: PromptSet, numbers: Sequence[int]
) -> tuple[list[dict], list[dict], dict[str, Any]]:
    """Returns the rows of pairs.jsonl, their transcripts and measures: pairs of samples of a prompt, which the model
    compares by a principle drawn for each pair.

    Left out are ties (equal answers or probabilities), pairs that leave no room, and those of which the better answer
    was cut off: its row would teach to end there.
    """
    config, seed = speaker.config, speaker.config.seed
    comparisons, places, ties = [], [], 0
    for number, group in zip(numbers, speaker.sample(prompts, numbers, "constitutional/pairs"), strict=True):
        example = prompts.parsed[prompts.at(number, seed)]
        answers = [speaker.said(sample) for sample in group[: 2 * config.constitutional.pairs_per_prompt]]
        for i, (one, other) in list(enumerate(pairwise(answers)))[::2]:
            if one.text == other.text:
                ties += 1
                continue
            purpose = f"pair/{number}/{i}"
            texts = (example.prefill + one.text, example.prefill + other.text)
            principle = drawn(principles, seed, f"principle/{purpose}")
            comparisons.append(Comparison(messages_of(example), *texts, principle, purpose))
            places.append((number, example, one.finished, other.finished))
    verdicts = compared(speaker, comparisons)
    rows, told, left_out = [], [], Counter()
    for place, comparison, verdict in zip(places, comparisons, verdicts, strict=True):
        number, example, *finished = place
        told.append(transcript(number, comparison, verdict))
        if verdict is None or verdict.first_better == 0.5:
            left_out["no_room" if verdict is None else "ties"] += 1
            continue
        first = verdict.first_better > 0.5
        if not finished[0 if first else 1]:
            left_out["cut_off"] += 1
            continue
        chosen, rejected = (comparison.first, comparison.second)[:: 1 if first else -1]
        label = max(verdict.first_better, 1 - verdict.first_better)
        about = {"chosen": chosen, "rejected": rejected, "label": label, "principle": comparison.principle.name}
        rows.append({**asked(example, speaker), **about})
    letters = [verdict.letter_a for verdict in verdicts if verdict is not None]
    return (
        rows,
        told,
        {
            **{"pairs": len(rows), "ties": ties + left_out["ties"], "pairs_no_room": left_out["no_room"]},
            **{"pairs_cut_off": left_out["cut_off"], "letter_a": fmean(letters) if letters else None},
            "label_mean": fmean(row["label"] for row in rows) if rows else None,
        },
    )


def transcript(number: int, comparison: Comparison, verdict: Verdict | None) -> dict[str, Any]:
    """Returns the line of transcripts.jsonl of a comparison."""
    thoughts = [] if verdict is None else [{"kind": "thought", "text": text} for text in verdict.thoughts]
    words = "the question left no room" if verdict is None else f"the first is better: {verdict.first_better:.3f}"
    turns = [{"kind": "first answer", "text": comparison.first}, {"kind": "second answer", "text": comparison.second}]
    choice = {"kind": "comparison", "text": words, "principle": comparison.principle.name}
    return {"problem": number, "prompt": spoken(comparison.messages), "turns": [*turns, *thoughts, choice]}


def agreement(speaker: Speaker, principles: list[Principle], given: Sequence[Any]) -> dict[str, Any]:
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
    low, high = wilson(agreed, len(verdicts))
    return {
        "agreement": agreed / len(verdicts) if verdicts else None,
        **{"agreement_low": low, "agreement_high": high, "agreement_pairs": len(verdicts)},
        "agreement_no_room": count - len(verdicts),
        "agreement_letter_a": fmean(v.letter_a for v in verdicts) if verdicts else None,
    }
