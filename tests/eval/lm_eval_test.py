"""The adapter for the lm-evaluation-harness: by hand, and (slow) against the harness's own `hf` model on an export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.lm_eval import LmEvalConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.types import Prompt, Sample, Sampling
from tests.model.llama import smollm2_directory
from tests.shared_data import shared_data

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance

from llmtrain.eval.lm_eval import DecoderLM, open_lm, tasks_of

TASKS = Path(__file__).with_name("lm_eval_tasks")
ALL = ("letters", "endings", "names", "last_word", "rolling", "shots", "short")
TEXT = "the cat sat on the mat. a dog ran to the red house, and how many eggs does she make every day? 12345 67890"
CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, ffn_size=48, num_heads=4, num_kv_heads=2, vocab_size=320, max_positions=256
)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def write_tokenizer(directory: Path, puts_bos: bool) -> None:
    """A byte-level BPE of 320 tokens, which puts <s> before a text or not."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    if puts_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    directory.mkdir(parents=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))


def export(directory: Path, puts_bos: bool = True) -> str:
    """A random model as a Hugging Face directory."""
    write_tokenizer(directory / "tokenizer", puts_bos)
    config = resolve_model(CONFIG)
    scaled = ((n, init_tensor(n, s, config, 0) * (8 if len(s) > 1 else 1)) for n, s in parameter_shapes(config).items())
    save_hf(str(directory / "hf"), config, scaled, torch.float32, str(directory / "tokenizer"), 1)
    return str(directory / "hf")


