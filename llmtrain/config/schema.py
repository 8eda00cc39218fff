"""Defines every key of a configuration and its default, with `config/sampling.py` and the sections of recipes. No other
file has defaults. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from llmtrain.config.data import DataConfig
from llmtrain.config.data import SourceConfig as SourceConfig
from llmtrain.config.data import TaskConfig as TaskConfig
from llmtrain.config.index import IndexConfig
from llmtrain.config.ladder import LadderConfig
from llmtrain.config.machine import fast_precision
from llmtrain.config.plan import PlanConfig
from llmtrain.config.sampling import ConstitutionalConfig, EvalConfig, JudgeConfig, RewardConfig, RolloutConfig
from llmtrain.config.scaling import ScalingConfig
from llmtrain.config.section import Count, Decay, Section, UserPath


class RopeScaling(Section):
    """Scales RoPE's frequencies for rows longer than those of the first training; defaults are Llama 3.1's."""

    type: Literal["llama3", "linear", "yarn"] = "llama3"  # respectively arXiv 2407.21783, 2306.15595, 2309.00071
    factor: PositiveFloat = 8.0  # by which (low) frequencies are divided
    original_max_positions: PositiveInt = 8192  # row length in tokens of the first training
    low_freq_factor: PositiveFloat = 1.0  # llama3: wavelengths above original_max_positions / this count as low
    high_freq_factor: PositiveFloat = 4.0  # llama3: wavelengths below original_max_positions / this are unchanged
    beta_fast: PositiveFloat = 32.0  # yarn: pairs with more rotations within original_max_positions are unchanged
    beta_slow: PositiveFloat = 1.0  # yarn: frequencies of pairs with fewer rotations are divided by factor
    mscale: float = 0.0  # yarn: scale of cos and sin relative to mscale_all_dim; both 0 = the paper's
    mscale_all_dim: float = 0.0  # yarn: scale of the attention scores (DeepSeek)


class MlaConfig(Section):
    """Configures multi-head latent attention (arXiv 2405.04434): all heads take keys and values from one small
    latent."""

    q_rank: PositiveInt | None = None  # width of the query latent; None = queries straight from the hidden state
    kv_rank: PositiveInt = 512  # width of the key/value latent, which is cached
    nope_head_dim: PositiveInt = 128  # width of the part of a query or key head without rotation
    rope_head_dim: PositiveInt = 64  # width of the rotated part; all heads share that of the key, which is cached
    v_head_dim: PositiveInt = 128  # width of a value head


class MoeConfig(Section):
    """Configures a mixture of experts in place of the feed-forward layer (arXiv 2101.03961, 2401.06066)."""

    num_experts: Count = 8  # number of routed experts
    top_k: PositiveInt = 2  # experts chosen for each token
    expert_ffn_size: PositiveInt = 128  # inner width of a routed expert
    shared_ffn_size: int = Field(0, ge=0)  # inner width of the expert that every token takes; 0 = none
    dense_layers: list[int] = Field([])  # layers with a plain feed-forward layer of `ffn_size`
    gate: Literal["softmax", "sigmoid"] = "softmax"  # function from router logits to scores
    normalize: bool = True  # divide the scores of the chosen experts by their sum
    scale: PositiveFloat = 1.0  # the scores are multiplied by this afterwards
    num_groups: PositiveInt = 1  # equal groups that the experts form (group-limited routing of DeepSeek)
    top_groups: PositiveInt = 1  # number of groups that a token may choose experts from
    selection_bias: bool = False  # a bias for each expert that affects which are chosen, not their weights
    balance: Literal["none", "bias", "aux", "bias+aux"] = "none"  # bias: no loss (arXiv 2408.15664); aux: a loss
    bias_rate: float = Field(0.001, ge=0.0)  # balance bias: change of a bias after each update
    aux_coef: float = Field(0.01, ge=0.0)  # balance aux: weight of the loss (arXiv 2101.03961, computed for each row)
    z_coef: float = Field(0.0, ge=0.0)  # weight of the router's z-loss (arXiv 2202.08906)


class LoraConfig(Section):
    """Configures low-rank adapters (arXiv 2106.09685): W x + alpha / rank B (A x), only A and B are trained."""

    rank: PositiveInt = 8  # rows of A and columns of B
    alpha: PositiveFloat = 16.0  # numerator of the scale
    targets: list[str] = Field(["q", "v"])  # projections: q, k, v, o, gate, up, down (mla: q_a, q_b, kv_a, kv_b)


class MupConfig(Section):
    """Configures muP (arXiv 2203.03466, table 8): the best lr of a narrow model fits a wide one. See docs/models.md."""

    base_hidden: PositiveInt  # hidden_size of the model whose lr was tuned; at this width nothing changes
    base_head_dim: PositiveInt | None = None  # scores are q k sqrt(this) / head_dim; None = head_dim does not grow


class ModelConfig(Section):
    """Describes the decoder's shape. With `preset` or `init_from`, fields that are not written take their values from
    there."""

    preset: str | None = None  # a published shape; see the presets at the end of docs/configuration.md
    init_from: UserPath | None = None  # a Hugging Face directory or its name on the hub, org/name; or a run directory
    family: str = "llama"  # sets defaults for the fields below, and names the form on disk; see docs/models.md
    attention: Literal["gqa", "mla"] = "gqa"  # grouped-query (multi-head: num_kv_heads = num_heads); latent
    num_layers: Count = 4  # blocks
    hidden_size: PositiveInt = 128  # width of the residual stream
    ffn_size: PositiveInt = 384  # inner width of the feed-forward layer
    num_heads: PositiveInt = 4  # query heads
    num_kv_heads: PositiveInt = 4  # each serves num_heads / num_kv_heads query heads
    head_dim: PositiveInt | None = None  # None = hidden_size / num_heads; mla: nope_head_dim + rope_head_dim
    vocab_size: PositiveInt = 1024  # at least the tokenizer's; rows beyond those of `init_from` start as their mean
    vocab_multiple: PositiveInt = 1  # vocab_size is rounded up to a multiple of this, so that tp divides it
    max_positions: PositiveInt = 2048  # longest row, prompt and completion together
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    norm_bias: bool = False  # layer: LayerNorm has a bias
    norm_offset: bool = False  # rms: the factor is 1 + weight (Gemma)
    norm_eps: PositiveFloat = 1e-5  # added to the mean square or variance
    block: Literal["sequential", "parallel", "sandwich"] = "sequential"  # parallel: PaLM; sandwich: norms after, too
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"  # of the feed-forward layer
    gated: bool = True  # down(act(gate x) * up x); false: down(act(up x))
    qkv_bias: bool = False  # biases of the projections to queries, keys and values
    o_bias: bool = False  # a bias of attention's output projection
    ffn_bias: bool = False  # biases of the feed-forward projections
    qk_norm: bool = False  # RMSNorm on every query and key head
    attention_scale: PositiveFloat | None = None  # factor on the scores; None = head_dim^-0.5
    attention_softcap: PositiveFloat | None = None  # scores become softcap tanh(score / softcap)
    logit_softcap: PositiveFloat | None = None  # logits become softcap tanh(logit / softcap)
    scale_embeddings: bool = False  # multiply embeddings by sqrt(hidden_size)
    positions: Literal["rope", "learned"] = "rope"  # rotation of queries and keys, or vectors added to embeddings
    rope_theta: PositiveFloat = 10000.0  # base of RoPE's frequencies
    rope_scaling: RopeScaling | None = None  # None = plain RoPE
    rope_interleaved: bool = False  # rotated pairs are neighbours, instead of one dim from each half
    sliding_window: PositiveInt | None = None  # tokens that a token in a sliding layer attends to, itself included
    layer_types: list[Literal["full", "sliding"]] | None = None  # a pattern, repeated over the layers; None = all full
    rope_theta_sliding: PositiveFloat | None = None  # base of RoPE in sliding layers, never scaled; None = rope_theta
    head: Literal["lm", "scalar"] = "lm"  # scalar: a number a position in place of logits (reward model, critic)
    tie_embeddings: bool = True  # the head uses the embedding's weights; never with head: scalar
    mla: MlaConfig | None = None  # read with attention: mla
    moe: MoeConfig | None = None  # None = all layers dense
    mtp_layers: int = Field(0, ge=0, le=100)  # number of multi-token prediction modules (arXiv 2412.19437)
    mtp_coef: float = Field(0.3, ge=0.0)  # weight of the mean loss of the multi-token prediction modules
    lora: LoraConfig | None = None  # None = full fine-tuning
    mup: MupConfig | None = None  # factors that depend on the width, for initial values, lr, logits and scores


class TokenizerConfig(Section):
    """Names a Hugging Face tokenizer directory; if it does not exist, it is trained from the data, or made from
    `base`."""

    path: UserPath | None = None  # None = <run directory>/tokenizer; where it is not made here, a name on the hub too
    base: UserPath | None = None  # a SentencePiece .model file, tokenizer directory or hub name, instead of training
    algorithm: Literal["bpe", "wordpiece", "unigram"] = "bpe"  # when trained; all work on bytes, so no text is unknown
    vocab_size: PositiveInt = 1024  # when trained: 256 bytes, special tokens and learned tokens together
    train_bytes: PositiveInt = 4_000_000  # at most this much text is read to train it
    split: Literal["gpt2", "gpt4", "gpt4o"] = "gpt2"  # whose rule splits text into words; no token crosses a split
    digits: Literal["single", "triples", "none"] = "single"  # most digits in a token: one, three, or no limit
    special_tokens: list[str] = Field(
        []
    )  # more, beside those of padding, end of text, chat, data.fim_share, span_share
    chat: Literal["none", "chatml"] = "none"  # chatml: its template and tokens; turns and documents end with <|im_end|>
    chat_template: str | None = None  # name of one of several templates, or a file with one; None = the tokenizer's own
    chat_template_kwargs: dict[str, Any] = Field({})  # variables of the template, such as enable_thinking: false


class ParallelConfig(Section):
    """Sets the mesh axes, outermost first: pp, dp_replicate, dp_shard, cp, tp. `dp_shard: -1` takes all ranks left."""

    pp: Count = 1  # pipeline ranks
    dp_replicate: PositiveInt = 1  # data-parallel copies that shard nothing; with fsdp (HSDP) or zero_stage 0
    dp_shard: int = -1  # data-parallel ranks that ZeRO or FSDP2 shards over (together with cp)
    cp: PositiveInt = 1  # context-parallel ranks: each holds a part of every row
    tp: PositiveInt = 1  # tensor-parallel ranks; divides heads, K/V heads, ffn_size, vocab_size
    ep: PositiveInt = 1  # expert-parallel ranks, a part of dp_shard x cp: each holds a part of the experts
    sequence_parallel: bool = True  # with tp > 1: norms and residual stream are computed on a slice of the row
    context: Literal["ring", "alltoall", "allgather"] = "ring"  # attention over cp (arXiv 2310.01889, 2309.14509)
    schedule: Literal["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"] = "1f1b"  # the pipeline schedule
    virtual_stages: Count = 1  # pipeline stages on each rank; 1f1b: 1, zbv: 2, interleaved: 2 or more
    stage_layers: list[int] | None = None  # layers of each pipeline stage; None = balanced, the head counted


class EngineConfig(Section):
    """Configures how a rank computes a step: backend, sharding of states, precision, recomputation."""

    backend: Literal["deepspeed", "fsdp"] = "deepspeed"  # DeepSpeed ZeRO, or PyTorch FSDP2
    zero_stage: int = Field(1, ge=0, le=3)  # deepspeed: shards 1: optimizer state, 2: also gradients, 3: also weights
    reshard: bool = True  # fsdp: free whole weights after the forward (as ZeRO-3); false: after the backward (ZeRO-2)
    offload: Literal["none", "optimizer", "params", "nvme"] = "none"  # to CPU memory; nvme: optimizer state to a disk
    offload_path: UserPath | None = None  # nvme: a directory on a fast local disk
    precision: Literal["fp32", "bf16", "fp16", "fp8", "auto"] = "bf16"  # masters are fp32; auto: bf16 where it is fast
    loss_scale: PositiveFloat | None = None  # fp16: None = dynamic
    loss_scale_window: PositiveInt = 1000  # fp16, dynamic: steps without overflow before the scale doubles
    remat: Literal["none", "selective", "full"] = "none"  # keeps all; matrix products, attention; block inputs
    compile: bool = False  # torch.compile of each block
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"  # the kernel; auto: the fastest that is valid here
    logprob_chunk_tokens: PositiveInt | None = None  # rows of logits held at a time; None = 1 GB, on a CPU 64 to 256 MB
    timeout_s: PositiveInt = 600  # time limit of a collective

    @field_validator("precision")
    @classmethod
    def _of_this_machine(cls, precision: str) -> str:
        """Resolves `auto` for this machine at once, so that the written configuration holds the precision in use."""
        return fast_precision() if precision == "auto" else precision


class OptimConfig(Section):
    """Configures the optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: for matrices of blocks and experts, adamw for the rest
    lr: PositiveFloat = 3e-4  # the highest learning rate, after the warmup
    min_lr: float = Field(3e-5, ge=0.0)  # last learning rate of linear, cosine and wsd
    betas: tuple[Decay, Decay] = (0.9, 0.95)  # decay of AdamW's two moments
    eps: PositiveFloat = 1e-8  # added to the root of the second moment
    weight_decay: float = Field(0.1, ge=0.0)  # on matrices, not on norms and biases
    muon_momentum: float = Field(0.95, ge=0.0, lt=1.0)  # momentum of muon (Nesterov)
    grad_clip: float = Field(1.0, ge=0.0)  # largest norm of the gradient; 0 = no clipping
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"  # course of the learning rate after the warmup
    wsd_decay_share: float = Field(0.2, gt=0.0, le=1.0)  # wsd: the last share of the steps falls linearly
    warmup_steps: int = Field(100, ge=0)  # updates in which lr rises from 0 (a step with minibatches makes several)


