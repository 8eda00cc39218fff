"""Cuts deduplication into phases: keys of every part, forests of ranges of keys, their merging, the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmtrain.config.clean.collect import CollectConfig
from llmtrain.config.clean.dedup import DedupConfig
from llmtrain.data.clean.dedup.drop import DropCopies
from llmtrain.data.clean.dedup.keys import FindCopies, MergeForests, WriteKeys
from llmtrain.data.clean.dedup.paragraphs import MarkParagraphs, WriteParagraphs
from llmtrain.data.clean.dedup.parts import Part, ReadPart, ordered_parts
from llmtrain.data.clean.dedup.tables import RANGES
from llmtrain.data.clean.files import RankWriter
from llmtrain.data.clean.phases import Phase

FAN_IN = 8  # forests that one task merges


def dedup_phases(
    settings: DedupConfig,
    inputs: Sequence[CollectConfig],
    root: str,
    tasks: Mapping[str, int],
    partitions: int = 16,
    examples: int = 20,
) -> list[Phase]:
    """Returns the phases that read `root/cleaned/NAME/RANK.jsonl.zst` and write `root/documents` in the same layout.

    `tasks` has the number of ranks of each input. The ranges of keys are compared by `partitions` tasks, 256 at most;
    the result does not depend on it. Up to `examples` dropped documents of each file go to `root/dedup/dropped`.
    """
    parts, partitions = ordered_parts(inputs, tasks), min(partitions, RANGES)
    phases, forest = copy_phases(settings, parts, root, partitions)
    marks: list[str] = []
    if settings.paragraphs:
        steps = [ReadPart(root, parts), WriteParagraphs(root, settings.paragraphs, parts, forest)]
        phases.append(Phase("dedup-paragraph-keys", steps, len(parts)))
        phases.append(Phase("dedup-paragraph-marks", [MarkParagraphs(root, parts)], partitions))
        marks = [f"marks/{rank:05d}" for rank in range(partitions)]
    for source in inputs:
        own = [part for part in parts if part.name == source.name]
        dropped = RankWriter(f"{root}/dedup/dropped/{source.name}") if examples else None
        drop = DropCopies(root, own, forest, marks, settings.paragraphs, dropped, examples)
        steps = [ReadPart(root, own), drop, RankWriter(f"{root}/documents/{source.name}")]
        phases.append(Phase(f"dedup-{source.name}", steps, len(own)))
    return phases


def copy_phases(
    settings: DedupConfig, parts: Sequence[Part], root: str, partitions: int
) -> tuple[list[Phase], str | None]:
    """Returns the phases that find copies of whole documents, and the name of the forest in which they end."""
    if not (settings.exact or settings.minhash):
        return [], None
    phases = [
        Phase("dedup-keys", [ReadPart(root, parts), WriteKeys(root, settings)], len(parts)),
        Phase("dedup-copies", [FindCopies(root, settings, parts)], partitions),
    ]
    level, forests = 0, partitions
    while forests > 1:
        level, below, forests = level + 1, forests, -(-forests // FAN_IN)
        merge = MergeForests(root, level, below, FAN_IN, len(parts))
        phases.append(Phase(f"dedup-merge-{level}", [merge], forests))
    return phases, f"forests/{level}/00000"