def requests(kind: str, arguments: list[tuple], task: str = "t") -> list[Instance]:
    return [Instance(kind, {}, each, i, metadata=(task, i, 1)) for i, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> DecoderLM:
    return open_lm(export(tmp_path_factory.mktemp("bos")))


def rows_of(lm: DecoderLM, monkeypatch: pytest.MonkeyPatch, arguments: list[tuple[str, str]]) -> list[tuple]:
    """The token rows that are scored for (context, continuation)."""
    rows: list = []
    monkeypatch.setattr(
        "llmtrain.eval.lm_eval.continuations", lambda m, r, d, b: rows.extend(r) or [(0.0, True)] * len(r)
    )
    lm.loglikelihood(requests("loglikelihood", arguments), disable_tqdm=True)
    return rows


def test_contexts_and_continuations(lm: DecoderLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A space at the end of a context moves to the continuation, both are encoded as one text; without a context BOS is
    the context; a text that begins with BOS gets no second one."""
    plain = load_tokenizer(lm.tokenizer.name_or_path)
    expected = [([0, *plain.encode("the cat")], plain.encode(" sat"))] * 2
    expected += [([0], plain.encode("the mat"))]
    expected += [([0, *plain.encode("a dog")], plain.encode(" ran"))]
    given = [("the cat ", "sat"), ("the cat", " sat"), ("", "the mat"), ("<s>a dog", " ran")]
    assert rows_of(lm, monkeypatch, given) == expected


def test_a_context_too_long_loses_its_beginning(lm: DecoderLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 257 tokens is predicted and no input."""
    ((given, following),) = rows_of(lm, monkeypatch, [("1 2 " * 200, "3 4")])
    assert len(given) + len(following) == 257 and given[0] != 0
    assert lm.tokenizer.decode(following) == " 3 4"
    with pytest.raises(ValueError, match=r"a continuation of \d+ tokens: must have 1 to model.max_positions=256"):
        rows_of(lm, monkeypatch, [("1", "3 4" * 300)])
    with pytest.raises(ValueError, match="a continuation of 0 tokens"):
        rows_of(lm, monkeypatch, [("", "<s>")])


def test_rolling_windows(lm: DecoderLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole windows of 256 tokens, and the rest with all the context that there is room for."""
    rows: list = []
    monkeypatch.setattr(
        "llmtrain.eval.lm_eval.continuations",
        lambda m, r, d, b: rows.extend(r) or [(-1.0 * len(f), True) for _, f in r],
    )
    text = " ".join(map(str, range(200)))
    ids = lm.tok_encode(text)
    whole, rest = divmod(len(ids), 256)
    assert whole >= 2 and rest > 0
    totals = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,), ("",), (text[:3],)]))
    assert totals == [-len(ids), -1.0, -len(lm.tok_encode(text[:3]))]  # of no text BOS alone is left
    rows = rows[: whole + 1]
    assert [tuple(map(len, row)) for row in rows] == [(1, 256)] * whole + [(257 - rest, rest)]
    assert [t for _, following in rows for t in following] == ids and rows[0][0] == [0]


def completions(lm: DecoderLM, context: str, **settings: Any) -> str:
    return lm.generate_until(requests("generate_until", [(context, settings)]))[0]


def test_completions_end_where_they_should(lm: DecoderLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = completions(lm, "the cat", until=[], max_gen_toks=40)
    assert len(lm.tokenizer.encode(whole, add_special_tokens=False)) > 20
    stop = whole[10:13]
    assert completions(lm, "the cat", until=stop, max_gen_toks=40) == whole.split(stop)[0]
    assert whole.startswith(completions(lm, "the cat", until=["never there"], max_gen_toks=5))
    assert completions(lm, "the cat", until=[], max_gen_toks=40, do_sample=False, temperature=1.0) == whole
    prompts: list = []
    monkeypatch.setattr(lm, "generator", Recording(prompts))
    completions(lm, "1 2 " * 200, until=[], max_gen_toks=250)
    assert prompts == [lm.tok_encode("1 2 " * 200)[-6:]]  # 256 positions less 250


class Recording:
    """A generator that says nothing, and records prompts."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompts = prompts

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Sample]]:
        self.prompts += [prompt.ids for prompt in prompts]
        return [[Sample(prompt.ids, [1], [True], [0.0], [0], True)] for prompt in prompts]


def test_what_the_generator_cannot_do_is_refused(lm: DecoderLM) -> None:
    with pytest.raises(ValueError, match=r"generation_kwargs.num_beams: the generator knows until, .*; remove it"):
        completions(lm, "a", until=[], num_beams=3)
    with pytest.raises(ValueError, match=r"max_gen_toks=256: must be less than model.max_positions=256, .*; lower it"):
        completions(lm, "a", until=[], max_gen_toks=256)


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: own\n")
    with pytest.raises(
        ValueError, match=r"eval.lm_eval.tasks=owm: lm_eval .* has no such task, nor has .*include_path="
    ):
        tasks_of(LmEvalConfig(tasks=["own", "owm"], include_path=str(tmp_path), include_defaults=False))


def settled(results: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in results.items() if isinstance(v, float | int) and k != "sample_len"}


def compare(directory: str, task: str, limit: int, tolerance: float, **options: Any) -> None:
    """Equal results and equal answers, one by one."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = []
    for model in (open_lm(directory), HFLM(directory, device="cpu", dtype="float32", batch_size=4)):
        settings = {"limit": limit, "bootstrap_iters": 0, "log_samples": True, "task_manager": manager}
        found.append(simple_evaluate(model, tasks=[f"llmtrain_{task}"], **settings, **options))
    ours, theirs = found
    name = f"llmtrain_{task}"
    assert settled(ours["results"][name]) == pytest.approx(settled(theirs["results"][name]), rel=tolerance)
    for a, b in zip(ours["samples"][name], theirs["samples"][name], strict=True):
        assert a["arguments"] == b["arguments"]
        for left, right in zip(a["resps"], b["resps"], strict=True):
            assert same(left[0], right[0], tolerance), (left, right)


def same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return a == (pytest.approx(b, rel=tolerance) if isinstance(b, float) else b)


@pytest.mark.slow
@pytest.mark.parametrize("task", ALL)
def test_scores_equal_those_of_hf_on_an_export(task: str, tmp_path: Path) -> None:
    """Prompts are longer than the model's 256 positions in most tasks. fp32 rounds by 1e-7 of a sum; sums of layers in
    another order by some times that."""
    shared_data("gsm8k")
    compare(export(tmp_path), task, 4, 2e-5)


@pytest.mark.slow
def test_scores_equal_those_of_hf_without_bos_and_in_a_chat_template(tmp_path: Path) -> None:
    shared_data("gsm8k")
    compare(export(tmp_path / "bare", puts_bos=False), "endings", 4, 2e-5)
    for task in ("short", "letters", "endings"):
        compare(
            export(tmp_path / task), task, 4, 2e-5, apply_chat_template=True, fewshot_as_multiturn=task == "letters"
        )


@pytest.mark.slow
def test_single_requests_equal_those_of_hf(tmp_path: Path) -> None:
    """Texts of every kind; and tokens that are greedy ones, which samples seldom are."""
    from lm_eval.models.huggingface import HFLM

    directory = export(tmp_path)
    ours, theirs = open_lm(directory), HFLM(directory, device="cpu", dtype="float32", batch_size=3)
    pairs = [(c, " sat on") for c in ("the cat", "", "<s>a dog ", "eggs " * 100, "<s>")]
    found = [m.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True) for m in (ours, theirs)]
    given = [ours.tok_encode(text) for text in ("the cat", "a dog ran", "eggs")]
    groups = ours.generator.generate([Prompt(ids) for ids in given], Sampling(5, temperature=0))
    rows = [(("", ""), ids, group[0].ids) for ids, group in zip(given, groups, strict=True)]
    found = [a + m._loglikelihood_tokens(rows, disable_tqdm=True) for a, m in zip(found, (ours, theirs), strict=True)]
    assert [g for _, g in found[0]] == [g for _, g in found[1]] == [False] * 5 + [True] * 3
    assert [v for v, _ in found[0]] == pytest.approx([v for v, _ in found[1]], rel=2e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("task", ALL)
def test_scores_equal_those_of_hf_on_smollm2(task: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A token's log-prob in fp32 differs from that in fp64 by up to 1e-4 in this model."""
    shared_data("gsm8k")
    compare(str(smollm2_directory(tmp_path_factory)), task, 2, 2e-4)


@pytest.mark.slow
def test_the_command_writes_eval_json(tmp_path: Path) -> None:
    shared_data("gsm8k")
    directory = export(tmp_path)
    section = {"tasks": ["llmtrain_endings"], "include_path": str(TASKS), "include_defaults": False, "limit": 4}
    document = {
        "name": "measured",
        "run_dir": str(tmp_path / "run"),
        "model": {"init_from": directory},
        "tokenizer": {"path": directory},
        "engine": {"precision": "fp32"},
        "eval": {"text": False, "problems": 0, "lm_eval": section},
    }
    (tmp_path / "eval.yaml").write_text(json.dumps(document))  # JSON is YAML
    command = [sys.executable, "-m", "llmtrain", "eval", str(tmp_path / "eval.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "eval.json").read_text())["lm_eval"]["tasks"]["llmtrain_endings"]
    assert set(result) == {
        "acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none", "problems", "version"
    }  # fmt: skip
    assert result["problems"] == 4
    done = subprocess.run([*command, "eval.lm_eval.tasks=[no_such]"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "eval.lm_eval.tasks=no_such: lm_eval" in done.stderr + done.stdout
