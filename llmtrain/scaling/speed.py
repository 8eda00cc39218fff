"""Says in lines how fast a plan is, what its run costs, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmtrain.arch.hardware import peak_flops
from llmtrain.config.plan import HardwareConfig
from llmtrain.config.schema import Config
from llmtrain.scaling.failures import best_interval_s, goodput, job_mttf_s
from llmtrain.scaling.plan import Plan
from llmtrain.scaling.steptime import StepTime
from llmtrain.scaling.units import amount, duration

PARTS = ("weights", "gradients", "optimizer", "buffers", "activations", "attention", "logits")
SHARD = "shard it: engine.zero_stage=3, or engine.backend=fsdp"
SHARD_STATE = "shard it: engine.zero_stage=1"
FREE = "free weights after use: engine.reshard=true"
APART = "give it ranks of its own: rollout.placement=separate"
WAIT = "let models wait in host memory (reference_waits, teachers_wait, wait_on_host)"
RANKS, ROWS = "use more ranks", "lower train.micro_batch_seqs"
CACHE, BATCH = "lower rollout.vllm.cache_gib", "lower rollout.max_batch_seqs"
RECOMPUTE = "compute more of them again: engine.remat=selective or full"
RECOMPUTE_ALL = "compute more of them again: engine.remat=full"
RING, FLEX = "use parallel.context=ring", "use engine.attention=flex"
DEVICES = "use hardware with more memory"
SPLIT = "raise parallel.tp or pp"
REMEDIES = {
    "policy": (SHARD, RANKS),
    "model": (RANKS, DEVICES),
    "generator": (APART, DEVICES),
    "packed weights": (APART, DEVICES),
    "server": (DEVICES,),
    "KV cache": (CACHE, BATCH, "lower rollout.max_new_tokens and train.seq_len"),
    "prompts": ("lower train.seq_len or rollout.max_batch_seqs",),
    "frozen models": (WAIT, RANKS),
    "critics": (WAIT, RANKS),
    "gathered": ("raise parallel.tp",),
    "weights": (SHARD, SPLIT),
    "gradients": (SHARD, SPLIT),
    "optimizer": (SHARD_STATE, "shard it over more data-parallel ranks", SPLIT),
    "buffers": (FREE, SPLIT),
    "activations": (RECOMPUTE, RECOMPUTE_ALL, ROWS, "raise parallel.tp or cp"),
    "attention": (RING, FLEX, "raise parallel.cp"),
    "logits": ("lower engine.logprob_chunk_tokens", "raise parallel.tp"),
}


def mfu(p: Plan, config: Config) -> float:
    """Returns the share of the peak that the model's own FLOPs reach (arXiv 2204.02311, appendix B)."""
    assert p.hardware is not None
    return tflops_per_gpu(p) * 1e12 / peak_flops(p.hardware, config.engine.precision)


def tflops_per_gpu(p: Plan) -> float:
    """Returns the model's own FLOPs a second and rank, in units of 1e12."""
    assert p.time is not None
    return p.work.model * p.tokens_per_step / (p.time.total_s * p.ranks) / 1e12


def run_seconds(p: Plan) -> float:
    """Returns the time of all steps at the speed of those at the start."""
    assert p.time is not None
    return p.total_tokens / p.tokens_per_step * p.time.total_s


def room_bytes(config: Config, hardware: HardwareConfig, taken: int) -> float:
    """Returns the bytes of a GPU that are left beside those that are `taken`; negative where these do not fit."""
    return (hardware.memory_gb - config.plan.reserve_gb) * 1e9 - taken


def fit_line(config: Config, hardware: HardwareConfig, parts: Mapping[str, int], useless: Sequence[str] = ()) -> str:
    """Returns whether these parts of a rank's memory fit, with the largest of them and remedies where they do not, but
    `useless` ones."""
    room, reserve = room_bytes(config, hardware, sum(parts.values())), config.plan.reserve_gb
    of = f"{hardware.memory_gb:g} GB less {reserve:g} (plan.reserve_gb)"
    if room >= 0:
        return f"fits         {room / 1e9:.3g} GB of {of} are left"
    part, size = largest_part(parts)
    most = f"most are {part}, {size:.3g} GB: {_remedies(config, part, useless)}"
    return f"does not fit {-room / 1e9:.3g} GB more than {of}; {most}"


