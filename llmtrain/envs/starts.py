"""Reads a file of problems as the prompts with which the episodes of an environment begin."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.config.data import DataConfig
from llmtrain.data.encode import Encoded
from llmtrain.data.faults import Faults
from llmtrain.data.files import read_rows
from llmtrain.data.prompts import Starts
from llmtrain.data.rows import Example, Record, mapped
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.envs.build import Make
from llmtrain.envs.dialogue import Renderer, check_template


def starts_of(make: Make, keep_thinking: bool, new_rows: bool = False) -> Starts:
    """Returns what reads a file in place of `llmtrain.data.encode.encode_rows`: each row is given to an environment,
    and what that starts with is the prompt. A row that it refuses goes to the faults.

    The first row shows whether the chat template can render an episode: ValueError, with the remedy, where it cannot.
    See `check_template` for `keep_thinking` and `new_rows`.
    """

    def starts(path: str, tokenizer: Tokenizer, settings: DataConfig, faults: Faults) -> Iterator[Encoded]:
        renderer, checked = Renderer(tokenizer), False
        for where, record in read_rows(path, faults):
            environment = make()
            try:
                example = given(record, settings)
                messages = environment.start(example)
                ids = renderer.ids(renderer.rendered(messages, environment.tools), goes_on=False)
            except (Exception, SystemExit) as error:  # of a user's own code, too
                faults.add(where, str(error) or repr(error))
                continue
            finally:
                environment.close()
            if not checked:
                check_template(renderer, messages, environment.role, environment.tools, keep_thinking, new_rows)
                checked = True
            yield Encoded(where, Example(example, prompt=messages), ids, [False] * len(ids))

    return starts


def examples(path: str, tokenizer: Tokenizer, settings: DataConfig, faults: Faults) -> Iterator[Encoded]:
    """Yields the rows of a file for an agent, which makes its prompts itself: one token stands for them."""
    for where, record in read_rows(path, faults):
        try:
            example = given(record, settings)
        except ValueError as error:
            faults.add(where, str(error))
            continue
        yield Encoded(where, Example(example, prompt=[]), [tokenizer.eos_id], [False])


def given(record: Record, settings: DataConfig) -> Record:
    """Returns what an environment or an agent is given of a row. Raises ValueError where that is nothing: a prompt
    without an example would be answered without them (see `Episodes.generate`)."""
    example = mapped(record, settings.fields)
    if not example:
        raise ValueError("the row is empty; an environment or agent is given it, so write something, or remove it")
    return example
