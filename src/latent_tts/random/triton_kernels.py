"""Random numbers on a GPU in one kernel instead of a hundred operators of torch; the integers are the same.

Imported only if Triton is installed (it comes with CUDA builds of torch on Linux). `bits.py` compares the kernels with
the operators before it uses them.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton is not installed with CPU builds of torch, and a kernel is launched by indexing it

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES, DROP_LANES = 256, 128


def words(keys_R2: Tensor, rollouts_R: Tensor, blocks: int, place: int, stream: int) -> Tensor:
    """`bits.words` of one place by one kernel."""
    out = torch.empty(len(rollouts_R), 4, blocks, dtype=torch.long, device=rollouts_R.device)
    grid = len(rollouts_R), triton.cdiv(blocks, LANES)
    with torch.cuda.device_of(out):
        _words[grid](keys_R2.contiguous(), rollouts_R.contiguous(), out, blocks, place, stream, LANES=LANES)
    return out


def drop(
    output_RSD: Tensor, keys_R2: Tensor, rollouts_R: Tensor, place: int, stream: int, threshold: int, first: int | None
) -> Tensor:
    """Dropout: 0 where `bits.decide` says so, else 65536 / (65536 - threshold) times as much, in the same dtype.

    Args:
        output_RSD: in any dtype up to float32.
        keys_R2: Philox keys (int64).
        rollouts_R: the rows' rollout numbers (int64).
        place: counter word of the masked place.
        stream: counter word for the use of the numbers, a `Stream`.
        threshold: see `bits.decide`.
        first: which of the tokens with decisions of their own the first one is; None gives all tokens those of one.
    """
    output_RSD = output_RSD.contiguous()
    made = torch.empty_like(output_RSD)
    rows, tokens, width = output_RSD.shape
    blocks, scale = triton.cdiv(width, 8), 65536 / (65536 - threshold)
    with torch.cuda.device_of(made):
        # only the first of a grid's three numbers may exceed 65,535
        _drop[(rows * triton.cdiv(tokens * blocks, DROP_LANES),)](
            output_RSD, made, keys_R2.contiguous(), rollouts_R.contiguous(), tokens, width, blocks, place, stream,
            threshold, scale, first or 0, ONE_MASK=first is None, LANES=DROP_LANES,
        )  # fmt: skip
    return made


@triton.jit(do_not_specialize=["blocks", "place", "stream"])
def _words(keys, rollouts, out, blocks, place, stream, LANES: tl.constexpr):
    row, block = tl.program_id(0), tl.program_id(1) * LANES + tl.arange(0, LANES)
    c0, c1, c2, c3 = _philox(keys, rollouts, row, block, place, stream)
    at, inside = out + row.to(tl.int64) * 4 * blocks + block, block < blocks
    tl.store(at, c0.to(tl.int64), inside)
    tl.store(at + blocks, c1.to(tl.int64), inside)
    tl.store(at + 2 * blocks, c2.to(tl.int64), inside)
    tl.store(at + 3 * blocks, c3.to(tl.int64), inside)


@triton.jit(do_not_specialize=["tokens", "width", "blocks", "place", "stream", "threshold", "scale", "first"])
def _drop(
    output, made, keys, rollouts, tokens, width, blocks, place, stream, threshold, scale, first,
    ONE_MASK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens * blocks, LANES)
    row, lane = tl.program_id(0) // tiles, tl.program_id(0) % tiles * LANES + tl.arange(0, LANES)
    token, block = lane // blocks, lane % blocks
    counter = block if ONE_MASK else lane + first * blocks
    c0, c1, c2, c3 = _philox(keys, rollouts, row, counter, place, stream)
    at, inside = (row.to(tl.int64) * tokens + token) * width, token < tokens
    _drop_half(output + at, made + at, c0, c1, 4 * block, width, inside, threshold, scale)
    _drop_half(output + at, made + at, c2, c3, 4 * (blocks + block), width, inside, threshold, scale)


@triton.jit
def _drop_half(output, made, low, high, element, width, inside, threshold, scale):
    """Four values of each lane times the factors of two words; a 16-bit half is kept if it reaches the threshold."""
    quarter = tl.arange(0, 4)[None, :]
    word = tl.where(quarter < 2, low[:, None], high[:, None])
    half = (word >> (quarter % 2 * 16).to(word.dtype)) & 0xFFFF
    factor = tl.where((half ^ 0x8000).to(tl.int32) >= threshold, scale, 0.0)
    element = element[:, None] + quarter
    inside = inside[:, None] & (element < width)
    values = tl.load(output[:, None] + element, inside, 0.0)
    tl.store(made[:, None] + element, (values.to(tl.float32) * factor).to(values.dtype), inside)


@triton.jit
def _philox(keys, rollouts, row, block, place, stream):
    key = tl.load(keys + 2 * row) | (tl.load(keys + 2 * row + 1) << 32)
    none = tl.zeros_like(block)
    rollout = none + tl.load(rollouts + row).to(tl.int32)
    return tl.philox(key, block, none + tl.cast(place, tl.int32), rollout, none + tl.cast(stream, tl.int32))
