"""Runs LitGPT as a contestant: its GPT and the training loop of its pretraining command, `litgpt.pretrain.fit`.

It requires an older huggingface-hub than transformers does, so it is installed without its dependencies:

    pip install --no-deps -r benchmarks/litgpt.txt
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import Turns
from benchmarks.task import OPTIM, Task
from llmtrain.config.schema import ModelConfig
from llmtrain.types import WeightSource

PACKAGES = ("litgpt", "lightning")


def installed() -> bool:
    return all(find_spec(name) for name in PACKAGES)


def pretrain(turns: Turns, task: Task) -> None:
    """Trains as `litgpt pretrain` does: the whole model compiled, cross-entropy in chunks, a log line each step.

    It favours LitGPT in one way: AdamW is fused, which litgpt asks for on GPUs only.
    """
    import lightning
    from lightning.fabric.loggers.logger import Logger
    from litgpt import pretrain as litgpt
    from litgpt.args import EvalArgs, TrainArgs

    class TakeTurns(Logger):
        name, version = "turns", 0

        def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
            pass

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            turns.done(metrics["loss"])
            turns.wait()

    precision = "bf16-mixed" if task.precision == "bf16" else "32-true"
    fabric = lightning.Fabric(devices=1, precision=precision, loggers=[TakeTurns()])
    fabric.launch()
    model = fabric.setup(torch.compile(build_model(task.model, task.source())))
    settings = {"lr": OPTIM.lr, "betas": OPTIM.betas, "weight_decay": OPTIM.weight_decay, "fused": True}
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), **settings))
    loader = _Rows(task)
    state = {"model": model, "optimizer": optimizer, "train_dataloader": loader, "iter_num": 0, "step_count": 0}
    train = TrainArgs(
        save_interval=None, log_interval=1, global_batch_size=task.seqs, micro_batch_size=task.seqs,
        max_tokens=task.total_steps * task.step_tokens, max_norm=OPTIM.grad_clip, lr_warmup_steps=0, min_lr=OPTIM.lr,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        turns.wait()
        litgpt.fit(
            fabric=fabric, devices=1, state=state, train_dataloader=loader, val_dataloader=_Rows(task, 1),
            out_dir=Path(out), tokenizer_dir=None, train=train,
            eval=EvalArgs(interval=task.total_steps + 1, max_iters=1, final_validation=False),
        )  # fmt: skip


class _Rows:
    """Loads ids [seqs, seq_len + 1], one batch a step."""

    def __init__(self, task: Task, steps: int | None = None) -> None:
        self.batches = task.rows().split(task.seqs)[:steps]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def build_model(c: ModelConfig, source: WeightSource) -> nn.Module:
    """Returns litgpt's GPT with these weights, fp32, embeddings tied where ours are."""
    from litgpt import GPT, Config

    config = Config(
        name="benchmark", block_size=c.max_positions, vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size,
        n_layer=c.num_layers, n_embd=c.hidden_size, n_head=c.num_heads, n_query_groups=c.num_kv_heads,
        head_size=c.head_dim, intermediate_size=c.ffn_size, rope_base=int(c.rope_theta), norm_eps=c.norm_eps,
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    model = GPT(config)
    model.load_state_dict(_weights(c, source))
    if c.tie_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    return model


def _weights(c: ModelConfig, source: WeightSource) -> dict[str, Tensor]:
    head = source("embed.weight" if c.tie_embeddings else "head.weight")
    weights = {"lm_head.weight": head, "transformer.wte.weight": source("embed.weight")}
    weights["transformer.ln_f.weight"] = source("norm.weight")
    names = {
        "norm_1": "attention_norm", "attn.proj": "attention.o", "norm_2": "feedforward_norm",
        "mlp.fc_1": "feedforward.gate", "mlp.fc_2": "feedforward.up", "mlp.proj": "feedforward.down",
    }  # fmt: skip
    for i in range(c.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        weights[f"{theirs}.attn.qkv.weight"] = torch.cat([source(f"{ours}.attention.{x}.weight") for x in "qkv"])
        for name, own in names.items():
            weights[f"{theirs}.{name}.weight"] = source(f"{ours}.{own}.weight")
    return weights
