"""Embeds texts with a Hugging Face encoder: the mean of its last hidden states over the tokens, at length 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrain.arch.own_code import loading_fault


class Encoder:
    """Holds an encoder and its tokenizer.

    Raises ValueError when transformers has no model that it can load from the directory; code in it is never run.
    """

    def __init__(self, directory: str, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # a bar for each tensor that is read
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            model = AutoModel.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            )
        except Exception as error:  # of many kinds, by what is broken
            raise ValueError(
                f"{directory}: no encoder can be loaded from it ({loading_fault(error)}); give another"
            ) from None
        if self.tokenizer.pad_token is None:
            raise ValueError(f"{directory}: its tokenizer has no padding token, so it is no encoder; give another")
        self.model, self.device = model.to(device).eval(), device
        limits = self.tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)
        self.max_tokens = min(limit for limit in limits if limit is not None)

    def embed(
        self, texts: Sequence[str], batch_texts: int, done: Callable[[int], object] = lambda count: None
    ) -> tuple[NDArray[np.float32], int]:
        """Returns (embeddings [N, D], how many texts were longer than the model reads); of these the beginning counts.

        `done` is told how many texts are embedded.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length share a batch
        rows, cut = np.empty((len(texts), self.model.config.hidden_size), np.float32), 0
        for first in range(0, len(order), batch_texts):
            batch = order[first : first + batch_texts]
            rows[batch], longer = self._batch([texts[i] for i in batch])
            cut += longer
            done(first + len(batch))
        return rows, cut

    @torch.inference_mode()
    def _batch(self, texts: list[str]) -> tuple[NDArray[np.float32], int]:
        longer = sum(len(ids) > self.max_tokens for ids in self.tokenizer(texts, verbose=False).input_ids)
        given: Any = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        given = given.to(self.device)
        mask = given["attention_mask"].unsqueeze(-1).float()
        hidden = self.model(**given).last_hidden_state.float()
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy(), longer