class BatchRamp(Section):
    """Sets `global_batch_seqs` rows a step from `from_tokens` trained tokens on."""

    from_tokens: PositiveInt  # of the whole run; takes effect at the next step
    global_batch_seqs: PositiveInt  # rows a step over all ranks


class SeqRamp(Section):
    """Sets rows of `seq_len` tokens from `from_tokens` trained tokens on."""

    from_tokens: PositiveInt  # of the whole run; takes effect at the next step
    seq_len: PositiveInt  # tokens a row
    rope_theta: PositiveFloat | None = None  # base of RoPE's frequencies from here on; None = as before
    rope_scaling: RopeScaling | None = None  # None = as before


class TrainConfig(Section):
    """Sets how much is trained. `global_batch_seqs = micro_batch_seqs x data-parallel ranks x accumulation`, but with
    `micro_batch_tokens` rows are dealt out by their lengths."""

    steps: PositiveInt = 1000  # steps in total; a resumed run continues the count
    epochs: PositiveFloat | None = None  # in place of steps, where rows of a file are trained: times that each is seen
    seq_len: PositiveInt = 2048  # tokens a row; of recipes that sample the longest row
    micro_batch_seqs: PositiveInt = 1  # rows in one forward on one rank
    micro_batch_tokens: PositiveInt | None = None  # one forward of unequal rows; None = micro_batch_seqs x seq_len
    global_batch_seqs: PositiveInt = 8  # rows or pairs a step over all ranks; recipes that sample count prompts
    batch_ramp: list[BatchRamp] = Field([])  # pretraining: larger steps later, rising from_tokens
    seq_ramp: list[SeqRamp] = Field([])  # pretraining: longer rows later, rising from_tokens
    eval_every_steps: int = Field(0, ge=0)  # 0 = before the first and after the last step only
    eval_seqs: PositiveInt = 64  # held-out rows


