"""Asks a vLLM server for the experts that it chose, and believes none of them unseen."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import routed_layers
from llmtrain.rollout.experts import dtype_of
from llmtrain.rollout.vllm_answers import BadAnswer
from llmtrain.rollout.vllm_server import VllmServer
from llmtrain.types import Sample

HEADER_BYTES = 256  # of a file, for a tensor, at most
BLOCK_TOKENS = 128  # in a block of the server's cache, at most: rows come in whole blocks


class ServedExperts:
    """Holds the way to the experts that a server records: a request gets a name, by which they are asked for when all
    its tokens are there."""

    def __init__(self, server: VllmServer, model: ModelConfig, deadline: float) -> None:
        """Makes the server record."""
        self.server, self.moe, self.numbers = server, model.moe, itertools.count()
        self.width = len(routed_layers(model)) * model.moe.top_k
        server.call("llmtrain_record", deadline=deadline)

    def name(self) -> str:
        """Returns the `request_id` of a request that will be asked for."""
        return f"routes-{next(self.numbers)}"

    def add(self, name: str, samples: Sequence[Sample], deadline: float) -> list[Sample]:
        """Returns all samples of a request with their experts. Raises ServerFault unless they are all there."""
        path = self.server.folder / f"{name}.experts"
        tokens = [len(s.prompt_ids) + len(s.ids) - 1 for s in samples]
        try:
            self.server.call("llmtrain_experts", name, deadline=deadline)
            chosen = read_experts(path, tokens, self.width, self.moe.num_experts)
        except BadAnswer as error:
            raise self.server.fault(f"it answers {error}") from error
        finally:
            path.unlink(missing_ok=True)
        return [replace(sample, experts=experts) for sample, experts in zip(samples, chosen, strict=True)]


def read_experts(path: Path, tokens: Sequence[int], width: int, num_experts: int) -> list[Tensor]:
    """Returns the experts of the first `tokens` of each sample, [tokens, width], of a file that the server wrote.
    Raises BadAnswer unless each of them is one of the model's."""
    most_bytes = sum(HEADER_BYTES + 2 * width * (n + BLOCK_TOKENS) for n in tokens)
    try:
        if path.is_symlink() or path.stat().st_size > most_bytes:
            raise BadAnswer(f"with experts of more than {most_bytes} bytes")
        found: dict[str, Any] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadAnswer(f"with experts that are no file of tensors: {error}") from error
    if found.keys() != set(map(str, range(len(tokens)))):
        raise BadAnswer(f"with the experts of samples {sorted(found)[:8]}, not of {len(tokens)}")
    return [_checked(found[str(i)], n, width, num_experts) for i, n in enumerate(tokens)]


def _checked(rows: Tensor, tokens: int, width: int, num_experts: int) -> Tensor:
    if rows.dtype != torch.int16 or rows.dim() != 2 or rows.size(1) != width or len(rows) < tokens:
        raise BadAnswer(f"with experts {rows.dtype} {list(rows.shape)}, not int16 [{tokens} or more, {width}]")
    used = rows[:tokens]
    if used.min() < 0 or used.max() >= num_experts:
        raise BadAnswer(f"with expert {int(used.min())} to {int(used.max())} of {num_experts}")
    return used.to(dtype_of(num_experts), copy=True)
