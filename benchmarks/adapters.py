"""Compares vLLM with merged weights and with a LoRA adapter beside them: tokens a CPU-second of a model with the shape
of SmolLM2-135M, bf16, random weights. It says what it would cost to send a server the adapters of a step alone.

    python -m benchmarks.adapters [--vllm-python PATH] [--rank 16]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from benchmarks.rollout import SMOLLM2
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.sampling import RolloutConfig
from llmtrain.rollout.vllm import GENERATE, VllmGenerator

MODEL = resolve_model(SMOLLM2)
NAME = "adapter"  # under which requests ask for it; without one they ask for "policy"
WORK = {
    "1 stream": (1, 16, 24),
    "8 streams": (8, 16, 24),
    "64 streams": (64, 16, 24),
    "a prompt of 1,024": (1, 1024, 1),
}
"""Maps names to sequences, tokens of each prompt, new tokens of each."""


class WithAdapter(VllmGenerator):
    """Starts its server with an adapter, which lies in `folder` as peft writes it."""

    folder: str
    rank: int

    def _arguments(self) -> list[str]:
        sizes = ["--max-loras", "1", "--max-lora-rank", str(self.rank)]
        return [*super()._arguments(), "--enable-lora", *sizes, "--lora-modules", f"{NAME}={self.folder}"]


def write_adapter(folder: Path, rank: int) -> int:
    """Writes an adapter of all projections and returns its size in bytes."""
    hidden, ffn, keys = MODEL.hidden_size, MODEL.ffn_size, MODEL.num_kv_heads * MODEL.head_dim
    attention = {"q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    shapes = {f"self_attn.{name}": shape for name, shape in {**attention, "o_proj": (hidden, hidden)}.items()}
    shapes |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    tensors = {}
    for layer in range(MODEL.num_layers):
        for name, (rows, columns) in shapes.items():
            start = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{start}.lora_A.weight"] = torch.randn(rank, columns).mul(0.01).bfloat16()
            tensors[f"{start}.lora_B.weight"] = torch.randn(rows, rank).mul(0.01).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in shapes]
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return sum(tensor.nbytes for tensor in tensors.values())


def cpu_s(generator: VllmGenerator) -> float:
    """Returns the CPU seconds that the processes of a server have taken."""
    processes = psutil.Process(generator.server.keeper.pid).children(recursive=True)
    return sum(sum(each.cpu_times()[:2]) for each in processes)


def speeds(generator: VllmGenerator, model: str) -> dict[str, float]:
    """Returns the tokens a CPU-second by the name of the work: new ones, or of the prompt where there is one new."""

    def ask(number: int, prompt_tokens: int, new_tokens: int) -> None:
        sampled = {"seed": number, "max_tokens": new_tokens, "logprobs": 0, "ignore_eos": True, "detokenize": False}
        ids = torch.randint(
            MODEL.vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(number)
        ).tolist()
        body = {"model": model, "token_ids": ids, "sampling_params": {"n": 1, "temperature": 1.0, **sampled}}
        generator.server.post(GENERATE, body, 2**24, time.monotonic() + 600)

    found = {}
    ask(999, 8, 4)  # the first one waits for what is set up once
    for name, (streams, prompt_tokens, new_tokens) in WORK.items():
        before = cpu_s(generator)
        with ThreadPoolExecutor(streams) as pool:
            list(pool.map(lambda i, tokens=(prompt_tokens, new_tokens): ask(i, *tokens), range(streams)))
        tokens = streams * new_tokens if new_tokens > 1 else prompt_tokens
        found[name] = tokens / (cpu_s(generator) - before)
    return found


def main() -> None:
    """Prints the speeds of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", default=".venv-vllm/bin/python")
    parser.add_argument("--rank", type=int, default=16, choices=(8, 16, 32, 64))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        WithAdapter.folder, WithAdapter.rank = folder, asked.rank
        print(f"the adapter has {write_adapter(Path(folder), asked.rank) / 1e6:.1f} MB")
        settings = RolloutConfig(
            generator="vllm", max_batch_seqs=64, vllm={"python": asked.vllm_python, "cache_gib": 0.5}
        )
        for kind, model in ((VllmGenerator, "policy"), (WithAdapter, NAME)):
            with closing(kind(MODEL, settings, torch.bfloat16, "cpu", 1100)) as generator:
                told = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds(generator, model).items())
                print(f"{model}: tokens a CPU-second: {told}", flush=True)


if __name__ == "__main__":
    main()