class GuardConfig(Section):
    """Sets what happens when a step goes wrong. Every decision is the same on all ranks, logged, and repeatable."""

    nonfinite: Literal["stop", "skip"] = "stop"  # NaN or Inf in loss or gradient: end the run, or skip the update
    spike: Literal["off", "skip", "rewind"] = "off"  # rewind: back to the last checkpoint, leaving these batches out
    spike_sigma: PositiveFloat = 6.0  # a spike is a loss so many standard deviations above the window's mean
    spike_window: PositiveInt = 128  # steps the mean and deviation are taken over; no spike before it is full
    max_skips: PositiveInt = 10  # skipped or rewound steps in a row before the run stops
    replica_check_steps: int = Field(0, ge=0)  # compare the weights of data-parallel copies every so often; 0 = never


class CheckpointConfig(Section):
    """Sets when the state of a run is saved, and whether a run continues from it."""

    every_steps: int = Field(100, ge=0)  # 0 = only at the end
    keep: PositiveInt = 3  # number of newest checkpoints that are kept
    resume: Literal["auto", "never"] = "auto"  # auto: from the newest intact one; never: refuse a used directory
    background: bool = False  # write during the next steps; needs a copy of the state in host memory
    on_error: Literal["warn", "stop"] = "warn"  # when a save fails: continue with a warning, or end the run


