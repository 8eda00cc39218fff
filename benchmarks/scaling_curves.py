"""Carries one layout from few GPUs to many: the plan's figures, the simulated pipeline and collectives, failures.

    python -m benchmarks.scaling_curves

Llama 3 405B in rows of 8,192 tokens, tp 8 and pp 16 as published, data-parallel ranks from 8 to 128. Weak: 16 rows a
data-parallel rank. Strong: 2,048 rows a step, as published for 8,192 and 16,384 GPUs (430 and 400 TFLOP/s a GPU). And
GPT-3 175B from 96 to 4,608 GPUs, whose layouts Megatron-LM's README does not say: MFU 47 % to 42 %.
"""

from __future__ import annotations

from benchmarks.published_runs import CUT, KEPT, RUNS, gpt
from llmtrain.config.recipes import RECIPES
from llmtrain.config.schema import Config, EngineConfig, ModelConfig, ParallelConfig, TrainConfig
from llmtrain.scaling.collectives import hierarchical_seconds, ring_over_nodes, tree_seconds
from llmtrain.scaling.failures import best_interval_s, goodput, job_mttf_s
from llmtrain.scaling.layouts import overrides
from llmtrain.scaling.plan import Plan, bubble_share, plan
from llmtrain.scaling.search import document_of, search
from llmtrain.scaling.speed import mfu, tflops_per_gpu

LAYOUT = ParallelConfig(**CUT)
LLAMA_MTTF_HOURS = 54 * 24 / 419 * 16_384  # unexpected interruptions, arXiv 2407.21783, section 3.3.4
SAVE_S, RESTART_S = 16 * 405e9 / 2e12, 600.0  # 16 bytes a parameter at the published 2 TB/s; the restart is assumed


def planned(gpus: int, rows: int) -> tuple[Config, Plan]:
    train = TrainConfig(seq_len=8192, global_batch_seqs=rows)
    config = RUNS[0].config().model_copy(update={"train": train})
    return config, plan(config, gpus)


def main() -> None:
    print(f"{KEPT} {CUT}")
    print("gpus     rows  step s  TFLOP/s  MFU     bubble   equal   goodput")
    for gpus in (1024, 2048, 4096, 8192, 16384):
        for rows in dict.fromkeys((gpus // 128 * 16, 2048)):
            config, p = planned(gpus, rows)
            mttf = job_mttf_s(LLAMA_MTTF_HOURS, gpus)
            share = goodput(best_interval_s(SAVE_S, mttf), SAVE_S, RESTART_S, mttf)
            equal = bubble_share(LAYOUT.schedule, LAYOUT.pp, LAYOUT.virtual_stages, p.accumulation or 1)
            figures = f"{p.time.total_s:>6.2f}  {tflops_per_gpu(p):>7.0f}  {mfu(p, config):>5.1%}"
            print(f"{gpus:<8} {rows:<5} {figures}  {p.bubble:>6.1%}  {equal:>6.1%}  {share:>8.1%}")
    print("GPT-3 175B, 1,152 rows of 4,096 tokens on H100, the best layout of a search (published: MFU 47 % to 42 %)")
    for gpus in (96, 4608):
        config = Config(
            model=ModelConfig(**{**gpt(96, 12288, 96), "vocab_size": 131072, "max_positions": 4096}),
            engine=EngineConfig(backend="fsdp"),
            train=TrainConfig(seq_len=4096, global_batch_seqs=1152),
            plan={"hardware": "h100"},
        )
        best = search(document_of(config, RECIPES["pretrain"], gpus)).best[0].config
        print(f"{gpus:<8} {mfu(plan(best, gpus), best):>5.1%}  {overrides(best)}")
    print("all-reduce of 1 MB and 1 GB over H100 nodes, ms: one ring, rings side by side, tree")
    _, p = planned(1024, 128)
    for ranks in (8, 64, 1024, 16384):
        each = [
            f(size, ranks, p.hardware, 8)
            for size in (1e6, 1e9)
            for f in (ring_over_nodes, hierarchical_seconds, tree_seconds)
        ]
        print(f"{ranks:<8} " + "  ".join(f"{1e3 * seconds:>9.2f}" for seconds in each))


if __name__ == "__main__":
    main()
