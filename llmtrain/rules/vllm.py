"""Checks what a vLLM server that samples needs: an interpreter, a model that it serves, sampling that it can do."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.arch.mup import without_mup
from llmtrain.arch.resolve import hf_config
from llmtrain.config.machine import has_gpu
from llmtrain.config.schema import ModelConfig
from llmtrain.config.vllm import LEAST_TEMPERATURE, NO_CHECKSUMS, VLLM_VERSION, installed_version, truncates
from llmtrain.rules.case import Case, Rules, command, either, here, samples

SERVED = ("llama", "gpt2", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3-moe")  # see rollout/vllm_test.py

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # head_dim that the attention of the CPU build has


def _wanted(case: Case) -> bool:
    """Holds where a server is started: for rollouts, for an evaluation that samples, and beside training."""
    config = case.config
    if config.rollout.generator != "vllm":
        return False
    beside = config.eval.every_steps > 0 and config.eval.problems > 0 and config.data.held_out is not None
    evaluates = case.command == "eval" and bool(config.eval.problems or config.eval.tasks)
    return (samples(case) and config.rollout.replay is None) or evaluates or (case.recipe is not None and beside)


def _interpreter(case: Case) -> Iterator[str]:
    python = case.config.rollout.vllm.python
    if fault := lacking(python):
        yield f"rollout.vllm.python={python}: {fault}"


def lacking(python: str) -> str | None:
    """Returns why an interpreter does not serve, with the remedy; None where it does."""
    found = installed_version(python)
    if found == VLLM_VERSION:
        return None
    has = f"has vLLM {found}, and {VLLM_VERSION} is needed" if found else "is no interpreter that has vLLM"
    return f"{has}; run bash launch/vllm.sh, or name the interpreter of another place"


def _model(case: Case) -> Iterator[str]:
    if case.model is None:
        return
    fault = unserved(case.model, case.planned)
    if fault:
        yield f"model.family={case.model.family}: {fault}; use rollout.generator=native"


def unserved(model: ModelConfig, planned: bool = False) -> str | None:
    """Returns why vLLM does not serve a resolved model as we export it, None where it does; `planned`: on a machine
    that may have other hardware than this."""
    if model.family not in SERVED:
        return f"vLLM serves {', '.join(SERVED)} as we export them, and this was not shown to be equal"
    try:
        hf_config(without_mup(model) if model.mup else model)
    except ValueError as error:
        return f"vLLM reads a config.json, which cannot say this model ({str(error).partition(';')[0]})"
    if not planned and not has_gpu() and model.head_dim not in CPU_HEADS:
        sizes = ", ".join(map(str, CPU_HEADS))
        return f"model.head_dim={model.head_dim}: vLLM's attention on a CPU has heads of {sizes}"
    return None


def _sampling(case: Case) -> Iterator[str]:
    r = case.config.rollout
    if r.temperature < LEAST_TEMPERATURE:
        yield (
            f"rollout.temperature={r.temperature:g}: must be at least {LEAST_TEMPERATURE} with "
            "rollout.generator=vllm, which takes that for less; raise it, or use native"
        )
    if r.temperature != 1 and truncates(r.top_p, r.top_k):
        yield (
            f"rollout.temperature={r.temperature:g}: must be 1 with rollout.generator=vllm and rollout.top_p="
            f"{r.top_p:g}, rollout.top_k={r.top_k}, as vLLM gives no log-probs of a temperature before truncation; "
            "set it to 1, remove the truncation, or use native"
        )


def _native_alone(case: Case) -> Iterator[str]:
    yield (
        f"rollout.generator={case.config.rollout.generator}: {case.command} samples and scores with one model, in its "
        "own process; remove it"
    )


def _speaks_natively(case: Case) -> bool:
    """Holds for commands whose model answers in their own process."""
    return case.command in ("judge", "constitutional") and case.config.rollout.generator != "native"


def _unread(case: Case) -> Iterator[str]:
    tp = case.config.rollout.tp
    if tp > 1 and case.config.rollout.generator == "native":
        yield f"rollout.tp={tp}: only with rollout.generator=vllm, native samples from whole models; use vllm, or 1"


def _together(case: Case) -> Iterator[str]:
    tp, heads = case.config.rollout.tp, case.model.num_heads if case.model else 0
    if tp > 1 and not case.planned and has_gpu():
        yield (
            f"rollout.tp={tp}: must be 1 with a GPU, as nothing says which GPUs a server shares with whom; set it to 1"
        )
    if heads % tp:
        yield f"rollout.tp={tp}: must divide model.num_heads={heads}, which the processes share; change it"


def _verify(case: Case) -> Iterator[str]:
    r = case.config.rollout
    if r.verify == "checksum" and r.placement != "ahead":  # whose own rule says so
        yield NO_CHECKSUMS


VLLM_RULES: Rules = (
    (here(_wanted), _interpreter),
    (_wanted, _model),
    (_wanted, _sampling),
    (_wanted, _together),
    (_wanted, _verify),
    (_speaks_natively, _native_alone),
    (either(samples, command("eval")), _unread),
)