class ExportConfig(Section):
    """Configures `llmtrain export`: the newest checkpoint of the run directory, where that holds a run that trains,
    else of `model.init_from`, becomes a Hugging Face directory, with adapters merged."""

    path: UserPath | None = None  # new, empty or an older export; None = export/ (or adapter/) in that run's directory
    dtype: Literal["bf16", "fp32"] = "bf16"  # dtype of the written weights
    adapter: bool = False  # write only the adapters of a run with model.lora, as a directory for peft


class ReportConfig(Section):
    """Configures `llmtrain report`, which shows plots and samples on one HTML page."""

    path: UserPath | None = None  # the run to report on, or a directory of stages; None = the run directory


class LogConfig(Section):
    """Sets what is recorded while a stage runs."""

    every_steps: PositiveInt = 1  # steps between lines of metrics.jsonl
    wandb: Literal["offline", "online", "off", "disabled"] = "offline"  # offline sends nothing; disabled means off
    project: str = "llmtrain"  # project of W&B
    samples: int = Field(4, ge=0)  # completions written to samples.jsonl at a logged RL step or an evaluation


class Config(Section):
    """Holds one document, which configures one stage. Every recipe adds its section under its name, see
    `config.recipes`."""

    name: str = "run"  # name of the run
    run_dir: UserPath | None = None  # None = runs/<name>
    seed: int = Field(0, ge=0, le=2**63 - 1)  # of weights, data order and sampling
    plugins: list[str] = Field([])  # Python modules to import first: they may register model families and recipes
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    guard: GuardConfig = GuardConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: list[RewardConfig] = Field([RewardConfig()])  # eval judges by the first; one alone needs no list
    eval: EvalConfig = EvalConfig()
    judge: JudgeConfig = JudgeConfig()
    constitutional: ConstitutionalConfig = ConstitutionalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()
    index: IndexConfig = IndexConfig()
    scaling: ScalingConfig = ScalingConfig()
    ladder: LadderConfig = LadderConfig()
    plan: PlanConfig = PlanConfig()
    log: LogConfig = LogConfig()

    @field_validator("rewards", mode="before")
    @classmethod
    def _one_reward(cls, rewards: Any) -> Any:
        """Returns a reward that stands alone as a list of one."""
        return [rewards] if isinstance(rewards, dict) else rewards

    @property
    def directory(self) -> str:
        """Returns the run directory."""
        return self.run_dir or f"runs/{self.name}"


