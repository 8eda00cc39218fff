"""Compares the generator with the trainers after every sync of weights, as `rollout.verify` says.

A probe asks for samples as a step does, so it takes the path that the run's own samples take (prefill, shared
beginnings, prefix caches, decoding), and the trainers score what came. Checksums compare the weights alone, but all of
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, cycle, islice

from llmtrain.rollout.checksums import differing, noted
from llmtrain.rollout.generator import Weights
from llmtrain.trainer.gate import Disagreement, limit_of
from llmtrain.trainer.job import Job
from llmtrain.trainer.scored import score_samples
from llmtrain.trainer.served import PROBE
from llmtrain.types import Prompt, Sample, Sampling

PROMPT_TOKENS = 40  # more than two blocks of 16 tokens, by which serving engines keep prefixes, and than STEM_TOKENS
NEW_TOKENS = 2  # the first comes from the prompt's own forward, the second from the cache
SAMPLES = 4  # of each prompt
COLUMN = "probe_logprobs"


def load_verified(job: Job, weights: Weights, version: int) -> None:
    """Loads the weights into the generator of the job and compares it with the trainers (a collective over them).

    Raises Disagreement on every trainer.
    """
    verify, sent = job.config.rollout.verify, {}
    job.generator.load_weights(noted(weights, sent) if verify == "checksum" else weights, version)
    if verify == "checksum":
        compare_checksums(job, sent, version)
    if verify != "off":
        probe(job, version)


def compare_checksums(job: Job, sent: dict[str, str], version: int) -> None:
    """Compares the checksums of all tensors as this trainer sent them with what every copy of the model holds."""
    found = [differing(sent, held) for held in job.generator.checksums()]
    wrong = [f"{names[0]} of copy {i} ({len(names)} tensors differ there)" for i, names in enumerate(found) if names]
    told = [each for part in job.mesh.all_gather_json(wrong) for each in part]  # others may have sent other weights
    if told:
        raise Disagreement(
            f"rollout.verify=checksum: the generator does not hold weights of version {version} as the trainers sent "
            f"them, first in {told[0]}, of {len(found)} copies; both must have the same bytes, in one dtype: mend the "
            "transfer, and start again from a checkpoint before it broke"
        )


def probe(job: Job, version: int) -> None:
    """Compares log-probs of fresh samples from every copy of the model with the trainers' own of the same tokens."""
    r = job.config.rollout
    sampling = Sampling(NEW_TOKENS, SAMPLES, r.temperature)
    groups = job.generator.generate(probe_prompts(job), sampling)
    score_samples(job, job.engine, groups, COLUMN)
    samples = list(chain.from_iterable(groups))
    if wrong := {v for sample in samples for v in sample.versions} - {version}:
        raise Disagreement(
            f"rollout.verify={r.verify}: the generator samples with weights of version {min(wrong)} after those of "
            f"version {version} were sent; it must answer with the newest: mend its load_weights"
        )
    gap, limit = largest_gap(samples), limit_of(r.max_logprob_gap, job.config.engine.precision)
    if gap > limit:
        raise Disagreement(
            f"rollout.verify={r.verify}: after weights of version {version} were sent, generator and trainer differ by "
            f"{gap:.4g} in a token's log-prob, more than rollout.max_logprob_gap={limit}: they do not hold the same "
            "weights, the generator uses a cache of old ones, or they compute in too different a precision; "
            "rollout.verify=checksum compares the weights alone and names the first that differs"
        )


def largest_gap(samples: Sequence[Sample]) -> float:
    """Returns the largest difference between the log-probs of generator and trainer; infinity where one is not
    finite."""
    pairs = (zip(sample.logprobs, sample.columns[COLUMN], strict=True) for sample in samples)
    gaps = [abs(a - b) for a, b in chain.from_iterable(pairs)]
    return max((gap if math.isfinite(gap) else math.inf for gap in gaps), default=0.0)


def probe_prompts(job: Job) -> list[Prompt]:
    """Returns two prompts for each copy of the model, which differ in their last token, so that what they begin with is
    computed once where a generator does so. They are the same after every sync, so that an engine that keeps a prefix
    finds it again."""
    r = job.config.rollout
    copies = r.workers if r.placement == "separate" else job.mesh.size
    count = max(1, min(PROMPT_TOKENS, job.config.train.seq_len - NEW_TOKENS))
    text = job.tokenizer.encode(PROBE, parse_special=False)
    first = list(islice(cycle(text), count))
    second = [*first[:-1], next(token for token in text if token != first[-1])]
    return [Prompt(ids) for ids in (first, second) for _ in range(copies)]
