"""Scores samples with a model behind a server; the trainers share the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from llmtrain.checkpoint.group import together
from llmtrain.data.post import ServerFault
from llmtrain.data.prompts import PromptSet
from llmtrain.parallel.mesh import Mesh
from llmtrain.rollout.served import ServedModel
from llmtrain.trainer.job import Job
from llmtrain.types import Group, Sample

PROBE = "12345 + 67 = 12412?\n\tif x <= 7: 'Ünï число 数学'\n"
PROBED_PROMPTS = 8


def ask_samples(
    mesh: Mesh, model: ServedModel, groups: Sequence[Group], column: str, asked: Callable[[Sample], bool]
) -> None:
    """Fills in a column of every sample: what the model says of each token that the policy wrote; 0 of other tokens,
    and of samples that it is not `asked` about.

    The same on every trainer (a collective): each sends its share of the samples. Raises OSError on all of them when
    one gets no answer that fits.
    """
    samples = list(chain.from_iterable(groups))
    for sample in samples:
        sample.columns[column] = [0.0] * len(sample.ids)
    chosen = [sample for sample in samples if asked(sample)]
    mine = chosen[mesh.rank :: mesh.size]
    parts = together(mesh, lambda: model.logprobs([sample.prompt_ids + sample.ids for sample in mine]))
    for rank, part in enumerate(parts):
        for sample, logprobs in zip(chosen[rank :: mesh.size], part, strict=True):
            own = logprobs[-len(sample.ids) :]
            sample.columns[column] = [x if t else 0.0 for x, t in zip(own, sample.trained, strict=True)]


def check_served(job: Job, key: str, model: ServedModel, prompts: PromptSet) -> None:
    """Asks the server for what a run will ask it, before anything is trained: ids of texts, and the log-probs of one of
    them and of the longest sequence that there can be (a collective; one rank asks).

    `key` names it in messages. Raises ValueError when its tokenizer gives other ids than the job's, OSError when it
    does not answer as it must. Tokens that no probed text has are not compared.
    """
    together(job.mesh, lambda: _check(job, key, model, prompts) if job.mesh.rank == 0 else None)


def _check(job: Job, key: str, model: ServedModel, prompts: PromptSet) -> None:
    texts = [PROBE, *filter(None, map(job.tokenizer.decode, prompts.ids[:PROBED_PROMPTS]))]
    for text, other in zip(texts, model.token_ids(texts), strict=True):
        own = job.tokenizer.encode(text, parse_special=False)
        if own not in (other, other[1:]):  # behind a token that begins every text
            raise ValueError(
                f"{key}={model.url}: its tokenizer gives {text[:60]!r} the ids {_shown(other)}, the student's "
                f"{_shown(own)}; both must be equal: serve a model of the same family, or fine-tune on text that it "
                "sampled"
            )
    longest = max(prompts.ids, key=len) + [job.tokenizer.eos_id] * job.config.rollout.max_new_tokens
    probed, _ = model.logprobs([job.tokenizer.encode(PROBE, parse_special=False), longest])
    if len({*probed}) == 1:
        raise ServerFault(
            f"{key}={model.url}: gives every token of {PROBE[:18]!r}... the log-prob {probed[0]:g}, as no language "
            "model does; mend the server, or give another one"
        )


def _shown(ids: Sequence[int]) -> str:
    """Returns the first of the ids, for people."""
    return f"{list(ids[:8])}{'' if len(ids) <= 8 else f' and {len(ids) - 8} more'}"
