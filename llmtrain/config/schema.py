"""Every key of a configuration and its default. The only home of defaults; imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RopeScaling(Section):
    """Llama 3 frequency scaling (the released `rope_scaling` of type llama3)."""

    factor: PositiveFloat = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_positions: PositiveInt = 8192


class ModelConfig(Section):
    """Shape of the decoder. With `preset` or `init_from`, fields that are not written take their values from there."""

    preset: str | None = None
    init_from: str | None = None  # a Hugging Face directory or a run directory
    attention: Literal["gqa"] = "gqa"
    num_layers: PositiveInt = 4
    hidden_size: PositiveInt = 128
    ffn_size: PositiveInt = 384
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 4
    head_dim: PositiveInt | None = None  # None = hidden_size / num_heads
    vocab_size: PositiveInt = 1024
    max_positions: PositiveInt = 2048
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = True


class TokenizerConfig(Section):
    """A Hugging Face tokenizer directory; trained into `path` from the data sources when it is not there yet."""

    path: str | None = None  # None = <run directory>/tokenizer
    vocab_size: PositiveInt = 1024  # when trained
    train_bytes: PositiveInt = 4_000_000  # at most this much text is read to train it


class SourceConfig(Section):
    """One source of documents for pretraining."""

    name: str
    type: Literal["stdlib", "topics", "arithmetic", "text", "jsonl"]
    path: str | None = None  # text, jsonl: file, directory or glob
    weight: PositiveFloat = 1.0  # share of the samples, relative to the other sources
    max_bytes: PositiveInt | None = None
    held_out: float = Field(0.05, ge=0.0, lt=1.0)  # share of the documents kept for validation
    count: PositiveInt = 2000  # arithmetic: documents
    worked_share: float = Field(0.8, ge=0.0, le=1.0)  # arithmetic: share of sums worked by columns


class TaskConfig(Section):
    """A generated problem set: JSONL of prompts and answers, every eighth expression held out."""

    name: str
    type: Literal["chain_sum", "largest"]
    train: PositiveInt = 4000
    held_out: PositiveInt = 256
    error_rate: float = Field(0.0, ge=0.0, lt=1.0)  # chance that one column sum of a demonstration is wrong


class DataConfig(Section):
    """Where text, demonstrations and prompts come from."""

    path: str | None = None  # directory of token shards; None = <run directory>/data
    sources: list[SourceConfig] = []
    tasks: list[TaskConfig] = []
    train: str | None = None  # sft, grpo: JSONL with prompt|messages, answer, optional prefill
    held_out: str | None = None  # eval: the same form
    mask_documents: bool = True  # attention and positions restart at document boundaries
    replay_seqs: int = Field(0, ge=0)  # sft, grpo: rows of pretraining text added to each step
    replay_weight: float = Field(1.0, ge=0.0)  # weight of the mean loss of those rows


class ParallelConfig(Section):
    """The mesh, outermost first: pp, dp_replicate, dp_shard, cp, tp. `dp_shard: -1` takes all ranks left."""

    pp: PositiveInt = 1
    dp_replicate: PositiveInt = 1
    dp_shard: int = -1
    cp: PositiveInt = 1
    tp: PositiveInt = 1
    ep: PositiveInt = 1
    sequence_parallel: bool = True
    schedule: Literal["1f1b"] = "1f1b"


class EngineConfig(Section):
    """How a step runs on one rank."""

    backend: Literal["deepspeed", "fsdp"] = "deepspeed"
    zero_stage: int = Field(1, ge=0, le=3)
    offload: Literal["none", "optimizer"] = "none"
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    remat: Literal["none", "full"] = "none"
    compile: bool = False
    logprob_chunk_tokens: PositiveInt = 1024  # rows of logits held at a time
    timeout_s: PositiveInt = 600  # of a collective


class OptimConfig(Section):
    """AdamW (arXiv 1711.05101) and its schedule."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 3e-4
    min_lr: float = Field(3e-5, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0.0)
    grad_clip: float = Field(1.0, ge=0.0)  # 0 = no clipping
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(100, ge=0)


