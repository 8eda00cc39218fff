"""Generates with our own Decoder: static KV cache, continuous batching, a prompt computed once for its group."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmtrain.arch.attention import round_up
from llmtrain.data.tree import shared_tokens
from llmtrain.model.decoder import Decoder
from llmtrain.model.kernels.packed import Packed
from llmtrain.rollout.cache import KVCache, Recorder
from llmtrain.rollout.checksums import checksum
from llmtrain.rollout.completion import Completion
from llmtrain.rollout.experts import ChosenExperts
from llmtrain.rollout.sampling import check_prompts, check_sampling, sample
from llmtrain.rollout.stem import STEM_SHARE, STEM_TOKENS, Behind, Stem, masks_behind, without_head
from llmtrain.rollout.stop import Decode, Stop
from llmtrain.types import Group, Prompt, Sampling

_PREFILL_TOKENS = 8192  # prompt tokens in one forward, padding included (bounds the activations)


class NativeGenerator:
    """Samples from a whole Decoder, in its dtype. `rollout/generator.py` defines the contract of each method.

    At most `max_batch_seqs` sequences are decoded together; a finished one makes room for the next. A sequence ends at
    `max_seq_tokens` (prompt and completion; None = the model's max_positions) unless a stop token ends it earlier, or a
    stop string in what `decode` makes of the completion. The tokens drawn depend only on the weights, the prompt, its
    seed and the sample's number, not on the rest of the batch.
    """

    def __init__(
        self,
        model: Decoder,
        max_batch_seqs: int,
        device: torch.device | str,
        max_seq_tokens: int | None = None,
        decode: Decode | None = None,
        record_experts: bool = False,
    ) -> None:
        """`record_experts`: samples hold the experts that were chosen for their tokens."""
        self.model = model.to(device).eval()
        self.packed = Packed(self.model)
        self.device = torch.device(device)
        self.max_batch_seqs = max_batch_seqs
        self.max_seq_tokens = min(max_seq_tokens or model.config.max_positions, model.config.max_positions)
        self.decode = decode
        self.version = 0
        self.asleep = False
        self.cache: KVCache | None = None
        self.experts = ChosenExperts(self.model) if record_experts else None

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, between: Callable[[], object] | None = None
    ) -> list[Group]:
        """Returns `num_samples` rollouts a prompt, in the order of the prompts.

        `between` is called whenever sequences have got a token, and may load other weights: the sequences go on under
        these, each token knows its version. Keys and values of earlier tokens stay as they are: a token's log-prob is
        then that of the distribution it was drawn from, under neither version alone.

        Raises ValueError for a prompt that is empty or leaves no room for a token, FloatingPointError when the logits
        are not finite, RuntimeError when asleep.
        """
        self._check(prompts, sampling)
        if not prompts:
            return []
        sequences = [s for group, prompt in enumerate(prompts) for s in self._sequences(group, prompt, sampling)]
        slots = min(self.max_batch_seqs, len(sequences))
        cache = self._reserve(slots, max(s.max_tokens for s in sequences))
        decoding = Decoding(self.packed, cache, slots, experts=self.experts)
        for _ in decoding.rounds(sequences):
            if between is not None:
                self._change(between, decoding, sequences)
        self._check_finite(logprob for s in sequences for logprob in s.logprobs)
        samples = [s.sample(self.version) for s in sequences]
        return [samples[i : i + sampling.num_samples] for i in range(0, len(samples), sampling.num_samples)]

    @torch.inference_mode()
    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
        """Yields the tokens of one completion as they are sampled: those of the first sample that `generate` returns.

        It may be left before the end. Raises as `generate` does.
        """
        self._check([prompt], sampling)
        (sequence,) = self._sequences(0, prompt, replace(sampling, num_samples=1))
        cache = self._reserve(1, sequence.max_tokens)
        decoding = Decoding(self.packed, cache, 1, experts=self.experts)
        for _ in decoding.rounds([sequence]):
            self._check_finite(sequence.logprobs[-1:])
            yield sequence.tokens[-1]

    @torch.inference_mode()
    def decoding(self, slots: int, seen: Seen | None = None) -> Decoding:
        """Returns what decodes sequences that come one after the other, with a cache for `slots` of `max_seq_tokens`,
        which no other call may use meanwhile; `seen` looks at the logits of each token.

        Raises RuntimeError when asleep.
        """
        self._check([])
        return Decoding(self.packed, self._reserve(slots, self.max_seq_tokens), slots, seen, self.experts)

    def sequences(self, group: int, prompt: Prompt, sampling: Sampling) -> list[Completion]:
        """Returns what `generate` would complete, for `Decoding.waiting`. No other prompt there may have the number
        `group`. Raises as `generate` does."""
        self._check([prompt], sampling)
        return self._sequences(group, prompt, sampling)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copies every weight by canonical name, the biases of routers too; a tied head may come under both names.

        Raises ValueError when one is missing, unknown or of another shape. The model is then partly updated: load
        again.
        """
        own = self._weights()
        missing = dict(own)
        for name, tensor in weights:
            if name == "head.weight" and self.model.config.tie_embeddings:
                continue
            if name not in own or own[name].shape != tensor.shape:
                expected = list(own[name].shape) if name in own else "no tensor so named"
                raise ValueError(f"{name} {list(tensor.shape)}: the generator's model has {expected}")
            own[name].copy_(tensor)
            missing.pop(name, None)
        if missing:
            raise ValueError(f"{next(iter(missing))}: not among the weights ({len(missing)} missing in all)")
        self.version = version

    def checksums(self) -> list[dict[str, str]]:
        """Returns those of the one model that is here; a tied head is the embedding."""
        return [{name: checksum(tensor) for name, tensor in self._weights().items()}]

    def sleep(self) -> None:
        """Frees the cache and the packed weights."""
        self.cache, self.asleep = None, True
        self.packed.free()

    def wake(self) -> None:
        """Allows `generate` again."""
        self.asleep = False

    def close(self) -> None:
        """Frees what `sleep` does, for good."""
        self.sleep()

    def _weights(self) -> dict[str, Tensor]:
        """Returns all weights by canonical name, without a tied head."""
        tied = self.model.config.tie_embeddings
        return {n: x for n, x in self.model.state_dict().items() if not (tied and n == "head.weight")}

    def _change(self, between: Callable[[], object], decoding: Decoding, sequences: Sequence[Completion]) -> None:
        """Calls `between`; notes the version of the tokens before it where that changes."""
        version = self.version
        between()
        if self.version != version:
            decoding.forget()
            for s in sequences:
                s.versions += [version] * (len(s.tokens) - len(s.versions))

    def _check(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> None:
        if self.asleep:
            raise RuntimeError("the generator sleeps; call wake() before generate()")
        if sampling is not None:
            check_sampling(sampling)
            assert self.decode or not sampling.stop_strings, "stop strings need a decoder"
        check_prompts(prompts, self.max_seq_tokens)

    def _check_finite(self, logprobs: Iterable[float]) -> None:
        if not all(map(math.isfinite, logprobs)):
            self.cache = None  # it may hold NaN
            raise FloatingPointError("the logits are not finite; the weights have diverged")

    def _sequences(self, group: int, prompt: Prompt, sampling: Sampling) -> list[Completion]:
        tokens = min(len(prompt.ids) + sampling.max_new_tokens, self.max_seq_tokens)
        streams = (random.Random(f"{prompt.seed}/{i}") for i in range(sampling.num_samples))
        stop = Stop(sampling.stop_ids, sampling.stop_strings, self.decode)
        return [Completion(prompt.ids, group, tokens, sampling, stop, stream) for stream in streams]

    def _reserve(self, slots: int, tokens: int) -> KVCache:
        """Returns the cache, allocated anew when the last one is too small."""
        if self.cache is None or not self.cache.holds(slots, tokens):
            self.cache = None  # free the old one first
            dtype = self.model.embed.weight.dtype
            self.cache = KVCache(self.model.config, slots, round_up(tokens), dtype, self.device)
        return self.cache


@dataclass
class _Prefill:
    """Holds a computed prompt: for each layer keys and values [heads, T, dim], and the logits [vocabulary] after it.
    `experts` are those of its tokens, [T, layers with experts x top_k]."""

    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor
    experts: Tensor | None


class Decoding:
    """Completes sequences, `slots` at once; more may be put into `waiting` between two rounds. Row i of the cache
    belongs to `active[i]`."""

    def __init__(
        self,
        packed: Packed,
        cache: KVCache,
        slots: int,
        seen: Seen | None = None,
        experts: ChosenExperts | None = None,
    ) -> None:
        self.packed, self.cache, self.slots, self.seen, self.experts = packed, cache, slots, seen, experts
        self.model = packed.refreshed()
        self.trunk = without_head(self.model)  # prefill needs the head only for the last position of a prompt
        self.stem: Stem | None = None  # what all prompts begin with
        self.stem_experts: list[Tensor] = []  # of its tokens
        self.waiting: deque[Completion] = deque()
        self.active: list[Completion] = []
        self.prefills: dict[int, _Prefill] = {}  # by group, until its last sample has started

    def rounds(self, sequences: list[Completion]) -> Iterator[None]:
        """Completes all sequences, and yields whenever some have got their next token. Longest prompts start first:
        least padding, and least idle rows at the end."""
        self.stem = self._common([s.prompt_ids for s in sequences])
        self.waiting.extend(sorted(sequences, key=lambda s: -len(s.prompt_ids)))
        while self.waiting or self.active:
            self.round()
            yield

    def round(self) -> list[Completion]:
        """Starts what waits, as far as there is room, else decodes a token for all that are active. Returns the
        sequences that have got a token; those of them that are done have left."""
        self.packed.refreshed()
        if self.waiting and len(self.active) < self.slots:
            room = min(self.slots - len(self.active), len(self.waiting))
            new = [self.waiting.popleft() for _ in range(room)]
            self._start(new)
            groups = {self.waiting[0].group} if self.waiting else set()
            self.prefills = {group: p for group, p in self.prefills.items() if group in groups}
        else:
            new = list(self.active)
            self._decode()
        self._retire()
        return new

    def drop(self, group: int) -> None:
        """Removes what is left of the sequences of a group, between two rounds."""
        for s in [s for s in self.waiting if s.group == group]:
            self.waiting.remove(s)
        self._remove([row for row, s in enumerate(self.active) if s.group == group])

    def forget(self) -> None:
        """Drops prompts that were computed for sequences which have not begun: the weights have changed."""
        self.stem, self.stem_experts, self.prefills = None, [], {}

    def _start(self, new: list[Completion]) -> None:
        """Gives each new sequence a cache row filled with its prompt, and its first token."""
        self._prefill(list({s.group: s.prompt_ids for s in new if s.group not in self.prefills}.items()))
        for row, s in enumerate(new, len(self.active)):
            prefill = self.prefills[s.group]
            self.cache.fill(row, prefill.keys, prefill.values)
            s.experts += [] if prefill.experts is None else [prefill.experts]
        self._append(new, torch.stack([self.prefills[s.group].logits for s in new]))
        self.active += new

    def _prefill(self, prompts: list[tuple[int, list[int]]]) -> None:
        """Computes prompts (group, ids), longest first, several in a forward."""
        prompts = sorted(prompts, key=lambda each: -len(each[1]))
        while prompts:
            count = max(1, _PREFILL_TOKENS // len(prompts[0][1]))
            groups, rows = zip(*prompts[:count], strict=True)
            self.prefills.update(zip(groups, self._forward_prompts(rows), strict=True))
            prompts = prompts[count:]

    def _common(self, prompts: Sequence[list[int]]) -> Stem | None:
        """Computes what the prompts begin with, where they differ and it is long enough: few-shot examples, a system
        prompt. At least one token of each prompt is left for its own forward, which gives the logits behind it."""
        first, last = min(prompts), max(prompts)  # of sorted rows these two have the least in common
        count, longest = min(shared_tokens(first, last), min(map(len, prompts)) - 1), max(map(len, prompts))
        if first == last or count < max(STEM_TOKENS, STEM_SHARE * longest):
            return None
        stem = Stem(*self._recorded([first[:count]])[1:])
        self.stem_experts = [] if self.experts is None else [self.experts.take(1)[0]]
        return stem

    def _forward_prompts(self, prompts: Sequence[list[int]]) -> list[_Prefill]:
        """Computes the prompts in one forward. Padding is on the right, where causal attention never sees it."""
        before = self.stem.tokens if self.stem else 0
        hidden, *recorded = self._recorded([ids[before:] for ids in prompts])
        lengths = [len(ids) for ids in prompts]
        logits = self.model.head(hidden[range(len(prompts)), [n - 1 - before for n in lengths]])
        chosen = None if self.experts is None else self.experts.take(len(prompts))

        def own(blocks: list[Tensor], i: int) -> list[Tensor]:
            return [x[i, :, : lengths[i]] for x in blocks]

        def experts(i: int) -> Tensor | None:
            return None if chosen is None else torch.cat([*self.stem_experts, chosen[i, : lengths[i] - before]])

        return [_Prefill(*(own(blocks, i) for blocks in recorded), logits[i], experts(i)) for i in range(len(prompts))]

    def _recorded(self, rows: Sequence[list[int]]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Returns the last hidden states [B, T, hidden] of rows behind the stem, and for each layer the keys and values
        of stem and rows, [B, heads, stem + T, dim]."""
        width, device, recorder = max(map(len, rows)), self.cache.device, Recorder()
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        if self.stem is None:
            positions = torch.arange(width, device=device).expand_as(ids)
            hidden = self.trunk(ids, positions, caches=dict.fromkeys(self.model.layers, recorder))
            return hidden, recorder.keys, recorder.values
        behind, before = Behind(self.stem), self.stem.tokens
        positions = torch.arange(before, before + width, device=device).expand_as(ids)
        masks = masks_behind(self.model, before, positions, torch.full_like(ids, width))
        caches = dict.fromkeys(self.model.layers, lambda *kv: recorder(*behind(*kv)))
        return self.trunk(ids, positions, masks=masks, caches=caches), recorder.keys, recorder.values

    def _decode(self) -> None:
        """Decodes one more token for every active sequence."""
        masks, caches = self.cache.decoding([s.length - 1 for s in self.active])
        device = self.cache.device
        ids = torch.tensor([[s.tokens[-1]] for s in self.active], device=device)
        positions = torch.tensor([[s.length - 1] for s in self.active], device=device)
        by_layer = dict(zip(self.model.layers, caches, strict=True))
        logits = self.model(ids, positions, masks=masks, caches=by_layer)
        if self.experts is not None:
            for s, chosen in zip(self.active, self.experts.take(len(self.active)), strict=True):
                s.experts.append(chosen)
        self._append(self.active, logits[:, 0])

    def _append(self, sequences: list[Completion], logits: Tensor) -> None:
        """Samples a token for each sequence from logits [len(sequences), vocabulary]."""
        uniforms = torch.tensor([s.uniform() for s in sequences], device=logits.device)
        for rows in _alike(sequences):
            own = slice(None) if len(rows) == len(sequences) else rows
            tokens, logprobs = sample(logits[own], uniforms[own], sequences[rows[0]].sampling)
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                sequences[row].tokens.append(token)
                sequences[row].logprobs.append(logprob)
        if self.seen is not None:
            self.seen(sequences, logits)

    def _retire(self) -> None:
        """Removes finished sequences."""
        self._remove([row for row, s in enumerate(self.active) if s.done])

    def _remove(self, rows: Sequence[int]) -> None:
        """Frees rows, given in rising order; the last row moves into each gap, so that used rows stay contiguous."""
        for row in reversed(rows):
            last = self.active.pop()
            if row < len(self.active):
                self.active[row] = last
                self.cache.move(len(self.active), row, last.length - 1)


Seen = Callable[[list[Completion], Tensor], None]
"""Looks at the logits [sequences, vocabulary] from which the last token of each of these sequences was sampled."""


def _alike(sequences: Sequence[Completion]) -> list[list[int]]:
    """Returns the places of sequences that are sampled alike, together."""
    found: dict[tuple[float, float, int], list[int]] = {}
    for row, s in enumerate(sequences):
        found.setdefault((s.sampling.temperature, s.sampling.top_p, s.sampling.top_k), []).append(row)
    return list(found.values())
