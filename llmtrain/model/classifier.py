"""Scores token rows with any sequence classifier of transformers that has one output, such as a reward model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from llmtrain.arch.own_code import loading_fault
from llmtrain.config.machine import fast_precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MARGIN = 0.9  # of the memory of a GPU that is free: the rest is for activations


class Classifier:
    """Holds a sequence classifier of transformers, placed by accelerate.

    `device_map`: `auto`: this process's GPU and, for what does not fit there, host memory; a process that is alone
    takes all GPUs that it sees. Else a device, or another word of accelerate's. `dtype`: of the weights; `auto`: as
    stored, but fp32 where this machine is slow in others. Code that lies beside a model never runs, nor is a pickle
    read. Raises ValueError when it is no classifier with one output, or cannot be loaded.
    """

    def __init__(self, directory: str, device_map: str, dtype: str) -> None:
        self.directory = directory
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # loading draws numbers
            self.model = loaded(directory, device_map, dtype).eval().requires_grad_(False)
        self.pad_id = self.model.config.get_text_config().pad_token_id

    @property
    def most_tokens(self) -> int | None:
        """Returns the longest row that the model reads, None if it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @torch.inference_mode()
    def scores(self, rows: Sequence[list[int]], batch_tokens: int) -> list[float]:
        """Returns the score of each row of token ids. Rows of like length share a forward of at most `batch_tokens`
        tokens, padding counted (a longer row has one of its own)."""
        found = [0.0] * len(rows)
        for numbers in batches([len(row) for row in rows], batch_tokens):
            values = self._forward([rows[i] for i in numbers]).float().cpu().tolist()
            for i, value in zip(numbers, values, strict=True):
                found[i] = value
        return found

    def _forward(self, rows: Sequence[list[int]]) -> Tensor:
        """Returns the scores [B] of rows that are padded on the right.

        transformers finds the last token of a row by the padding's id. A model that names none gets one that is in no
        row, so that its score is that of the row alone.
        """
        config = self.model.config.get_text_config()
        config.pad_token_id = pad_id = unused_id(rows, config.vocab_size) if self.pad_id is None else self.pad_id
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        place = input_device(self.model)
        return self.model(input_ids=ids.to(place), attention_mask=mask.to(place)).logits[:, 0]


def loaded(directory: str, device_map: str, dtype: str) -> PreTrainedModel:
    """Returns the model. Raises ValueError as `Classifier` does."""
    try:
        model, told = AutoModelForSequenceClassification.from_pretrained(
            directory,
            dtype=DTYPES.get(dtype, "auto" if fast_precision() == "bf16" else torch.float32),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **placement(device_map),
        )
    except Exception as error:  # of many kinds, by what is broken
        reason = loading_fault(error, 300)
        raise ValueError(f"{directory}: transformers cannot load this as a sequence classifier ({reason})") from None
    if told["missing_keys"]:
        missing = ", ".join(sorted(told["missing_keys"])[:3])
        raise ValueError(f"{directory}: has no {missing}, so it is no trained sequence classifier; give a reward model")
    if model.config.num_labels != 1:
        raise ValueError(
            f"{directory}: has {model.config.num_labels} outputs, and a reward is one; give a model with num_labels 1"
        )
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise ValueError(f"{directory}: does not fit into the memory of GPU and host; take a smaller model or dtype")
    return model


def placement(device_map: str) -> dict[str, object]:
    """Returns the arguments of `from_pretrained` that place a model.

    Ranks of one machine each have a copy: on the GPU of the rank, and in its share of the host's memory.
    """
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device_map != "auto" or gpus == 0:
        return {"device_map": {"": "cpu"} if device_map == "auto" else one_device(device_map)}
    if ranks == 1:
        return {"device_map": "auto"}
    own = int(os.environ.get("LOCAL_RANK", "0"))
    free, _ = torch.cuda.mem_get_info(own)
    return {"device_map": "auto", "max_memory": {own: int(MARGIN * free), "cpu": host_bytes() // ranks}}


def one_device(device_map: str) -> str | dict[str, str]:
    """Returns a word of accelerate's as it is, and the whole model on a device that is named."""
    return {"": device_map} if device_map.startswith(("cpu", "cuda")) else device_map


def host_bytes() -> int:
    """Returns how many bytes of host memory are free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def input_device(model: PreTrainedModel) -> torch.device | str | int:
    """Returns where the inputs of a placed model go; accelerate moves those of a model that lies in several places."""
    places = set(getattr(model, "hf_device_map", {"": model.device}).values())
    return places.pop() if len(places) == 1 else "cpu"


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yields numbers of rows, shortest first, that are padded to at most `batch_tokens` together.

    Example: batches([5, 1, 2], 6) -> [1, 2], [0]
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[i] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def unused_id(rows: Sequence[list[int]], vocab_size: int) -> int:
    """Returns an id of the vocabulary that no row holds."""
    used = set().union(*rows)
    return next(i for i in range(vocab_size - 1, -1, -1) if i not in used)
