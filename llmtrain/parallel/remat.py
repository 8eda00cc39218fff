"""Implements rematerialisation: activations are recomputed in the backward (arXiv 1604.06174).

`full` keeps each block's input and computes a third more. `selective` keeps what is costly to compute, the outputs of
matrix products and fused attention, and recomputes what is cheap: norms, rotations, activation functions, elementwise
products, and gathers of the sequence. The last product of attention and that of the feed-forward layer, whose outputs
only the residual stream reads, are neither kept nor recomputed. (That of experts is kept on a CPU and recomputed on a
GPU: a custom operation says what its backward needs only when it is done.) Without fused attention the scores, which
are large, are recomputed, as in arXiv 2205.05198, section 5.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from llmtrain.model.decoder import Decoder
from llmtrain.model.experts import Experts
from llmtrain.model.lora import Adapter
from llmtrain.model.router import Router

aten = torch.ops.aten
OURS = torch.ops.llmtrain
EXPERTS_ON_CPU = OURS.expert_ffn.default
MATRIX_PRODUCTS = {  # operation -> the number of products it counts as
    **dict.fromkeys((aten.mm.default, aten.addmm.default, aten._scaled_mm.default), 1),  # of linear layers
    **{OURS.grouped_product.default: 1, OURS.grouped_pair.default: 2, EXPERTS_ON_CPU: 3},  # of experts
}
PRODUCTS = {nn.Linear: 1, Adapter: 2, Router: 1, Experts: 3}
FUSED_ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)


def remat_blocks(model: Decoder, kind: str) -> None:
    """Makes each block keep less for its backward, in place; `kind`: full or selective."""
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing here draws random numbers
    for block in model.blocks():
        if kind == "full":
            block.whole = block.forward
            block.forward = partial(again, partial(_whole, block))
            continue
        block.attend = partial(again, block.attend, context_fn=partial(_contexts, _num_products(block.attention)))
        block.feed = partial(again, block.feed, context_fn=partial(_contexts, _num_products(block.feedforward)))


def _whole(block: nn.Module, *args: object) -> Tensor:
    return block.whole(*args)


def compile_block(block: nn.Module) -> None:
    """Compiles a block in place.

    A block that is recomputed as a whole is compiled inside the recomputation: torch does not compile around it, and
    would silently compile nothing.
    """
    if hasattr(block, "whole"):
        block.whole = torch.compile(block.whole)
    else:
        block.compile()


def _num_products(module: nn.Module) -> int:
    """Returns the number of matrix products in a module."""
    return sum(count for m in module.modules() for kind, count in PRODUCTS.items() if isinstance(m, kind))


def _contexts(num_products: int) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Returns the contexts of one pass through a region whose last matrix product is number `num_products`."""
    seen = [0, 0]  # forward, recomputation: torch 2.11 calls the policy in both

    def policy(context: SelectiveCheckpointContext, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        seen[context.is_recompute] += MATRIX_PRODUCTS.get(op, 0)
        keep = op in MATRIX_PRODUCTS and seen[context.is_recompute] < num_products
        keep = keep or op in (*FUSED_ATTENTION, EXPERTS_ON_CPU)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
