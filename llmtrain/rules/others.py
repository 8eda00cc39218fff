"""Checks the models that a recipe has beside the main one (`Recipe.weights`): each takes the same mesh."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from llmtrain.arch.resolve import resolve_model
from llmtrain.arch.start import with_scalar_head
from llmtrain.config.schema import ModelConfig
from llmtrain.rules.attention import ATTENTION_RULES
from llmtrain.rules.case import Case
from llmtrain.rules.layout import LAYOUT_RULES
from llmtrain.rules.model import MODEL_RULES


def other_models(case: Case) -> Iterator[str]:
    """Yields what is wrong with each, `key: line`: it is not there, has no fitting head, is too short for the rows, or
    does not fit the layout."""
    if (recipe := case.recipe) is None:
        return
    for key, path in (dict.fromkeys(recipe.values) | dict(recipe.weights(case.config))).items():
        if path is not None and case.missing_model(path):
            yield f"{key}={path}: does not exist; give the directory of a model or of an earlier stage"
            continue
        try:
            model = case.model if path is None else resolve_model(ModelConfig(init_from=path), case.earlier)
        except ValueError as error:
            if os.path.exists(path):  # else a stage before has a fault of its own
                yield from (f"{key}: {line}" for line in str(error).splitlines())
            continue
        if model is not None:
            yield from (f"{key}: {line}" for line in _unfit(_with_layers(case, path), model, key in recipe.values))


def _with_layers(case: Case, path: str | None) -> Case:
    """Returns the case for a model from `path`, whose layers `parallel.stage_layers` does not count; None: for one on
    the main model's body."""
    if path is None:
        return case
    parallel = case.config.parallel.model_copy(update={"stage_layers": None})
    return replace(case, config=case.config.model_copy(update={"parallel": parallel}))


def _unfit(case: Case, model: ModelConfig, gives_values: bool) -> Iterator[str]:
    """Yields what the model cannot do in this case. A language model's vocabulary has as many rows as that of the
    trained model."""
    if model.head != "lm" and not gives_values:
        yield f"model.head={model.head}: must be lm, log-probs of tokens are asked for; give a language model"
    if model.max_positions < case.config.train.seq_len:
        yield (
            f"model.max_positions={model.max_positions}: must be at least train.seq_len={case.config.train.seq_len}; "
            "lower seq_len, or give another model"
        )
    rows = model.vocab_size if case.model is None or gives_values else case.model.vocab_size
    model = with_scalar_head(model) if gives_values else model.model_copy(update={"vocab_size": rows})
    config = case.config.model_copy(update={"model": model})
    own = replace(case, model=model, config=config, command="plan")  # rules of a recipe are about its main model
    for holds, rule in (*LAYOUT_RULES, *MODEL_RULES, *ATTENTION_RULES):
        if holds(own):
            yield from rule(own)