class StageConfig(Section):
    """Configures one entry of `stages:` in a `run` document. `set` holds sections that are merged over the document's
    own; the text `{run}` in any string is the run directory of the whole document."""

    name: str  # the stage's directory is <run directory>/<name>
    command: str  # what it runs: a recipe, or data, tokenizer, judge, constitutional, eval, export, report, index
    ranks: PositiveInt = 1  # processes under torchrun; 1 = a plain process
    set: dict[str, Any] = Field({})  # sections and keys that differ for this stage


class RoundConfig(StageConfig):
    """Configures a stage of a block: `{round}` in its name and in every text of it is the number of the round, and
    `{previous}` that of the round before (0 in the first); a text that is `{round}` and nothing else is a number."""

    first: dict[str, Any] = Field({})  # merged over `set` in round 1, which has no round before it


class RepeatConfig(Section):
    """Configures an entry of `stages:` that is a block: its stages run `repeat` times, one round after the other.
    Behind the block `{last}` is the number of its last round."""

    repeat: Annotated[int, Field(ge=1, le=100)]  # rounds; when it is raised later, the run goes on with the new ones
    name: str | None = None  # what overrides call the block: stages.NAME.repeat=4; None = its number in the list
    stages: Annotated[list[RoundConfig], Field(min_length=1)]  # of a round; each name holds {round}


class RunConfig(Config):
    """Configures a run of several stages: shared sections and a list of stages, each in <run directory>/<stage
    name>. An entry with `repeat` is a block of stages; when a document is loaded, its rounds are written out."""

    stages: list[StageConfig] = Field([])  # run in this order, finished ones skipped
