"""Runs contestants on transformers: a plain loop, its Trainer, and its Trainer on DeepSpeed."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common import Turns
from benchmarks.task import OPTIM, Task
from llmtrain.arch.families.llama import FAMILY
from llmtrain.arch.resolve import hf_config
from llmtrain.model.decoder import parameter_shapes


def loop(turns: Turns, task: Task, compiled: bool) -> None:
    """Trains in a loop as tutorials show it: autocast, the model's own loss, clipping, fused AdamW."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, batches = _model(task).to(device), task.batches()
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": OPTIM.weight_decay},
         {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}],
        lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, fused=True,
    )  # fmt: skip
    if compiled:
        model.compile()
    while turns.wait():
        batch = next(batches).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=task.precision == "bf16"):
            loss = model(batch.input_ids, labels=batch.labels, shift_labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        turns.done(loss.item())


def trainer(turns: Turns, task: Task, deepspeed: bool = False) -> None:
    """Trains with transformers.Trainer on a dataset of the rows, logging each step, as llmtrain does.

    In bf16 it holds fp32 weights under autocast, or those of DeepSpeed ZeRO-1.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class TakeTurns(TrainerCallback):
        def on_log(self, args: object, state: object, control: object, logs: dict, **_: object) -> None:
            if "loss" in logs:
                turns.done(logs["loss"])
                control.should_training_stop = not turns.wait()

    gpu, bf16 = torch.cuda.is_available(), task.precision == "bf16"
    columns = ({"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in task.rows())
    with tempfile.TemporaryDirectory() as scratch:
        backend = _deepspeed_on_one_rank(scratch, bf16) if deepspeed else {"bf16": bf16, "use_cpu": not gpu}
        arguments = TrainingArguments(
            scratch, per_device_train_batch_size=task.seqs, max_steps=task.total_steps, **backend,
            optim="adamw_torch_fused", learning_rate=OPTIM.lr, adam_beta1=OPTIM.betas[0], adam_beta2=OPTIM.betas[1],
            weight_decay=OPTIM.weight_decay, max_grad_norm=OPTIM.grad_clip, lr_scheduler_type="constant",
            train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=gpu,
        )  # fmt: skip
        run = Trainer(_model(task), arguments, train_dataset=list(columns), callbacks=[TakeTurns()])
        run.remove_callback(PrinterCallback)
        turns.wait()
        run.train()


def _deepspeed_on_one_rank(scratch: str, bf16: bool) -> dict:
    """Joins a job of one rank and returns arguments of TrainingArguments.

    Its optimizer is the Trainer's, as ours is: the one DeepSpeed would build is compiled first.
    """
    import deepspeed
    import transformers.training_args

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = dist.FileStore(str(Path(scratch) / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiles a CPU collective, unused by one rank
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    settings = {
        "zero_optimization": {"stage": 1},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "gradient_clipping": OPTIM.grad_clip,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 1,
    }
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # DeepSpeed has bf16 on a CPU too
    return {"deepspeed": settings, "bf16": bf16}


def _model(task: Task) -> nn.Module:
    """Returns LlamaForCausalLM with the task's initial weights, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**hf_config(task.model), "use_cache": False})
    model, source = LlamaForCausalLM(config), task.source()
    with torch.no_grad():
        for name in parameter_shapes(task.model):
            model.get_parameter(FAMILY.where(name, task.model).names[0]).copy_(source(name))
    return model.train()
