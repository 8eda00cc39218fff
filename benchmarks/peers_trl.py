"""Runs contestants of the post-training benchmark on TRL's trainers, with the settings that cost least on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import Turns
from benchmarks.posttrain_task import BETA, CENTER, OPTIM, Task

PACKAGES = ("trl", "transformers", "accelerate")


def installed() -> bool:
    return find_spec("trl") is not None


def train(turns: Turns, task: Task, padding_free: bool = False, rows: int | None = None) -> None:
    """Trains with TRL's trainer of the algorithm, in turns.

    A forward has `rows` rows (pairs, samples), each padded to the longest; None: as many as `micro_tokens` holds.
    Gradients are accumulated over a step.
    """
    from transformers import PrinterCallback, TrainerCallback

    class TakeTurns(TrainerCallback):
        def on_log(self, args: object, state: object, control: object, logs: dict, **_: object) -> None:
            if "loss" in logs:
                turns.done({"loss": logs["loss"], "grad_norm": logs["grad_norm"]})
                control.should_training_stop = not turns.wait()

    with tempfile.TemporaryDirectory() as scratch:
        keys = common(task, scratch, rows or rows_at_a_time(task))
        trainer = TRAINERS[task.case.algorithm](task, keys | ({"padding_free": True} if padding_free else {}))
        trainer.add_callback(TakeTurns())
        trainer.remove_callback(PrinterCallback)
        turns.wait()
        trainer.train()


def rows_at_a_time(task: Task) -> int:
    """Returns how many rows (pairs, samples) a forward takes: a divisor of those of a step."""
    case, lengths = task.case, task.lengths()
    longest = max(row[0] for row in lengths) + max(max(row[1:]) for row in lengths)
    if not case.sampled:  # whose rows are padded together, not prompts and answers
        longest = max(row[0] + max(row[1:]) for row in lengths)
    each = longest * (2 if case.algorithm in ("dpo", "reward") else 1)
    rows = case.rows * case.samples
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * each <= case.micro_tokens))


def common(task: Task, scratch: str, rows: int) -> dict[str, Any]:
    """Returns the settings that all trainers share: what ours has, and nothing beside the training."""
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": task.case.rows * task.case.samples // rows,
        "max_steps": task.steps,
        "learning_rate": OPTIM.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": OPTIM.betas[0],
        "adam_beta2": OPTIM.betas[1],
        "adam_epsilon": OPTIM.eps,
        "weight_decay": OPTIM.weight_decay,
        "max_grad_norm": OPTIM.grad_clip,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,  # their default is True
        "bf16": task.precision == "bf16",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def loaded(task: Task, kind: str = "AutoModelForCausalLM") -> torch.nn.Module:
    import transformers

    load = getattr(transformers, kind).from_pretrained
    return load(task.directory, dtype=torch.float32, trust_remote_code=False)


def dataset(task: Task, *names: str) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{name: row[name] for name in names} for row in task.rows])


def sft(task: Task, keys: dict[str, Any]) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**keys, max_length=None, train_sampling_strategy="sequential")
    rows = dataset(task, "prompt", "completion")
    return SFTTrainer(loaded(task), args, train_dataset=rows, processing_class=task.tokenizer())


def dpo(task: Task, keys: dict[str, Any]) -> Any:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**keys, beta=BETA, max_length=None, train_sampling_strategy="sequential")
    rows = dataset(task, "prompt", "chosen", "rejected")
    model, reference = loaded(task), loaded(task)
    return DPOTrainer(model, reference, args, train_dataset=rows, processing_class=task.tokenizer())


def reward(task: Task, keys: dict[str, Any]) -> Any:
    from trl import RewardConfig, RewardTrainer

    own = {"center_rewards_coefficient": CENTER, "max_length": None, "train_sampling_strategy": "sequential"}
    model, rows = loaded(task, "AutoModelForSequenceClassification"), dataset(task, "prompt", "chosen", "rejected")
    return RewardTrainer(model, RewardConfig(**keys, **own), train_dataset=rows, processing_class=task.tokenizer())


def grpo(task: Task, keys: dict[str, Any]) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    script, end = task.script(), task.tokenizer().eos_token_id

    class Scripted(GRPOTrainer):
        """Generates as ever, but each token that is drawn is replaced by that of the script."""

        def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any) -> Any:
            rows = [next(script[tuple(ids)]) for ids in prompt_ids]
            with mock.patch.object(torch, "multinomial", drawing(rows, end)):
                return super()._generate_single_turn(prompt_ids, *rest)

    own = {"num_generations": task.case.samples, "max_completion_length": task.longest_answer}
    args = GRPOConfig(**keys, **own, temperature=1.0, shuffle_dataset=False)
    rows, tokenizer = dataset(task, "prompt", "answer"), task.tokenizer()
    return Scripted(loaded(task), first_integer, args=args, train_dataset=rows, processing_class=tokenizer)


def drawing(rows: list[list[int]], end: int) -> Callable[..., Tensor]:
    """Returns a `torch.multinomial` that draws, and then returns the next token of each row, `end` behind its last."""
    draw, place = torch.multinomial, count()

    def scripted(probabilities: Tensor, num_samples: int) -> Tensor:
        draw(probabilities, num_samples)
        i = next(place)
        return torch.tensor([[row[i] if i < len(row) else end] for row in rows])

    return scripted


def first_integer(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Rewards completions whose first word is the answer."""
    return [float(text.split()[0] == right) for text, right in zip(completions, answer, strict=True)]


TRAINERS: dict[str, Callable[[Task, dict[str, Any]], Any]] = {"sft": sft, "dpo": dpo, "reward": reward, "grpo": grpo}
