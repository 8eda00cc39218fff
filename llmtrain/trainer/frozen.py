"""Builds language models that a job only scores with, from directories of their own: teachers, judges."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizer import read_backend
from llmtrain.engine.base import Scorer
from llmtrain.engine.build import Role, build_frozen
from llmtrain.trainer.job import Job
from llmtrain.trainer.weights import start_source, tokenizer_beside


def build_scorer(job: Job, key: str, path: str) -> Scorer:
    """Returns the language model of a run or a Hugging Face directory, frozen and sharded over all ranks (a
    collective). Its embedding has as many rows as that of the job's model, so that both give probabilities to the same
    ids: rows that no token uses are dropped or added.

    `key` names it in messages. Raises ValueError when its tokenizer has other ids than the job's.
    """
    check_ids(job, key, path)
    changes = {"lora": None, "mtp_layers": 0, "vocab_size": job.model.vocab_size}
    model = resolve_model(ModelConfig(init_from=path)).model_copy(update=changes)
    parallel = job.config.parallel.model_copy(update={"stage_layers": None})
    source = start_source(job, model, path)
    return build_frozen(Role(key, model, parallel, job.config.engine, source), job.mesh)


def check_ids(job: Job, key: str, path: str) -> None:
    """Raises ValueError when the tokenizer of the model at `path` does not give every token the id that the job's
    gives it."""
    directory = tokenizer_beside(path)
    if directory is None:
        raise ValueError(
            f"{key}={path}: no tokenizer.json there, and its token ids must be the student's; put it beside the weights"
        )
    own = job.tokenizer.backend.get_vocab(with_added_tokens=True)
    other = read_backend(Path(directory)).get_vocab(with_added_tokens=True)
    if differing := sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token)):
        token = differing[0]
        raise ValueError(
            f"{key}={path}: its tokenizer gives {token!r} the id {other.get(token)}, the student's {own.get(token)} "
            f"({len(differing)} tokens differ); both must be equal: take a model of the same family, or fine-tune on "
            "text that it sampled"
        )


@contextlib.contextmanager
def awake(models: Sequence[Scorer], wait: bool) -> Iterator[None]:
    """Brings models that `wait` in host memory to the device, and back there at the end."""
    for model in models if wait else ():
        model.to_device()
    yield
    for model in models if wait else ():
        model.to_host()
