"""Runs tasks of the lm-evaluation-harness on our models: the only file that imports lm_eval.

A score equals that of the library's own `hf` model on an export of the same weights, to rounding: texts are encoded by
the tokenizer that transformers loads, and contexts, windows, stop texts and defaults are treated by the library's own
functions or as its `HFLM` treats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from lm_eval import __version__ as VERSION
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.source import load_decoder
from llmtrain.config.lm_eval import LmEvalConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.ends import end_ids
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.eval.continuations import continuations
from llmtrain.model.decoder import Decoder
from llmtrain.observe.log import log
from llmtrain.rollout.generator import Generator
from llmtrain.rollout.native import NativeGenerator
from llmtrain.types import Prompt, Sampling

MAX_GEN_TOKENS = 256  # where a task says nothing, as HFLM
BATCH_SEQS = 64  # completions decoded together

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""Holds a request with the tokens of its context and of its continuation."""


class DecoderLM(TemplateLM):
    """Answers the harness's requests with a Decoder and a Generator, which hold the same weights.

    `ends` are the tokens that end a completion. `add_bos_token`: BOS before a text, None = as the tokenizer does.
    """

    def __init__(
        self,
        model: Decoder,
        generator: Generator,
        tokenizer: Tokenizer,
        ends: Sequence[int],
        add_bos_token: bool | None = None,
        batch_tokens: int = 2048,
    ) -> None:
        super().__init__()
        self.model, self.generator, self.ends = model, generator, tuple(ends)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer.hugging_face
        self.add_bos_token, self.batch_tokens = add_bos_token, batch_tokens
        self.max_length = model.config.max_positions
        self._device = next(model.parameters()).device
        self._encoded = lru_cache(4096)(self._encode)  # the context of a question comes with each of its options

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Returns the token before a text without context: BOS, or else the end of text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Returns token ids; without `add_special_tokens` a text that begins with BOS gets no second one."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = False
        return list(self._encoded(string, special))

    def _encode(self, text: str, special: bool | None) -> tuple[int, ...]:
        chosen = {} if special is None else {"add_special_tokens": special}
        return tuple(self.tokenizer.encode(text, **chosen))

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **kwargs: object) -> list[tuple[float, bool]]:
        """Returns (log-prob, is greedy) of each continuation; a context too long loses its first tokens."""
        rows = [self._fitted(context, continuation) for _, context, continuation in requests]
        scored = continuations(self.model, rows, self._device, self.batch_tokens)
        for (texts, *_), each in zip(requests, scored, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(each))
        return [tuple(each) for each in scored]

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens: must have 1 to model.max_positions={self.max_length}; "
                "correct the task"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-prob of each whole text, in disjoint windows of `max_length` tokens with all the context that
        fits."""
        owners, windows = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                owners.append(number)
                windows.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the completions, cut at their stop texts. Requests of one task with equal settings share a batch."""

        def settings(number: int) -> tuple[str, str]:
            return str(requests[number].task_name), repr(requests[number].args[1])

        found: dict[int, str] = {}
        for _, group in groupby(sorted(range(len(requests)), key=settings), settings):
            numbers = list(group)
            contexts = [requests[number].args[0] for number in numbers]
            found.update(zip(numbers, self._completions(contexts, requests[numbers[0]].args[1]), strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[number])
        return [found[number] for number in range(len(requests))]

    def _completions(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Returns the completions of contexts under one `generation_kwargs` of a task."""
        wanted = normalize_gen_kwargs(settings, MAX_GEN_TOKENS)
        until = handle_stop_sequences(wanted.pop("until"), self.tokenizer.decode(self.eot_token_id))
        sampling = self._sampling(wanted, [text for text in until if text])
        room = self.max_length - sampling.max_new_tokens
        if room <= 0:
            raise ValueError(
                f"max_gen_toks={sampling.max_new_tokens}: must be less than model.max_positions={self.max_length}, "
                "which holds the prompt too; lower it in generation_kwargs of the task"
            )
        prompts = [Prompt(self._prompt_ids(text)[-room:], number) for number, text in enumerate(contexts)]
        samples = [group[0].ids for group in self.generator.generate(prompts, sampling)]
        texts = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in samples)
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _prompt_ids(self, text: str) -> list[int]:
        bos = has_bos_prefix(text, self.tokenizer.bos_token)
        return list(self._encoded(text, False if bos else self.add_bos_token))

    def _sampling(self, wanted: dict[str, Any], until: Sequence[str]) -> Sampling:
        """Returns the settings of one completion. Raises ValueError for one that the generator does not have."""
        sampled, tokens = wanted.pop("do_sample", None), int(wanted.pop("max_gen_toks"))
        temperature = float(wanted.pop("temperature", 0.0))
        top_p, top_k = float(wanted.pop("top_p", 1.0)), int(wanted.pop("top_k", 0))
        if wanted:
            raise ValueError(
                f"generation_kwargs.{next(iter(wanted))}: the generator knows until, max_gen_toks, do_sample, "
                "temperature, top_p and top_k; remove it from the task"
            )
        if sampled is False:
            temperature = 0.0
        return Sampling(tokens, 1, temperature, top_p, top_k, self.ends, tuple(until))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text; without `add_generation_prompt` its last message is to be continued."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def open_lm(path: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> DecoderLM:
    """Returns the model in a Hugging Face directory, an export or a run, for `lm_eval.simple_evaluate(model=...)`.

    `options` are those of `DecoderLM`. Example: open_lm("runs/tiny/export", add_bos_token=True)
    """
    model = load_decoder(path, resolve_model(ModelConfig(init_from=path)), dtype).to(device).eval()
    tokenizer = load_tokenizer(path)
    return lm_of(model, tokenizer, end_ids(tokenizer, (path,)), **options)


def lm_of(model: Decoder, tokenizer: Tokenizer, ends: Sequence[int], **options: Any) -> DecoderLM:
    """Returns a loaded model as one of the harness, with the native generator."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special=False)

    generator = NativeGenerator(model, BATCH_SEQS, next(model.parameters()).device, None, decode)
    return DecoderLM(model, generator, tokenizer, ends, **options)


def tasks_of(section: LmEvalConfig) -> TaskManager:
    """Returns the tasks that the section may name. Raises ValueError for one that there is not."""
    manager = TaskManager(include_path=section.include_path, include_defaults=section.include_defaults)
    unknown = [name for name in section.tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            f"eval.lm_eval.tasks={unknown[0]}: lm_eval {VERSION} has no such task, nor has "
            f"eval.lm_eval.include_path={section.include_path}; `lm-eval ls tasks` lists them"
        )
    return manager


def scores_of(
    section: LmEvalConfig, manager: TaskManager, model: Decoder, tokenizer: Tokenizer, ends: Sequence[int]
) -> dict[str, Any]:
    """Returns the results by task: the harness's metrics under its names (`acc,none`, `acc_stderr,none`, ...),
    `problems`, how many documents there were, and `version`, that of the task; with `harness`, the library's version.

    Data sets that a task names are read by `datasets`, which fetches what is not in its cache.
    """
    log(f"lm_eval {VERSION}: {', '.join(section.tasks)}; data sets of the hub are fetched unless `datasets` has them")
    results = simple_evaluate(
        lm_of(model, tokenizer, ends, add_bos_token=section.add_bos_token, batch_tokens=section.batch_tokens),
        tasks=manager.match_tasks(section.tasks),
        num_fewshot=section.num_fewshot,
        limit=section.limit,
        bootstrap_iters=section.bootstrap_iters,
        log_samples=False,
        system_instruction=section.system_instruction,
        apply_chat_template=section.chat_template,
        fewshot_as_multiturn=section.chat_template and section.fewshot_as_multiturn,
        task_manager=manager,
    )
    assert results is not None, "one process"
    return {"harness": VERSION, "tasks": {name: _numbers(results, name) for name in results["results"]}}


def _numbers(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns what eval.json holds of a task or group; a standard error that there is none of is left out."""
    metrics = {k: v for k, v in results["results"][name].items() if isinstance(v, int | float) and k != "sample_len"}
    counted = results["n-samples"].get(name, {}).get("effective")
    return {**metrics, "problems": counted, "version": results["versions"].get(name)}
