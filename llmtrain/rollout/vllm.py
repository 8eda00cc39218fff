"""Generates with a vLLM server of its own: tokens in, tokens and log-probs out, weights by shared memory."""

from __future__ import annotations

import hashlib
import shutil
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.arch.mup import without_mup
from llmtrain.arch.resolve import hf_config
from llmtrain.config.sampling import RolloutConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.config.vllm import LEAST_TEMPERATURE, NO_CHECKSUMS, truncates
from llmtrain.data.post import ServerFault
from llmtrain.model.hf_write import hf_tensors
from llmtrain.rollout.continuous import Token
from llmtrain.rollout.sampling import check_prompts, check_sampling
from llmtrain.rollout.stop import Decode, Stop
from llmtrain.rollout.vllm_answers import (
    BadAnswer,
    Said,
    choices_of,
    in_order,
    likeliest_of,
    read_choice,
    read_prompt,
)
from llmtrain.rollout.vllm_experts import ServedExperts
from llmtrain.rollout.vllm_server import VllmServer
from llmtrain.types import Group, Prompt, Sample, Sampling

GENERATE = "/inference/v1/generate"
TOKEN_BYTES, ANSWER_BYTES = 512, 65_536  # of an answer: for a token, and beside all tokens
MOST_TOLD = 20  # of the likeliest tokens of a place
GIB, MIB = 2**30, 2**20


