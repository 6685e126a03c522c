"""Philox words of many rows as torch tensors, and the keep decisions of dropout made from them.

Two implementations give the same integers: Triton kernels (on a GPU, if Triton works), and the operators of torch and
NumPy (everywhere else). A kernel makes dropout's decisions where they are used: see `triton_kernels.drop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_tts.random.kernel_check import is_usable
from latent_tts.random.philox import philox

BLOCKS_AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 22}  # on a CPU arrays of 128 KiB, which stay in the cache of a core


def words(keys_R2: Tensor, rollouts_R: Tensor, blocks: int, places: Sequence[int], stream: int) -> Tensor:
    """Words 0 to 3 (P*R, 4, B), in [0, 2**32) as int64, of blocks 0 to B-1 of each row, place by place.

    Args:
        keys_R2: Philox keys (int64).
        rollouts_R: the rows' rollout numbers (int64).
        blocks: B.
        places: counter words of P places in a rollout (layer and step).
        stream: counter word for the use of the numbers, a `Stream`.
    """
    if has_kernels(rollouts_R.device):
        from latent_tts.random import triton_kernels

        found = [triton_kernels.words(keys_R2, rollouts_R, blocks, place, stream) for place in places]
        return torch.cat(found) if len(found) > 1 else found[0]
    if len(places) == 1:
        return words_by_operators(keys_R2, rollouts_R, blocks, places[0], stream)
    place_R1 = torch.tensor(places, device=rollouts_R.device).repeat_interleave(len(rollouts_R))[:, None]
    return words_by_operators(keys_R2.repeat(len(places), 1), rollouts_R.repeat(len(places)), blocks, place_R1, stream)


def decide(keys_R2: Tensor, rollouts_R: Tensor, places_P: Tensor, stream: int, threshold: int, kept: Tensor) -> None:
    """Fill `kept` with the keep decisions of dropout: by torch's operators, or on a CPU by NumPy's, which are faster.

    Args:
        keys_R2: Philox keys (int64).
        rollouts_R: the rows' rollout numbers (int64).
        places_P: counter words of the masked places (int64).
        stream: counter word for the use of the numbers, a `Stream`.
        threshold: how many of the 65536 values of 16 random bits mean "drop", in [0, 65536).
        kept: output (R, P, S, 2, 4B), bool, contiguous: the decisions from words 0 and 1, then from words 2 and 3, of
            the B blocks of each of S tokens.
    """
    rows, places, tokens, _, per_token = kept.shape
    on_cpu, blocks = kept.device.type == "cpu", tokens * per_token // 4
    inputs = torch.arange(blocks, device=kept.device), places_P[None, :, None], rollouts_R[:, None, None]
    element, place, rollout, keys, out = ((x.numpy() if on_cpu else x) for x in (*inputs, keys_R2, kept))
    word16: Any = np.int16 if on_cpu else torch.int16

    def fill(piece: slice) -> None:
        key = keys[piece, 0, None, None], keys[piece, 1, None, None]
        if on_cpu and all((word == word[0]).all() for word in key):  # plain integers are faster than arrays
            key = int(key[0][0, 0, 0]), int(key[1][0, 0, 0])
        found = philox((element, place, rollout[piece], stream), key)
        for half in range(2):
            pair, upper = found[2 * half : 2 * half + 2]
            pair |= upper << 32
            out[piece, :, :, half] = pair.view(word16).reshape(out[piece, :, :, half].shape) >= threshold - 32768

    # rows that fit in the cache of a core; NumPy releases the interpreter's lock while it computes
    at_once = max(1, BLOCKS_AT_ONCE["cpu" if on_cpu else "cuda"] // (places * blocks))
    pieces = [slice(start, start + at_once) for start in range(0, rows, at_once)]
    if on_cpu and len(pieces) > 1 and torch.get_num_threads() > 1:
        list(_workers(torch.get_num_threads()).map(fill, pieces))
    else:
        for piece in pieces:
            fill(piece)


def words_by_operators(keys_R2: Tensor, rollouts_R: Tensor, blocks: int, place: int | Tensor, stream: int) -> Tensor:
    """`words` of one place by torch's operators; it may differ by row (R, 1)."""
    counter = torch.arange(blocks, device=rollouts_R.device), place, rollouts_R[:, None], stream
    return torch.stack(philox(counter, (keys_R2[:, :1], keys_R2[:, 1:])), dim=1)


def drop_by_operators(
    output_RSD: Tensor, keys_R2: Tensor, rollouts_R: Tensor, place: int, stream: int, threshold: int, first: int | None
) -> Tensor:
    """`triton_kernels.drop` by torch's operators."""
    rows, tokens, width = output_RSD.shape
    drawn = 1 if first is None else first + tokens
    kept = torch.empty(rows, 1, drawn, 2, -(-width // 8) * 4, dtype=torch.bool, device=output_RSD.device)
    decide(keys_R2, rollouts_R, torch.tensor([place], device=kept.device), stream, threshold, kept)
    factors = kept[:, 0].flatten(2)[..., :width].float() * (65536 / (65536 - threshold))
    return (output_RSD.float() * factors[:, first or 0 :]).to(output_RSD.dtype)


def has_kernels(device: torch.device) -> bool:
    """Whether to use the Triton kernels: the device is a GPU, and they compile and agree with the operators."""
    return device.type == "cuda" and is_usable("drawing of random numbers", kernels_agree, device)


def kernels_agree(device: torch.device) -> bool:
    """Whether kernels and operators give the same numbers, for a few rows of large and small words."""
    from latent_tts.random import triton_kernels

    keys_R2 = torch.tensor([[0, 0], [2**32 - 1, 1], [7, 2**31]], device=device)
    rollouts_R = torch.tensor([0, 2**32 - 1, 5], device=device)
    numbers = keys_R2, rollouts_R, 300, 2**31 + 1, 2
    same = torch.equal(triton_kernels.words(*numbers), words_by_operators(*numbers))
    for dtype, width, first in ((torch.float32, 300, 2), (torch.bfloat16, 8, None), (torch.float16, 1100, 0)):
        values = (torch.arange(3 * 2 * width, device=device) % 97 - 48).view(3, 2, width).to(dtype) / 8
        arguments = values, keys_R2, rollouts_R, 3 << 16 | 5, 1, 20_000, first
        same &= torch.equal(triton_kernels.drop(*arguments), drop_by_operators(*arguments))
    return same


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads that draw."""
    return ThreadPoolExecutor(threads)
