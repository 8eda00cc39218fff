"""Counts the FLOPs of a token: what the model asks for, and what recomputation adds on the hardware."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.arch.parameters import head_rows
from llmtrain.arch.resolve import multiplied_parameters, train_flops_per_token
from llmtrain.config.schema import EngineConfig, ModelConfig


@dataclass(frozen=True)
class Work:
    """Holds the FLOPs of one token in one forward pass, and how often each part is computed in a step.

    A backward pass takes twice a forward's (arXiv 2204.02311, appendix B), and with adapters alone to train, once: the
    frozen weights have no gradients. Attention's own backward takes twice in any case. `remat: full` adds a forward of
    the blocks. The logits of all chunks but one are computed twice (`arch.resolve.chunk_tokens`).
    """

    blocks: float  # products with the weights of all blocks, and the norms
    attention: float  # scores and sums of values in all blocks, over half of a row or of its window
    head: float
    lora: bool
    remat: str

    @property
    def model(self) -> float:
        """Returns the FLOPs of a trained token: 6 for each active parameter (4 with adapters), and attention."""
        return self.passes * (self.blocks + self.head) + 3 * self.attention

    @property
    def passes(self) -> int:
        """Returns the forwards that products with weights cost in a step, without recomputation."""
        return 2 if self.lora else 3

    @property
    def hardware_blocks(self) -> float:
        return (self.passes + (self.remat == "full")) * self.blocks

    @property
    def hardware_attention(self) -> float:
        return (3 + (self.remat == "full")) * self.attention

    @property
    def hardware_head(self) -> float:
        return (self.passes + 1) * self.head

    @property
    def hardware(self) -> float:
        """Returns the FLOPs of a trained token with what is computed again."""
        return self.hardware_blocks + self.hardware_attention + self.hardware_head


def work_of(model: ModelConfig, seq_len: int, engine: EngineConfig) -> Work:
    """Returns the work of a token in rows of `seq_len` tokens. `model` is resolved. Multi-token prediction modules do
    not count."""
    head = 2.0 * head_rows(model) * model.hidden_size
    whole = train_flops_per_token(model, seq_len) / 3
    attention = whole - 2.0 * multiplied_parameters(model)
    return Work(whole - attention - head, attention, head, model.lora is not None, engine.remat)
