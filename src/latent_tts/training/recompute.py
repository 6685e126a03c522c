"""Gradient checkpointing: the backward pass computes a block's activations again from its input.

transformers' own takes the cache away from blocks. Latents need it, so here each block gets a cache of its own that
can be filled twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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
    blocks = blocks_of(model) if wanted else []
    try:
        for block in blocks:
            block.forward = _recomputed(block)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model.

    Raises:
        UsageError: it has none that transformers knows, or they do not know their place in the cache.
    """
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    fit = bool(blocks) and all(_place_of(block) is not None for block in blocks)
    require("optimization.gradient_checkpointing", True, fit, "must be false: this model has no blocks for it")
    return blocks


def _place_of(block: nn.Module) -> int | None:
    """The number of a block in the cache."""
    numbers = (getattr(module, "layer_idx", None) for module in block.modules())
    return next((number for number in numbers if number is not None), None)


class _BlockCache(Cache):
    """The keys and values (Q, H, S, D) of one block: those of earlier passes, then also those of this one."""

    def __init__(self, past: tuple[Tensor, Tensor] | None) -> None:
        super().__init__(layers=[])
        self.content = past

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of this pass."""
        if self.content is not None:
            past_keys, past_values = self.content
            key_states = torch.cat([past_keys, key_states], dim=-2)
            value_states = torch.cat([past_values, value_states], dim=-2)
        self.content = key_states, value_states
        return self.content


def _recomputed(block: nn.Module) -> Callable[..., Any]:
    """The forward pass of a block with gradient checkpointing; the cache is filled as without."""
    plain = type(block).forward
    place: Any = _place_of(block)

    def forward(hidden: Tensor, *inputs: Any, **named: Any) -> Any:
        cache = next((value for value in (*inputs, *named.values()) if isinstance(value, Cache)), None)
        past = None if cache is None else _content(cache, place)

        def compute(hidden: Tensor) -> tuple[Any, tuple[Tensor, Tensor] | None]:
            own = _BlockCache(past)
            inputs_here = [own if value is cache and cache is not None else value for value in inputs]
            named_here = {k: own if value is cache and cache is not None else value for k, value in named.items()}
            return plain(block, hidden, *inputs_here, **named_here), own.content

        output, content = checkpoint(compute, hidden, use_reentrant=False)
        if cache is not None and content is not None:
            if past is None:
                cache.update(*content, place)
            else:
                layer: Any = cache.layers[place]
                layer.keys, layer.values = content
        return output

    return forward


def _content(cache: Cache, place: int) -> tuple[Tensor, Tensor] | None:
    """The keys and values of a block so far."""
    layer: Any = cache.layers[place] if place < len(cache.layers) else None
    return None if layer is None or layer.keys is None else (layer.keys, layer.values)