def _remedies(config: Config, part: str, useless: Sequence[str]) -> str:
    """Returns what makes a part smaller, without what the document does already or what its engine does not read."""
    e, parallel = config.engine, config.parallel
    fsdp = e.backend == "fsdp"
    without = {
        SHARD: fsdp or e.zero_stage == 3,
        SHARD_STATE: fsdp or e.zero_stage > 0,
        FREE: not fsdp or e.reshard or parallel.pp > 1,
        APART: config.rollout.placement != "colocated",
        CACHE: config.rollout.generator != "vllm",
        BATCH: config.rollout.generator == "vllm",
        RECOMPUTE: e.remat != "none",
        RECOMPUTE_ALL: e.remat != "selective",
        RING: parallel.context == "ring" or parallel.cp == 1,
        FLEX: e.attention == "flex",
    }
    return "; or ".join(way for way in REMEDIES[part] if way not in useless and not without.get(way, False))


def parts_of(p: Plan) -> dict[str, int]:
    """Returns the parts of the plan's memory."""
    return {name: getattr(p.memory, name) for name in PARTS}


def largest_part(parts: Mapping[str, int]) -> tuple[str, float]:
    """Returns the name of the largest part of the memory, and its size in GB."""
    part = max(parts, key=lambda name: parts[name])
    return part, parts[part] / 1e9


def hardware_line(ranks: int, hardware: HardwareConfig) -> str:
    """Returns the line that names the hardware."""
    return f"hardware     {ranks:,} x {hardware.name}, {-(-ranks // hardware.gpus_per_node):,} nodes"


def speed_lines(config: Config, p: Plan) -> list[str]:
    """Returns the lines about hardware, none where none is named; time is told only where a step's size is known."""
    if p.hardware is None:
        return []
    head = [hardware_line(p.ranks, p.hardware), fit_line(config, p.hardware, parts_of(p))]
    if p.time is None:
        return head
    tokens = p.tokens_per_step / p.time.total_s
    return [
        *head,
        f"step         {p.time.total_s:.3g} s: {spent(p.time)} {estimated(config)}",
        f"speed        {tokens:,.0f} tokens/s, {amount(tflops_per_gpu(p))} TFLOP/s a GPU, MFU {mfu(p, config):.1%}",
        f"run          {run_cost(config, p, run_seconds(p))}",
        *failure_lines(config, p, run_seconds(p)),
    ]


def spent(time: StepTime) -> str:
    """Returns the parts of a time that are there."""
    return ", ".join(f"{name.removesuffix('_s')} {value:.3g}" for name, value in vars(time).items() if value > 0)


def estimated(config: Config) -> str:
    """Returns what is said behind a time: where it is from, and what it leaves out."""
    offload = config.engine.offload
    left = "" if offload == "none" else f"; without the traffic and updates of engine.offload={offload}"
    return f"(estimated, see docs/plan.md{left})"


def failure_lines(config: Config, p: Plan, seconds: float) -> list[str]:
    """Returns the line about failures in a run of `seconds`; none where no rate is given. A GPU's failure stops the
    job."""
    s = config.plan
    if s.gpu_mttf_hours is None:
        return []
    mttf = job_mttf_s(s.gpu_mttf_hours, p.ranks)
    interval = best_interval_s(s.save_s, mttf)
    share = goodput(interval, s.save_s, s.restart_s, mttf)
    often = f"one in {mttf / 3600:.3g} h, a checkpoint every {interval:.3g} s of work loses least"
    whole = f"the run takes {duration(seconds / share)}" if share else "the run never ends"
    if config.train.epochs is not None:
        whole = "the run takes as much longer"
    return [f"failures     {often}; {share:.1%} of the time is work that lasts, {whole}"]


def run_cost(config: Config, p: Plan, seconds: float) -> str:
    """Returns what a run of `seconds` costs, where the document says how many steps it has."""
    assert p.hardware is not None
    if config.train.epochs is not None:
        return "its steps follow from the number of rows"
    return cost(config, p.hardware, p.ranks, seconds)


def cost(config: Config, hardware: HardwareConfig, ranks: int, seconds: float) -> str:
    """Returns the days, the energy and, with a price, the dollars of so many ranks for `seconds`."""
    gpu_hours = seconds / 3600 * ranks
    said = f"{duration(seconds)}, {amount(gpu_hours)} GPU hours"
    if hardware.watts is not None:
        energy = gpu_hours * hardware.watts * config.plan.power_factor / 1000
        more = "" if config.plan.power_factor == 1 else f" x {config.plan.power_factor:g}"
        said += f", {amount(energy)} kWh at {hardware.watts:g} W a GPU{more}"
    price = config.plan.price_per_gpu_hour
    return said if price is None else f"{said}, {amount(gpu_hours * price)} dollars at {price:g} a GPU hour"
