"""Defines the keys of what samples from a model and judges the samples: rollouts, rewards, evaluation, judges."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llmtrain.config.agent import AgentConfig
from llmtrain.config.document import model_name
from llmtrain.config.environment import EnvironmentConfig
from llmtrain.config.lm_eval import LmEvalConfig
from llmtrain.config.rubric import RubricConfig
from llmtrain.config.section import LEAST_TEMPERATURE, DeadlineS, Dtype, OwnCode, Section, Share, UserPath, file_of
from llmtrain.config.tasks import EvalTask
from llmtrain.config.testtime import TestTimeConfig
from llmtrain.config.vllm import VllmConfig


class RolloutConfig(Section):
    """Configures sampling during RL."""

    generator: Literal["native", "vllm"] = "native"  # the trained decoder with a static KV cache, or a vLLM server
    placement: Literal["colocated", "separate", "ahead"] = "colocated"  # by trainers, ranks, processes; see the pages
    workers: int = Field(0, ge=0)  # separate: ranks that sample; ahead: processes, over all machines; else not read
    max_staleness: int = Field(0, ge=0)  # steps that the weights behind a trained token may be old; 0 = in step
    inflight: Literal["finish", "continue", "restart"] = "finish"  # ahead: unfinished samples, when new weights come
    deadline_s: DeadlineS = 600.0  # ahead: for a worker to start, to take weights, to answer; later it is restarted
    restarts: int = Field(3, ge=0)  # ahead: of each worker in a run; then it is dropped
    record: bool = False  # write what each step takes to rollouts/ in the run directory
    replay: UserPath | None = None  # such a directory of another run: its rollouts are trained on, nothing is sampled
    group_size: PositiveInt = 8  # samples a prompt
    max_new_tokens: PositiveInt = 256  # longest completion, in tokens
    temperature: float = Field(1.0, ge=LEAST_TEMPERATURE)  # for sampling, and for the log-probs in the loss
    top_p: float = Field(1.0, gt=0.0, le=1.0)  # share of probability kept; 1 = all
    top_k: int = Field(0, ge=0)  # most likely tokens kept; 0 = all
    stop: list[Annotated[str, Field(min_length=1)]] = Field([])  # texts that end a completion, as end tokens do
    skip_special_tokens: bool = True  # rewards, samples and evaluations read completions without special tokens
    max_batch_seqs: PositiveInt = 256  # sequences decoded together on one rank
    agent: AgentConfig | None = None  # a program of your own that talks to the policy; null = none
    environment: EnvironmentConfig | None = None  # what completions talk to, turn by turn; null = they stand alone
    verify: Literal["probe", "checksum", "off"] = "probe"  # after every sync; see docs/rollouts/trust.md
    router_replay: bool = False  # the update uses the experts that the generator chose; docs/rollouts/trust.md
    max_logprob_gap: PositiveFloat | None = None  # generator against trainer; None = 1e-3 in fp32, 1.0 in bf16
    tp: PositiveInt = 1  # vllm: processes that share a server's model (tensor parallel)
    vllm: VllmConfig = VllmConfig()

    @property
    def prompts_at_once(self) -> int:
        """Returns how many prompts a worker that samples ahead is given at most: of as many samples as it decodes
        together, or as the processes of an agent run at the same time."""
        most = self.max_batch_seqs if self.agent is None else self.agent.processes
        return max(1, most // self.group_size)


REWARDS = ("reasoning_gym", "first_integer", "math")
DEVICE_MAP = r"^(auto|balanced|balanced_low_0|sequential|cpu|cuda(:\d+)?)$"  # of accelerate


class RewardConfig(Section):
    """Names a reward of completions, a function of your own, a reward model or a judge; see docs/rewards.md. Recipes
    that sample train on the sum of all, by their weights. `rewards.KEY=value` on the command line sets a key in all
    entries."""

    function: OwnCode | None = None  # your own: my_rewards.py:score or package.module:score; None = the one of `name`
    model: UserPath | None = None  # a sequence classifier with one output: an export, a directory, a hub name
    rubric: RubricConfig | None = None  # a model behind a server judges by a rubric
    name: str = "reasoning_gym"  # reasoning_gym, first_integer, math; of another kind of reward: its name in metrics
    weight: float = 1.0  # in the sum
    deadline_s: DeadlineS = 5.0  # to score one completion; later is an error, see docs/rewards.md; not: model, rubric
    max_error_share: Share | None = None  # of a step; above it the run stops; None = 1; function, model, rubric: 0.5
    unsandboxed: bool = False  # run `function` with all that you may do: files, network, what it remembers
    device_map: Annotated[str, Field(pattern=DEVICE_MAP)] = "auto"  # model: GPU, then host memory; cpu, cuda:1, ...
    dtype: Dtype = "auto"  # model: of its weights; auto: as stored, but fp32 where this machine is slow in bf16
    batch_tokens: PositiveInt = 8192  # model: tokens in a forward, padding counted
    render: Literal["auto", "rows", "template"] = "auto"  # model: as our recipes train rows, or as transformers does

    @property
    def verifies(self) -> bool:
        """Says whether it knows what is right: it is neither a model nor a judge."""
        return self.model is None and self.rubric is None

    @property
    def file(self) -> str | None:
        """Returns the file that `function` is in, None where it is in a module or there is none."""
        return file_of(self.function)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """Names a function or a model that has no name."""
        if not isinstance(data, dict) or "name" in data:
            return data
        if isinstance(data.get("function"), str):
            return {**data, "name": data["function"].rpartition(":")[2]}
        if data.get("rubric") is not None:
            return {**data, "name": "rubric"}
        return {**data, "name": model_name(data["model"])} if isinstance(data.get("model"), str) else data

    @field_validator("name")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        own = any(info.data.get(kind) is not None for kind in ("function", "model", "rubric"))
        if not own and name not in REWARDS:
            known = {"expected": " or ".join([", ".join(map(repr, REWARDS[:-1])), repr(REWARDS[-1])])}
            raise PydanticCustomError("literal_error", "must be one of {expected}", known)
        return name


class EvalConfig(Section):
    """Sets what `llmtrain eval` measures: on the newest checkpoint of the run directory, where that holds a run that
    trains, else on `model.init_from`. With `every_steps` a run measures text and problems while it
    trains, nothing else of this section."""

    every_steps: int = Field(0, ge=0)  # steps between measurements beside training, with the first and last; 0 = never
    text: bool = True  # perplexity on the held-out shards of `data.path`
    text_seqs: PositiveInt = 200  # held-out rows at most
    problems: int = Field(256, ge=0)  # problems from `data.held_out` at most
    samples: PositiveInt = 8  # completions of each problem, for pass@k and maj@k
    tasks: list[EvalTask] = Field([])  # built-in task files, such as gsm8k, or your own; see docs/evaluation.md
    hub: bool = False  # tasks whose data is not given as a path download it from the hub, once
    label: str = "model"  # how the report names it
    test_time: TestTimeConfig | None = None  # null = it is not measured
    lm_eval: LmEvalConfig = LmEvalConfig()


class JudgeConfig(Section):
    """Configures `llmtrain judge`: `model.init_from` samples `rollout.group_size` completions of each prompt of
    `data.train` and judges them; see docs/posttraining/judge.md."""

    by: Literal["reward", "model", "majority", "greedy", "logprob", "rubric"] = "greedy"  # who judges; see the page
    prompts: PositiveInt = 64  # prompts that are judged, at most the rows of data.train
    first: int = Field(0, ge=0)  # number of the first of them, in the order that `seed` gives
    round: int = Field(0, ge=0)  # they begin `round` x `prompts` further on, so that no round repeats another's
    pairs_per_prompt: PositiveInt = 1  # at most: best against worst, second best against second worst, ...
    best_per_prompt: PositiveInt = 1  # rows of a prompt in best.jsonl at most
    best_least: float | None = None  # lowest score of a row in best.jsonl; None = any
    tie: float = Field(0.0, ge=0.0)  # scores that differ by no more are a tie, and no pair
    soft: PositiveFloat | None = None  # pairs get a `label`, sigmoid(difference of the scores / soft); None = none
    rubric: UserPath | None = None  # by rubric: a text file with {prompt} and {completion}; None = the one of the page
    votes: PositiveInt = 4  # by rubric: judgements of a completion, whose scores are averaged
    rubric_tokens: PositiveInt = 64  # by rubric: longest judgement
    lowest: float = 0.0  # by rubric: lowest score that counts
    highest: float = 5.0  # by rubric: highest score that counts


class ConstitutionalConfig(Section):
    """Configures `llmtrain constitutional` (arXiv 2212.08073): `model.init_from` criticises and revises its answers to
    prompts of `data.train`, and compares pairs of them; see docs/posttraining/constitutional.md."""

    principles: UserPath | None = None  # YAML with a list of principles; must be set
    prompts: PositiveInt = 64  # prompts that are answered, at most the rows of data.train
    first: int = Field(0, ge=0)  # number of the first of them, in the order that `seed` gives
    round: int = Field(0, ge=0)  # they begin `round` x `prompts` further on, so that no round repeats another's
    revisions: int = Field(2, ge=0)  # rounds of critique and revision; 0 = no sft.jsonl
    critique_tokens: PositiveInt = 128  # longest critique
    pairs_per_prompt: int = Field(1, ge=0)  # pairs of samples of a prompt that are compared; 0 = no pairs.jsonl
    label: Literal["logprobs", "thought"] = "logprobs"  # thought: it thinks before it chooses, and the label is clamped
    thought_tokens: PositiveInt = 128  # by thought: longest thought
    clamp: tuple[float, float] = (0.4, 0.6)  # by thought: lowest and highest probability of a choice
    agreement: UserPath | None = None  # rows with chosen and rejected: how often the judge agrees is reported
    agreement_pairs: PositiveInt = 200  # of them at most
