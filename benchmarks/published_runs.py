"""Compares the step times of `llmtrain plan` with those of published runs: calibrated ones, and others held out.

    python -m benchmarks.published_runs

Prints one line a run: seconds of a step as published and as planned, the share of the peak (MFU) of both, counted in
the same way, and the memory of the fullest rank. REACHED and ATTENTION in llmtrain/scaling/steptime.py were chosen for
the three layouts of Llama 3 405B; the other runs were looked at afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.arch.hardware import peak_flops
from llmtrain.config.schema import Config, EngineConfig, ModelConfig, ParallelConfig, TrainConfig
from llmtrain.scaling.plan import Plan, plan
from llmtrain.scaling.speed import mfu


@dataclass(frozen=True)
class Run:
    """Describes a published run. One of `tflops`, `step_s` and `tokens_per_s` is what was published."""

    name: str
    source: str
    hardware: str
    gpus: int
    model: dict[str, Any]
    parallel: dict[str, Any]
    train: dict[str, Any]
    engine: dict[str, Any] = field(default_factory=dict)
    tflops: float | None = None  # 1e12 a second and GPU
    step_s: float | None = None
    tokens_per_s: float | None = None  # a GPU
    calibrated: bool = False

    def config(self) -> Config:
        """Returns the document that llmtrain would be given."""
        return Config(
            model=ModelConfig(**self.model),
            parallel=ParallelConfig(**self.parallel),
            engine=EngineConfig(**self.engine),
            train=TrainConfig(**self.train),
            plan={"hardware": self.hardware},
        )

    def published_s(self, p: Plan) -> float:
        """Returns the seconds of a step. FLOPs are counted as ours are where a paper says no more than their rate."""
        if self.step_s is not None:
            return self.step_s
        if self.tokens_per_s is not None:
            return p.tokens_per_step / (self.tokens_per_s * self.gpus)
        assert self.tflops is not None
        return p.work.model * p.tokens_per_step / (self.tflops * 1e12 * self.gpus)


def gpt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    """Returns a GPT of the Megatron papers: vocabulary 51,200, rows of 2,048 tokens."""
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_size": 4 * hidden, "num_heads": heads}
    rest = {"num_kv_heads": heads, "vocab_size": 51200, "max_positions": 2048, "norm": "layer", "gated": False}
    return {**shape, **rest, "activation": "gelu", "positions": "learned", "tie_embeddings": True}


LLAMA = "arXiv 2407.21783, table 4"
KEPT = {"backend": "fsdp", "reshard": False, "remat": "selective"}  # weights stay whole in the step: as ZeRO-2
STAGES = {"virtual_stages": 4, "stage_layers": [1] + [2] * 62 + [1]}  # one less in the first and the last, as published
CUT = {"pp": 16, "tp": 8, "schedule": "interleaved_1f1b", **STAGES}
SHORT, LONG = {"seq_len": 8192, "global_batch_seqs": 2048}, {"seq_len": 131072, "global_batch_seqs": 128}
LLAMA_405B = {"preset": "llama3-405b"}
LLAMA_LONG = {"preset": "llama3.1-405b"}
MEGATRON = "arXiv 2205.05198, tables 3 and 5"
TITAN = "TorchTitan, benchmarks of December 2024 (arXiv 2410.06511)"
TITAN_A100 = "TorchTitan, docs/performance.md of 2024"
TITAN_H100 = str(Path(__file__).parent / "hardware" / "h100_500w.yaml")
COMPILED = {"compile": True}
FSDP = {"backend": "fsdp", "reshard": True, "remat": "selective"}


def megatron(
    name: str, shape: tuple[int, int, int], cut: dict[str, Any], batch: tuple[int, int], gpus: int
) -> list[Run]:
    """Returns the two runs of a model: with full recomputation, and with sequence parallelism and selective."""
    runs = []
    times = {"22B": (1.42, 1.10), "175B": (18.13, 13.75), "530B": (49.05, 37.83), "1T": (94.42, 71.49)}[name]
    for seconds, remat, sequence in zip(times, ("full", "selective"), (False, True), strict=True):
        train = {"seq_len": 2048, "micro_batch_seqs": batch[0], "global_batch_seqs": batch[1]}
        parallel = {"tp": 8, "sequence_parallel": sequence, **cut}
        engine = {"zero_stage": 1, "remat": remat}
        title = f"Megatron {name}, {remat} recomputation"
        runs.append(Run(title, MEGATRON, "a100", gpus, gpt(*shape), parallel, train, engine, step_s=seconds))
    return runs


def titan(name: str, gpus: int, rate: float, engine: dict[str, Any], hardware: str = TITAN_H100, **more: Any) -> Run:
    """Returns a run of Llama 3 8B under FSDP, rows of 8,192 tokens."""
    rows = more.get("rows", 2)
    train = {"seq_len": 8192, "micro_batch_seqs": rows, "global_batch_seqs": rows * gpus}
    model = {"preset": more.get("preset", "llama3-8b")}
    source = TITAN if hardware == TITAN_H100 else TITAN_A100
    return Run(name, source, hardware, gpus, model, {}, train, {**FSDP, **engine}, tokens_per_s=rate)


INTERLEAVED = {"schedule": "interleaved_1f1b", "virtual_stages": 3}
RUNS = (
    Run("Llama 3 405B, 8,192 GPUs", LLAMA, "h100", 8192, LLAMA_405B, CUT, SHORT, KEPT, tflops=430, calibrated=True),
    Run("Llama 3 405B, 16,384 GPUs", LLAMA, "h100", 16384, LLAMA_405B, CUT, SHORT, KEPT, tflops=400, calibrated=True),
    Run(
        "Llama 3 405B, 16,384 GPUs, 131k tokens",
        LLAMA,
        "h100",
        16384,
        LLAMA_LONG,
        {**CUT, "cp": 16, "context": "allgather"},
        LONG,
        KEPT,
        tflops=380,
        calibrated=True,
    ),
    *megatron("22B", (48, 6144, 64), {}, (4, 4), 8),
    *megatron("175B", (96, 12288, 96), {"pp": 8, **INTERLEAVED}, (1, 64), 64),
    *megatron("530B", (105, 20480, 128), {"pp": 35, **INTERLEAVED}, (1, 280), 280),
    *megatron("1T", (128, 25600, 160), {"pp": 64}, (1, 512), 512),
    titan("TorchTitan 8B, 8 GPUs", 8, 5762, {}),
    titan("TorchTitan 8B, 8 GPUs, compiled", 8, 6667, COMPILED),
    titan("TorchTitan 8B, 8 GPUs, compiled, fp8", 8, 8532, {**COMPILED, "precision": "fp8"}),
    titan("TorchTitan 8B, 128 GPUs, compiled", 128, 6514, COMPILED),
    titan("TorchTitan 8B, 64 A100", 64, 2973, {}, "a100", rows=1),
    titan("TorchTitan 70B, 64 A100", 64, 331, {"remat": "full"}, "a100", rows=1, preset="llama3-70b"),
)


def main() -> None:
    print(f"{'run':<42} {'published':>10} {'planned':>9} {'error':>7}   {'MFU of both':>14} {'memory':>8}")
    for run in RUNS:
        config = run.config()
        p = plan(config, run.gpus)
        assert p.time is not None and p.hardware is not None
        published = run.published_s(p)
        peak = peak_flops(p.hardware, config.engine.precision)
        theirs = p.work.model * p.tokens_per_step / (published * run.gpus) / peak
        error = p.time.total_s / published - 1
        times = f"{published:>8.2f} s {p.time.total_s:>7.2f} s {error:>+7.1%}"
        rest = f"{p.memory_bytes / 1e9:>5.1f} GB{'   calibrated' if run.calibrated else ''}"
        print(f"{run.name:<42} {times}   {theirs:>6.1%} {mfu(p, config):>7.1%} {rest}")


if __name__ == "__main__":
    main()
