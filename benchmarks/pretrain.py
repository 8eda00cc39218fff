"""A pretraining step of llmtrain against the usual loops: the same weights, rows, tokens, optimizer and clipping.

Each contestant lives in its own process (so that its peak memory is its own) and they run in turns, round by round.
"bf16" is what each one's users get: llmtrain holds bf16 weights and fp32 masters (DeepSpeed's bf16), the loops on
transformers hold fp32 weights under torch.autocast (what Hugging Face's Trainer does with bf16=True).

    python -m benchmarks.pretrain [--out benchmarks/results/pretrain.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import Turns, compete, environment
from llmtrain.config.schema import EngineConfig, ModelConfig, OptimConfig, ParallelConfig
from llmtrain.config.shapes import hf_config, resolve_model
from llmtrain.engine.optim import build_optimizer
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf import hf_name
from llmtrain.parallel.mesh import Mesh, init_mesh, shutdown
from llmtrain.parallel.pipeline import inputs_of
from llmtrain.parallel.plan import WeightSource, compile_blocks, parallelize
from llmtrain.types import Batch

OPTIM = OptimConfig(schedule="constant", warmup_steps=0)
ONE_RANK = ParallelConfig()
WARMUP_STEPS = 2
TOLERANCE = 0.02  # of the losses, relative: bf16 rounds differently in each contestant
REFERENCE = "transformers loop"


@dataclass(frozen=True)
class Task:
    """What every contestant trains."""

    model: ModelConfig
    seqs: int
    seq_len: int
    total_steps: int

    @property
    def step_tokens(self) -> int:
        return self.seqs * self.seq_len

    def source(self) -> WeightSource:
        """Initial weights by canonical name."""
        shapes = parameter_shapes(self.model)
        return lambda name: init_tensor(name, shapes[name], self.model, seed=0)

    def rows(self) -> Tensor:
        """Ids for all steps, [steps x seqs, seq_len + 1]; word frequencies as in text (Zipf), so there is something
        to learn and the losses say whether everyone learns it."""
        frequencies = 1.0 / torch.arange(10, self.model.vocab_size + 10)
        count = self.total_steps * self.seqs * (self.seq_len + 1)
        ids = torch.multinomial(frequencies, count, replacement=True, generator=torch.Generator().manual_seed(0))
        return ids.view(-1, self.seq_len + 1)

    def batches(self) -> Iterator[Batch]:
        """One a step."""
        for ids in self.rows().split(self.seqs):
            inputs, positions = ids[:, :-1].contiguous(), torch.arange(self.seq_len).repeat(self.seqs, 1)
            yield Batch(inputs, ids[:, 1:].contiguous(), torch.ones_like(inputs, dtype=torch.bool), positions)


# contestants


def llmtrain(turns: Turns, task: Task, compiled: bool) -> None:
    """As trainer/pretrain.py builds and calls it, on one rank."""
    from llmtrain.engine.zero import ZeroEngine
    from llmtrain.trainer.batches import count_trained

    mesh, settings, batches = _mesh(), EngineConfig(compile=compiled), task.batches()
    parts = parallelize(task.model, mesh, ONE_RANK, settings, task.source())
    engine = ZeroEngine(parts, mesh, ONE_RANK, settings, OPTIM, task.total_steps)
    while turns.wait():
        batch = next(batches)
        turns.done(engine.train_step([batch], token_loss, count_trained([batch], mesh)).loss)
    shutdown()


def decoder_loop(turns: Turns, task: Task, compiled: bool) -> None:
    """The same decoder and precision without the engine: what is left of the difference is DeepSpeed and checks."""
    mesh, batches = _mesh(), task.batches()
    (masters,) = parallelize(task.model, mesh, ONE_RANK, EngineConfig(), task.source())
    (model,) = (p.to(torch.bfloat16) for p in parallelize(task.model, mesh, ONE_RANK, EngineConfig(), task.source()))
    pairs = list(zip(masters.parameters(), model.parameters(), strict=True))
    optimizer = build_optimizer(masters, OPTIM)
    if compiled:
        compile_blocks(model)
    while turns.wait():
        batch = next(batches).to(mesh.device)
        loss = token_loss(model(batch.input_ids, **inputs_of(batch, True)), batch)[0] / batch.labels.numel()
        loss.backward()
        for master, p in pairs:
            master.grad, p.grad = p.grad.float(), None
        nn.utils.clip_grad_norm_(masters.parameters(), OPTIM.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for master, p in pairs:
                p.copy_(master)
        turns.done(loss.item())
    shutdown()


def transformers_loop(turns: Turns, task: Task, compiled: bool) -> None:
    """The loop of a tutorial: autocast, the model's own loss, clipping, fused AdamW."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, batches = _transformers_model(task).to(device), task.batches()
    optimizer = build_optimizer(model, OPTIM)
    if compiled:
        model.compile()
    while turns.wait():
        batch = next(batches).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(batch.input_ids, labels=batch.labels, shift_labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        turns.done(loss.item())


def transformers_trainer(turns: Turns, task: Task) -> None:
    """transformers.Trainer on a dataset of the rows. It logs each step, as llmtrain does."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class TakeTurns(TrainerCallback):
        def on_log(self, args: object, state: object, control: object, logs: dict, **_: object) -> None:
            if "loss" in logs:
                turns.done(logs["loss"])
                control.should_training_stop = not turns.wait()

    columns = ({"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in task.rows())
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, per_device_train_batch_size=task.seqs, max_steps=task.total_steps, bf16=True,
            use_cpu=not torch.cuda.is_available(), optim="adamw_torch_fused", learning_rate=OPTIM.lr,
            adam_beta1=OPTIM.betas[0], adam_beta2=OPTIM.betas[1], weight_decay=OPTIM.weight_decay,
            max_grad_norm=OPTIM.grad_clip, lr_scheduler_type="constant", train_sampling_strategy="sequential",
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(_transformers_model(task), arguments, train_dataset=list(columns), callbacks=[TakeTurns()])
        trainer.remove_callback(PrinterCallback)
        turns.wait()
        trainer.train()


def _mesh() -> Mesh:
    return init_mesh(ONE_RANK, None, timeout_s=60)


def _transformers_model(task: Task) -> nn.Module:
    """LlamaForCausalLM with the same initial weights, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**hf_config(task.model), "use_cache": False})
    model, source = LlamaForCausalLM(config), task.source()
    with torch.no_grad():
        for name in parameter_shapes(task.model):
            model.get_parameter(hf_name(name)).copy_(source(name))
    return model.train()


