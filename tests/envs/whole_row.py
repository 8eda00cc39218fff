"""What one forward over a whole row says of it: the proof of what was sampled turn by turn."""

from __future__ import annotations

import torch

from llmtrain.model.decoder import Decoder
from llmtrain.types import Sample


def whole_row_logprobs(model: Decoder, sample: Sample, temperature: float) -> torch.Tensor:
    """Returns the log-probs of the ids of a sample behind its prompt, [ids]."""
    row = torch.tensor([sample.prompt_ids + sample.ids])
    with torch.inference_mode():
        logits = model(row, torch.arange(row.size(1))[None])[0, len(sample.prompt_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(sample.ids)[:, None])[:, 0]
