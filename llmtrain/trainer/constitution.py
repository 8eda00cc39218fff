"""Lets a model criticise, revise and compare answers by principles (arXiv 2212.08073, sections 3.1 and 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmtrain.config.schema import ConstitutionalConfig
from llmtrain.data.asked import messages_of, spoken
from llmtrain.data.chat import Message
from llmtrain.data.principles import Principle, drawn
from llmtrain.data.prompts import PromptSet
from llmtrain.data.rows import Example
from llmtrain.data.sampler import derive
from llmtrain.eval.comparing import both_orders, clamped, preferred_a
from llmtrain.trainer.speaker import Question, Said, Speaker

COMPARE = """Here is a conversation.

{conversation}

{question}

(A) {a}

(B) {b}
"""
CHOOSE = "Answer with (A) or (B)."
THINK = "Think about both answers first, in a few sentences. Choose only then."
CHOICE = "The better answer is ("
THOUGHT = "\n\nSo the better answer is ("


@dataclass
class Draft:
    """Holds an answer on its way through critiques and revisions."""

    number: int  # of the prompt in the order of the seed
    example: Example
    turns: list[dict[str, str]] = field(default_factory=list)  # kind, text and, of a critique or revision, principle
    answer: str = ""  # the newest
    lost: str | None = None  # why it was given up: no room, cut off, empty

    def add(self, kind: str, text: str, principle: Principle | None = None) -> None:
        """Notes a turn."""
        named = {} if principle is None else {"principle": principle.name}
        self.turns.append({"kind": kind, "text": text, **named})

    @property
    def transcript(self) -> dict[str, Any]:
        """Returns the line of transcripts.jsonl."""
        lost = {} if self.lost is None else {"lost": self.lost}
        return {"problem": self.number, "prompt": spoken(messages_of(self.example)), "turns": self.turns, **lost}


@dataclass(frozen=True)
class Comparison:
    """Holds two answers to compare. `purpose` names the random stream."""

    messages: list[Message]
    first: str
    second: str
    principle: Principle
    purpose: str


@dataclass(frozen=True)
class Verdict:
    """Holds what came of a comparison."""

    first_better: float  # the probability that the first is better, the mean of both orders
    letter_a: float  # the mean probability of (A) over both orders: 0.5 without a preference for a letter
    thoughts: tuple[str, ...] = ()


def revised(speaker: Speaker, principles: list[Principle], prompts: PromptSet, numbers: Sequence[int]) -> list[Draft]:
    """Returns a draft for each of these numbers of prompts, after `constitutional.revisions` rounds of critique and
    revision, each by a principle drawn at random.

    Every round begins with the prompt and the newest answer alone. A draft whose revision is cut off, empty, or leaves
    no room for the next question is given up.
    """
    settings, seed = speaker.config.constitutional, speaker.config.seed
    drafts = []
    for number, group in zip(numbers, speaker.sample(prompts, numbers, "constitutional", samples=1), strict=True):
        draft = Draft(number, prompts.parsed[prompts.around(number, seed)])
        draft.answer = draft.example.prefill + speaker.said(group[0]).text
        draft.add("answer", draft.answer)
        drafts.append(draft)
    for turn in range(settings.revisions):
        going = [draft for draft in drafts if draft.lost is None]
        chosen = [drawn(principles, seed, f"principle/{draft.number}/{turn}") for draft in going]
        revise(speaker, going, chosen, turn)
    return drafts


def revise(speaker: Speaker, drafts: Sequence[Draft], principles: Sequence[Principle], turn: int) -> None:
    """Makes one round of critique and revision, in place."""
    settings, seed = speaker.config.constitutional, speaker.config.seed
    talks = [
        [*messages_of(draft.example), assistant(draft.answer), user(principle.critique)]
        for draft, principle in zip(drafts, principles, strict=True)
    ]
    critiques = speaker.answer(asked(talks, drafts, seed, f"critique/{turn}"), settings.critique_tokens)
    for talk, draft, principle, critique in zip(talks, drafts, principles, critiques, strict=True):
        text = critique[0].text if critique else ""
        draft.lost = None if critique else "no room"
        draft.add("critique", text, principle)
        talk += [assistant(text), user(principle.revision)]
    revisions = speaker.answer(asked(talks, drafts, seed, f"revision/{turn}"), speaker.sampling.max_new_tokens)
    for draft, principle, revision in zip(drafts, principles, revisions, strict=True):
        if draft.lost is None:
            take(draft, principle, revision)


def take(draft: Draft, principle: Principle, revision: list[Said] | None) -> None:
    """Makes a revision the newest answer of a draft, or gives the draft up."""
    if revision is None:
        draft.lost = "no room"
        return
    draft.answer = revision[0].text
    draft.add("revision", draft.answer, principle)
    if not (revision[0].finished and draft.answer):
        draft.lost = "cut off" if draft.answer else "empty"


def asked(talks: Sequence[list[Message]], drafts: Sequence[Draft], seed: int, purpose: str) -> list[Question]:
    """Returns the questions that conversations end with."""
    return [
        Question(list(talk), "", derive(seed, f"{purpose}/{draft.number}"))
        for talk, draft in zip(talks, drafts, strict=True)
    ]


def compared(speaker: Speaker, comparisons: Sequence[Comparison]) -> list[Verdict | None]:
    """Returns the verdict on each comparison, None where the question leaves no room.

    `label: logprobs`: the normalised probabilities of (A) and (B). `thought`: the model writes what it thinks first, in
    both orders, and the probabilities behind that are clamped to `clamp`, as they are near 0 and 1.
    """
    settings = speaker.config.constitutional
    orders = [asked_twice(comparison, settings, speaker.config.seed) for comparison in comparisons]
    questions = [question for both in orders for question in both]
    if settings.label == "logprobs":
        thoughts = [""] * len(questions)
        logs = speaker.choose([replace(question, prefill=CHOICE) for question in questions], ("A", "B"))
        found = [None if each is None else preferred_a(*each) for each in logs]
    else:
        thoughts, found = behind_thoughts(speaker, questions)
    return [verdict(found[i : i + 2], thoughts[i : i + 2]) for i in range(0, len(found), 2)]


def behind_thoughts(speaker: Speaker, questions: Sequence[Question]) -> tuple[list[str], list[float | None]]:
    """Returns what the model thinks of each question, and behind that the clamped probability of (A); None where one of
    the two leaves no room."""
    settings = speaker.config.constitutional
    thoughts = speaker.answer(questions, settings.thought_tokens)
    told = [i for i, thought in enumerate(thoughts) if thought is not None]
    ready = [replace(questions[i], prefill=thoughts[i][0].text + THOUGHT) for i in told]
    found: list[float | None] = [None] * len(questions)
    for i, logs in zip(told, speaker.choose(ready, ("A", "B")), strict=True):
        found[i] = None if logs is None else clamped(preferred_a(*logs), *settings.clamp)
    return [thought[0].text if thought else "" for thought in thoughts], found


def verdict(orders: Sequence[float | None], thoughts: Sequence[str]) -> Verdict | None:
    """Returns the verdict from the probabilities of (A) in both orders, None where one is missing."""
    one, other = orders
    if one is None or other is None:
        return None
    return Verdict(both_orders(one, other), (one + other) / 2, tuple(filter(None, thoughts)))


def asked_twice(comparison: Comparison, settings: ConstitutionalConfig, seed: int) -> list[Question]:
    """Returns the question of a comparison in both orders."""
    end = THINK if settings.label == "thought" else CHOOSE
    about = {"conversation": spoken(comparison.messages), "question": comparison.principle.question}
    orders = ((comparison.first, comparison.second), (comparison.second, comparison.first))
    texts = [COMPARE.format(**about, a=a, b=b) + "\n" + end for a, b in orders]
    return [Question([user(text)], "", derive(seed, f"{comparison.purpose}/{i}")) for i, text in enumerate(texts)]


def user(text: str) -> Message:
    """Returns a turn of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Returns a turn of the assistant."""
    return {"role": "assistant", "content": text}