EAGER = {
    "llmtrain": partial(llmtrain, compiled=False),
    "llmtrain without engine": partial(decoder_loop, compiled=False),
    REFERENCE: partial(transformers_loop, compiled=False),
    "transformers Trainer": transformers_trainer,
}
COMPILED = {
    "llmtrain, compiled": partial(llmtrain, compiled=True),
    f"{REFERENCE}, compiled": partial(transformers_loop, compiled=True),
}

# results


def check_same_work(runs: dict[str, list[dict]]) -> dict[str, list[float]]:
    """Losses of every step. Raises RuntimeError when a contestant's differ from the reference's by over TOLERANCE."""
    losses = {name: [loss for turn in turns for loss in turn["values"]] for name, turns in runs.items()}
    for name, found in losses.items():
        for step, (loss, expected) in enumerate(zip(found, losses[REFERENCE], strict=True), 1):
            if abs(loss - expected) > TOLERANCE * expected:
                raise RuntimeError(
                    f"{name}: loss {loss:.4f} at step {step}, {REFERENCE} has {expected:.4f}: other work"
                )
    return losses


def summary(turns: list[dict], reference: list[dict], turn_tokens: int) -> dict[str, float]:
    """Over rounds: median rate and its spread, median of the ratios to the reference in the same round."""
    rates = [turn_tokens / turn["wall_s"] for turn in turns]
    return {
        "tokens_per_s": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "tokens_per_cpu_s": statistics.median(turn_tokens / turn["cpu_s"] for turn in turns),
        "ratio": statistics.median(
            other["wall_s"] / turn["wall_s"] for turn, other in zip(turns, reference, strict=True)
        ),
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
    }


def print_table(results: dict[str, dict[str, float]], losses: dict[str, list[float]]) -> None:
    print(f"{'':30}{'tokens/s':>9}{'min - max':>15}{'ratio':>7}{'tokens/CPU-s':>14}{'peak MB':>9}  losses")
    for name, r in results.items():
        spread = f"{r['slowest']:.0f} - {r['fastest']:.0f}"
        first = " ".join(f"{loss:.4f}" for loss in losses[name][:3])
        figures = f"{r['tokens_per_s']:>9.0f}{spread:>15}{r['ratio']:>7.2f}{r['tokens_per_cpu_s']:>14.0f}"
        print(f"{name:30}{figures}{r['peak_bytes'] / 1e6:>9.0f}  {first} ... {losses[name][-1]:.4f}")
    print(f"ratio: median over rounds of the speed relative to {REFERENCE!r} in the same round")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain", description=__doc__.splitlines()[0])
    sizes = {"hidden-size": 384, "layers": 8, "ffn-size": 1024, "heads": 6, "kv-heads": 2, "vocab": 16384}
    work = {"seq-len": 512, "seqs": 8, "steps": 2, "rounds": 5, "threads": 2}
    for name, default in {**sizes, **work}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="also compiled ones")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto: CUDA when there is a GPU")
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args()


def task_of(args: argparse.Namespace) -> Task:
    model = ModelConfig(
        num_layers=args.layers, hidden_size=args.hidden_size, ffn_size=args.ffn_size, num_heads=args.heads,
        num_kv_heads=args.kv_heads, vocab_size=args.vocab, max_positions=args.seq_len,
    )  # fmt: skip
    return Task(resolve_model(model), args.seqs, args.seq_len, WARMUP_STEPS + args.steps * args.rounds)


def main() -> None:
    args = arguments()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything, here or in a contestant, looks for one
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    task, contestants = task_of(args), {**EAGER, **(COMPILED if args.compile else {})}
    millions = sum(torch.Size(shape).numel() for shape in parameter_shapes(task.model).values()) / 1e6
    print(f"{millions:.1f}M parameters, {args.seqs} x {args.seq_len} tokens a step, bf16, {args.threads} threads")
    runs = compete(contestants, (task,), args.threads, WARMUP_STEPS, args.steps, args.rounds)
    losses = check_same_work(runs)
    timed = {name: turns[1:] for name, turns in runs.items()}
    tokens = args.steps * task.step_tokens
    results = {name: summary(turns, timed[REFERENCE], tokens) for name, turns in timed.items()}
    print_table(results, losses)
    if args.out:
        versions = environment(
            "benchmarks.pretrain", ("torch", "deepspeed", "transformers", "accelerate"), args.threads
        )
        record = {**versions, "task": {**asdict(task), "model": task.model.model_dump()}, "results": results}
        Path(args.out).write_text(json.dumps({**record, "losses": losses, "rounds": timed}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
