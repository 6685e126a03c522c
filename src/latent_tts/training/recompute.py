"""Gradient checkpointing: the backward pass computes a block's activations again from its input.

transformers' own takes the cache away from blocks. Latents need it, so here a block finds the cache each time as it was
before the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from latent_tts.errors import require


@contextmanager
def recomputing_blocks(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let the blocks of a model keep only their input for the backward pass, in passes within the block, if wanted.

    Raises:
        UsageError: the model has no blocks that transformers knows.
    """
    blocks = [module for module in model.modules() if wanted and isinstance(module, GradientCheckpointingLayer)]
    allowed = "must be false: this model has no blocks for it"
    require("optimization.gradient_checkpointing", wanted, bool(blocks) or not wanted, allowed)
    try:
        for block in blocks:
            block.forward = _recomputed(block)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _recomputed(block: nn.Module) -> Callable[..., Any]:
    """The forward pass of a block with gradient checkpointing; the cache is filled as without."""
    plain = type(block).forward

    def forward(*inputs: Any, **named: Any) -> Any:
        cache = next((value for value in (*inputs, *named.values()) if isinstance(value, Cache)), None)
        layers = [] if cache is None else [copy(layer) for layer in cache.layers]

        def compute(*inputs: Any) -> Any:
            if cache is not None:
                cache.layers = [copy(layer) for layer in layers]  # they replace their tensors
            return plain(block, *inputs, **named)

        return checkpoint(compute, *inputs, use_reentrant=False)

    return forward
