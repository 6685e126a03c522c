"""Prompts as tensors: padded, and in pieces that run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TOKENS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 20}  # padding counts: see docs/tuning.md
PADDING = {"cpu": 1 << 7, "cuda": 1 << 14}  # tokens of it that cost as much as a pass of its own


def pad_prompts(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (Q, L) of prompts, padded on the right with 0 to one token at least, and their lengths (Q)."""
    ids = [torch.tensor(prompt or [0], dtype=torch.long) for prompt in prompts]
    return pad_sequence(ids, batch_first=True).to(device), torch.tensor(list(map(len, prompts)), device=device)


def split_prompts(lengths: Sequence[int], device: str) -> Iterator[tuple[slice, int]]:
    """Prompts side by side that run together, and the length each piece is padded to; best sorted by length.

    Args:
        lengths: tokens of each prompt.
        device: the kind of device, `cpu` or `cuda`.
    """
    start, total, longest = 0, 0, max(lengths[0], 1)
    for row, length in enumerate(lengths):
        size = (row - start + 1) * max(longest, length)
        if row > start and (size > TOKENS_AT_ONCE[device] or size - total - length > PADDING[device]):
            yield slice(start, row), longest
            start, total, longest = row, 0, 1
        total, longest = total + length, max(longest, length)
    yield slice(start, len(lengths)), longest