class TrainConfig(Section):
    """How much is trained. `global_batch_seqs = micro_batch_seqs x data-parallel ranks x accumulation`."""

    steps: PositiveInt = 1000
    seq_len: PositiveInt = 2048
    micro_batch_seqs: PositiveInt = 1
    global_batch_seqs: PositiveInt = 8
    batch_ramp: list[Any] = []
    seq_ramp: list[Any] = []
    eval_every_steps: int = Field(0, ge=0)  # 0 = before the first and after the last step only
    eval_seqs: PositiveInt = 64  # held-out rows


class RolloutConfig(Section):
    """Sampling during RL."""

    generator: Literal["native"] = "native"
    placement: Literal["colocated", "separate"] = "colocated"
    workers: int = Field(0, ge=0)  # separate: ranks that only generate
    group_size: PositiveInt = 8
    max_new_tokens: PositiveInt = 256
    temperature: PositiveFloat = 1.0
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    max_batch_seqs: PositiveInt = 256  # sequences decoded together on one rank
    max_logprob_gap: PositiveFloat | None = None  # generator against trainer; None = 1e-3 in fp32, 1.0 in bf16


class GrpoConfig(Section):
    """GRPO (arXiv 2402.03300)."""

    reward: Literal["reasoning_gym", "first_integer", "math"] = "reasoning_gym"
    prompts_per_step: PositiveInt = 32
    minibatches: PositiveInt = 1  # updates on one set of rollouts
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    kl_coef: float = Field(0.0, ge=0.0)  # against the weights at the start
    normalize_std: bool = True  # advantage = (r - mean) / std of its group; False = Dr. GRPO


class EvalConfig(Section):
    """What `llmtrain eval` measures, on the newest checkpoint of `model.init_from` or a Hugging Face directory."""

    text: bool = True  # perplexity on the held-out shards of `data.path`
    text_seqs: PositiveInt = 200
    problems: int = Field(256, ge=0)  # from `data.held_out`
    samples: PositiveInt = 8  # pass@k up to this k, majority@k
    label: str = "model"  # how the report names it


class CheckpointConfig(Section):
    every_steps: int = Field(100, ge=0)  # 0 = only at the end
    keep: PositiveInt = 3
    resume: Literal["auto", "never"] = "auto"


class ExportConfig(Section):
    """`llmtrain export`: the newest checkpoint of `model.init_from`, else of the run, as a Hugging Face directory."""

    path: str | None = None  # None = export/ in the directory of that run
    dtype: Literal["bf16", "fp32"] = "bf16"


class ReportConfig(Section):
    path: str | None = None  # the run to report on, or a directory of stages; None = the run directory


class LogConfig(Section):
    every_steps: PositiveInt = 1
    wandb: Literal["offline", "online", "off"] = "offline"
    project: str = "llmtrain"
    samples: int = Field(4, ge=0)  # completions written to samples.jsonl at a logged RL step or an evaluation


class Config(Section):
    """One document: one stage."""

    name: str = "run"
    run_dir: str | None = None  # None = runs/<name>
    seed: int = 0
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()
    log: LogConfig = LogConfig()

    @property
    def directory(self) -> str:
        """The run directory."""
        return self.run_dir or f"runs/{self.name}"


class StageConfig(Section):
    """One line of `stages:` in a `run` document. `set` holds sections that are merged over the document's own;
    the text `{run}` in any string is the run directory of the whole document."""

    name: str
    command: Literal["data", "tokenizer", "pretrain", "sft", "grpo", "eval", "export", "report"]
    ranks: PositiveInt = 1  # processes under torchrun; 1 = a plain process
    set: dict[str, Any] = {}


class RunConfig(Config):
    """A whole path: shared sections and a list of stages; each stage runs in <run directory>/<stage name>."""

    stages: list[StageConfig] = []