class VllmGenerator:
    """Samples from a whole model in a vLLM server that this object starts, and that ends with it.
    `rollout/generator.py` defines the contract of each method.

    A sequence ends as with the native generator. The tokens drawn depend on the weights, the prompt, its seed and the
    sample's number (up to the rounding of a batch), but they are others than those of the native generator.
    """

    def __init__(
        self,
        model: ModelConfig,
        settings: RolloutConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        max_seq_tokens: int | None = None,
        decode: Decode | None = None,
        raw: bool | None = None,
        record_experts: bool = False,
    ) -> None:
        """Starts the server and waits for it. `model` is resolved and has no adapters. `raw`: log-probs are those of
        temperature 1, before truncation (None: where `settings` truncate); else those of the temperature.
        `record_experts`: samples hold the experts that were chosen for their tokens. Raises ServerFault when the
        server does not start."""
        self.model, self.settings, self.dtype, self.decode = model, settings, dtype, decode
        self.raw = truncates(settings.top_p, settings.top_k) if raw is None else raw
        self.max_seq_tokens = min(max_seq_tokens or model.max_positions, model.max_positions)
        device = torch.device(device)
        self.sleeps = device.type == "cuda"  # on a CPU a server can free nothing
        self.version, self.loaded, self.asleep = 0, False, False
        self.awake = {"weights", "kv_cache"}  # what the server holds
        plain = without_mup(model) if model.mup else model  # its factors go into the weights
        described = {**hf_config(plain), "dtype": str(dtype).removeprefix("torch.")}
        gpu = (device.index or 0) if self.sleeps else None
        self.server = VllmServer(settings.vllm, described, self._arguments(), gpu)
        self.close = weakref.finalize(self, self.server.stop)  # whoever drops this ends the server, too
        try:
            self.server.ready()
            self.experts = ServedExperts(self.server, model, self._deadline()) if record_experts else None
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Returns `num_samples` rollouts a prompt, in the order of the prompts.

        Raises ValueError for a prompt that is empty or leaves no room for a token and for what vLLM cannot sample,
        FloatingPointError when the logits are not finite, RuntimeError when asleep or without weights, ServerFault
        when the server does not answer in time or not as it must.
        """
        self.check(prompts, sampling)
        if fault := self._unfit(sampling):
            raise ValueError(fault)
        deadline = self.woken("weights", "kv_cache")
        alone = (
            sampling.stop_strings or sampling.temperature == 0
        )  # that stop by themselves; vLLM takes no greedy group
        each = 1 if alone else self.settings.max_batch_seqs
        n = sampling.num_samples
        parts = [(p, i, min(each, n - i)) for p in prompts for i in range(0, n, each)]
        pool = ThreadPoolExecutor(max(1, min(len(parts), self.settings.max_batch_seqs)))
        try:
            answers = list(pool.map(lambda part: self._complete(*part, sampling, deadline), parts))
        except ServerFault:
            self.server.stop()  # so that no request waits on
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        samples = [sample for answer in answers for sample in answer]
        if samples:  # an answer may name no version: a streamed one does not
            self.check_version(deadline)
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sends every weight by canonical name; a tied head may come under both names.

        Raises ValueError when one is missing, unknown or of another shape. The model is then partly updated, and
        nothing is sampled from it: load again.
        """
        deadline = self.woken("weights")
        self.loaded = False
        self.server.call("llmtrain_begin", deadline=deadline)
        for number, bucket in enumerate(self._buckets(hf_tensors(weights, self.model, self.dtype))):
            self._send(f"{number}.safetensors", bucket, deadline)
        for answer in self.server.call("llmtrain_finish", str(version), deadline=deadline):
            if answer["missing"]:
                raise self.server.fault(f"weights are missing there: {', '.join(answer['missing'][:5])}")
        done = self.server.post("/reset_prefix_cache", {}, ANSWER_BYTES, deadline)
        if done != {"success": True}:
            raise self.server.fault(f"it keeps what it computed with old weights: {done}")
        self.server.post("/update_weight_version", {"new_version": str(version)}, ANSWER_BYTES, deadline)
        self.version, self.loaded = version, True

    def checksums(self) -> list[dict[str, str]]:
        """Raises ValueError: vLLM holds its weights joined and packed, not as they were sent."""
        raise ValueError(NO_CHECKSUMS)

    def sleep(self) -> None:
        """Frees what the server holds, on a GPU: keys and values, and the weights, which wait in host memory. On a CPU
        the server keeps all."""
        self.asleep = True
        if self.sleeps and self.awake and self.loaded:
            self.server.post("/sleep", {}, ANSWER_BYTES, self._deadline())
            self.awake = set()

    def wake(self) -> None:
        """Allows `generate` again, which takes the memory when it is called."""
        self.asleep = False

    def _arguments(self) -> list[str]:
        """Returns the arguments of the server beside its model and address."""
        s, dtype = self.settings, str(self.dtype).removeprefix("torch.")
        shape = ["--dtype", dtype, "--max-model-len", str(self.max_seq_tokens), "--max-num-seqs", str(s.max_batch_seqs)]
        memory = ["--kv-cache-memory-bytes", str(int(s.vllm.cache_gib * GIB)), "--tensor-parallel-size", str(s.tp)]
        ours = ["--worker-extension-cls", "llmtrain_vllm.Loader", "--middleware", "llmtrain_vllm.Guard"]
        plain = ["--tokens-only", "--load-format", "dummy", "--generation-config", "vllm", "--disable-log-stats"]
        quiet = ["--disable-uvicorn-access-log", "--disable-fastapi-docs", "--served-model-name", "policy"]
        mode = ["--logprobs-mode", "raw_logprobs" if self.raw else "processed_logprobs"]
        told = ["--max-logprobs", str(MOST_TOLD + 1)]  # the drawn token is one of so many
        # a CPU server shares prompts by blocks of 128 tokens, unless told otherwise; and it dies of a prompt that it
        # computes in parts when its completion has a seed (it sets the seed's generator back, which a CPU's cannot)
        on_cpu = ["--enforce-eager", "--block-size", "32", "--no-enable-chunked-prefill"]
        device = ["--enable-sleep-mode"] if self.sleeps else on_cpu
        return [*shape, *memory, *ours, *plain, *quiet, *mode, *told, *device]

    def _deadline(self) -> float:
        return time.monotonic() + self.settings.vllm.answer_s

    def woken(self, *parts: str) -> float:
        """Makes the server hold its weights, then keys and values, as asked; returns the deadline of the call."""
        deadline = self._deadline()
        for part in parts:
            if part not in self.awake:
                self.server.post(f"/wake_up?tags={part}", {}, ANSWER_BYTES, deadline)
                self.awake.add(part)
        return deadline

    # Completions

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Raises RuntimeError when nothing can be sampled now, ValueError for what can be sampled nowhere."""
        if self.asleep:
            raise RuntimeError("the generator sleeps; call wake() before generate()")
        if not self.loaded:
            raise RuntimeError("the generator has no weights; call load_weights() before generate()")
        check_sampling(sampling)
        check_prompts(prompts, self.max_seq_tokens)
        assert self.decode or not sampling.stop_strings, "stop strings need a decoder"

    def _unfit(self, sampling: Sampling) -> str | None:
        """Returns why this server gives no log-probs that `Sample` asks for, None where it does."""
        if fault := unfit(sampling.temperature, sampling.top_p, sampling.top_k):
            return fault
        if truncates(sampling.top_p, sampling.top_k) and not self.raw:
            return f"top_p={sampling.top_p:g}, top_k={sampling.top_k}: the server was started without truncation"
        if self.raw and sampling.temperature not in (0.0, 1.0):
            return f"temperature={sampling.temperature:g}: the server was started for temperature 1"
        return None

    def _most(self, prompt: Prompt, sampling: Sampling) -> int:
        """Returns how many tokens a completion has at most."""
        return min(sampling.max_new_tokens, self.max_seq_tokens - len(prompt.ids))

    def _body(self, prompt: Prompt, first: int, count: int, sampling: Sampling, **more: int) -> dict[str, Any]:
        """Returns the request for the samples `first` to `first + count - 1` of a prompt."""
        asked = {
            **{"n": count, "seed": seed_of(prompt) + first, "max_tokens": self._most(prompt, sampling), "logprobs": 0},
            **{"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k},
            **{"stop_token_ids": list(sampling.stop_ids), "ignore_eos": True, "detokenize": False, **more},
        }
        return {"model": "policy", "token_ids": prompt.ids, "sampling_params": asked}

    def _complete(self, prompt: Prompt, first: int, count: int, sampling: Sampling, deadline: float) -> list[Sample]:
        """Returns the samples `first` to `first + count - 1` of a prompt."""
        if sampling.stop_strings:
            return [self._streamed(prompt, first, sampling, deadline)]
        most, stop = self._most(prompt, sampling), Stop(sampling.stop_ids)
        max_bytes = ANSWER_BYTES + TOKEN_BYTES * count * most
        named = {"request_id": self.experts.name()} if self.experts else {}
        body = {**self._body(prompt, first, count, sampling), **named}
        answer = self.server.post(GENERATE, body, max_bytes, deadline)
        try:
            samples = [self._sample(prompt, self._said(choice), stop, most) for choice in in_order(answer, count)]
        except BadAnswer as error:
            raise self.server.fault(f"it answers {error}") from error
        return self.experts.add(named["request_id"], samples, deadline) if self.experts else samples

    def _streamed(self, prompt: Prompt, number: int, sampling: Sampling, deadline: float) -> Sample:
        """Returns a sample that may stop at a string."""
        name = self.experts.name() if self.experts else None
        tokens = list(self.stream(prompt, number, sampling, deadline, name=name))
        n, logprobs = len(tokens), [t.logprob for t in tokens]
        sample = Sample(
            prompt.ids, [t.id for t in tokens], [True] * n, logprobs, [self.version] * n, tokens[-1].end == "stop"
        )
        return self.experts.add(name, [sample], deadline)[0] if self.experts else sample

    def stream(
        self,
        prompt: Prompt,
        number: int,
        sampling: Sampling,
        deadline: float,
        top: int | None = None,
        name: str | None = None,
    ) -> Iterator[Token]:
        """Yields the tokens of a sample as they come, with the `top` likeliest of each place where that is given. The
        server, which knows no texts, ends where we hang up: at a stop string, or when this iterator is closed. `name`
        is that of the request, where the server shall remember its experts.

        Raises ServerFault and FloatingPointError as `generate` does.
        """
        most, stop = self._most(prompt, sampling), Stop(sampling.stop_ids, sampling.stop_strings, self.decode)
        told = {} if top is None else {"logprobs": top + 1}  # beside the drawn token, if that is none of the likeliest
        named = {} if name is None else {"request_id": name}
        body = {**self._body(prompt, number, 1, sampling, **told), **named, "stream": True}
        ids: list[int] = []
        try:
            with closing(self.server.lines(GENERATE, body, ANSWER_BYTES, deadline)) as lines:
                for choice in choices_of(lines):
                    said = self._said(choice)
                    likeliest = likeliest_of(choice, len(said.ids), top)
                    for id_, logprob, best in zip(said.ids, said.logprobs, likeliest, strict=True):
                        ids.append(id_)
                        end = "stop" if stop(ids) else "length" if len(ids) == most else None
                        exact = sampling.temperature in (0.0, 1.0)  # then both are the same, but for truncation
                        own = logprob if exact or not self.raw else None
                        plain = logprob if top is not None and (exact or self.raw) else None
                        yield Token(number, id_, own, plain, best, self.version, end)
                        if end:
                            return
            raise BadAnswer(f"with a stream of {len(ids)} tokens of {most} that do not end with a stop token")
        except BadAnswer as error:
            raise self.server.fault(f"it answers {error}") from error

    def scored(self, ids: list[int], top: int) -> list[Token]:
        """Returns the tokens of a prompt but the first, as the model sees them at temperature 1, with the `top`
        likeliest of each place. Raises ServerFault as `generate` does."""
        body = self._body(Prompt(ids), 0, 1, Sampling(1), prompt_logprobs=top)
        max_bytes = ANSWER_BYTES + TOKEN_BYTES * len(ids) * (1 + top)
        answer = self.server.post(GENERATE, body, max_bytes, self._deadline())
        try:
            told = read_prompt(answer, ids, top)
        except BadAnswer as error:
            raise self.server.fault(f"it answers {error}") from error
        return [Token(0, id_, value, value, best, self.version, None) for id_, value, best in told]

    def _said(self, choice: dict[str, Any]) -> Said:
        """Returns what a choice says. Raises BadAnswer unless it says all, for the weights that were loaded last."""
        said = read_choice(choice, self.model.vocab_size)
        spans = choice.get("weight_versions")
        if spans is not None and {span.get("version") for span in spans} != {str(self.version)}:
            raise BadAnswer(f"with weights of version {spans}, not {self.version}")
        return said

    def _sample(self, prompt: Prompt, said: Said, stop: Stop, most: int) -> Sample:
        n = len(said.ids)
        if not 0 < n <= most or said.ended not in ("stop", "length"):
            raise BadAnswer(f"with {n} tokens of 1 to {most}, ended by {said.ended}")
        finished = stop(said.ids)
        if not finished and n < most:
            raise BadAnswer(f"with {n} tokens of {most} that do not end with a stop token")
        return Sample(prompt.ids, said.ids, [True] * n, said.logprobs, [self.version] * n, finished)

    def check_version(self, deadline: float) -> None:
        """Raises ServerFault unless the server has the weights that were loaded last."""
        found = self.server.call("llmtrain_version", deadline=deadline)
        if not found or any(each["version"] != str(self.version) for each in found):
            raise self.server.fault(f"has weights of version {found}, not {self.version}")

    # Weights

    def _buckets(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Yields tensors in groups of `rollout.vllm.bucket_mib` at most, a larger one by itself."""
        bucket, held_bytes = {}, 0
        for name, tensor in tensors:
            if bucket and held_bytes + tensor.nbytes > self.settings.vllm.bucket_mib * MIB:
                yield bucket
                bucket, held_bytes = {}, 0
            bucket[name] = tensor
            held_bytes += tensor.nbytes
        if bucket:
            yield bucket

    def _send(self, name: str, bucket: dict[str, Tensor], deadline: float) -> None:
        """Loads tensors into the server, by a file in its private folder, that is removed again."""
        path = self.server.folder / name
        check_room(path.parent, sum(tensor.nbytes for tensor in bucket.values()))
        try:
            save_file(bucket, path)
            self.server.call("llmtrain_load", name, deadline=deadline)
        finally:
            path.unlink(missing_ok=True)


def unfit(temperature: float, top_p: float, top_k: int) -> str | None:
    """Returns why vLLM cannot sample so with the log-probs that `rollout.sampling` promises, None where it can. It
    gives those of temperature 1 before truncation, or those of the temperature behind it."""
    if 0 < temperature < LEAST_TEMPERATURE:
        return f"temperature={temperature:g}: must be 0 or at least {LEAST_TEMPERATURE}, vLLM takes that for less"
    if truncates(top_p, top_k) and temperature not in (0.0, 1.0):
        return f"temperature={temperature:g}: must be 0 or 1 with top_p or top_k, as vLLM gives no other log-probs then"
    return None


def seed_of(prompt: Prompt) -> int:
    """Returns the seed of a prompt's first sample; those of the others follow it."""
    return int.from_bytes(hashlib.sha256(str(prompt.seed).encode()).digest()[:6])


def check_room(folder: Path, size_bytes: int) -> None:
    """Raises OSError when the shared memory has no room for so much."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes + MIB:
        raise OSError(
            f"{folder}: has {free_bytes // MIB} MiB free, weights are sent in files of {size_bytes // MIB + 1} MiB "
            "there; lower rollout.vllm.bucket_mib, or give the container more shared memory (--shm-size)"
        )
