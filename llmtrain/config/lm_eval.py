"""Defines the keys of `eval.lm_eval`: tasks of the lm-evaluation-harness."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from llmtrain.config.section import Section, UserPath


class LmEvalConfig(Section):
    """Names tasks of the lm-evaluation-harness (extra `eval`) that `llmtrain eval` runs; see
    docs/evaluation/lm_eval.md."""

    tasks: list[str] = Field([])  # tasks, groups, tags or patterns such as mmlu_*; [] = none
    include_path: UserPath | None = None  # directory with task files of your own, before those of the library
    include_defaults: bool = True  # the library's own tasks too; false starts some seconds sooner
    limit: PositiveInt | None = None  # first documents of each task; None = all
    num_fewshot: int | None = Field(None, ge=0)  # examples before a document; None = as the task says
    chat_template: bool = False  # prompts are conversations in the tokenizer's chat template
    fewshot_as_multiturn: bool = True  # with chat_template: each example is a turn of user and of assistant
    system_instruction: str | None = None  # text before everything else, with chat_template the system turn
    add_bos_token: bool | None = None  # put BOS before a text; None = as the tokenizer does
    bootstrap_iters: int = Field(1000, ge=0)  # resamples for standard errors of metrics that are no means; 0 = no error
    batch_tokens: PositiveInt = 2048  # tokens in a forward, padding counted; no score depends on it
