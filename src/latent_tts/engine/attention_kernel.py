"""Shared-prefix attention on a GPU in one kernel: rows against their suffixes, then as a tile against their prefix.

Imported only if Triton is installed (it comes with CUDA builds of torch on Linux). `attention.py` compares the kernel
with the operators before it uses it. Sizes of tiles are fixed for each head width, so that nothing is tuned while it
runs.

Source: the online softmax of FlashAttention (Dao et al. 2022, arXiv 2205.14135).
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton is not installed with CPU builds of torch, and a kernel is launched by indexing it

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# queries and prefix tokens of a tile, by padded width
TILES = {16: (64, 64), 32: (64, 64), 64: (32, 64), 128: (16, 32), 256: (16, 32)}
FEW_QUERIES = 16  # the smallest tile that a product takes
MANY_TILES = 128  # about as many as a GPU runs at once: with fewer large ones, most of it would wait
WARPS, STAGES = 4, 2


def attend_piece(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    lengths_Q: Tensor,
    used_1: Tensor,
    valid_RC: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """Attended values of R = Q*N rows.

    Args:
        query: (R, heads, S, K).
        prefix: keys and values (Q, key heads, L, K), right-padded.
        suffix: keys and values (R, key heads, C, K), those of the S new tokens included.
        lengths_Q: tokens of each prefix.
        used_1: slots of the suffixes before the new tokens (int64).
        valid_RC: which slots hold something; None for all that are used.
        scale: factor of the scores.
        out: output (R, S, heads, K), contiguous.
    """
    (rows, heads, tokens, width), (questions, key_heads, _, _) = query.shape, prefix[0].shape
    groups, siblings = heads // key_heads, rows // questions
    padded = max(16, triton.next_power_of_2(width))
    count = siblings * groups * tokens
    queries, prefix_tokens = tile(query.dtype, padded, count, key_heads * questions)
    valid = used_1 if valid_RC is None else valid_RC.view(torch.uint8)
    with torch.cuda.device_of(out):
        # only the first of a grid's three numbers may exceed 65,535
        _attend[questions * triton.cdiv(count, queries), key_heads](
            query, *prefix, *suffix, out, lengths_Q, used_1, valid,
            *query.stride()[:3], *prefix[0].stride()[:3], *suffix[0].stride()[:3], valid.stride(0),
            siblings, tokens, groups, scale, WIDTH=width, PADDED=padded, QUERIES=queries, TOKENS=prefix_tokens,
            HAS_VALID=valid_RC is not None, SLOT_STAGES=slot_stages(query.dtype), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip


def tile(dtype: torch.dtype, padded: int, count: int, prefixes: int) -> tuple[int, int]:
    """Queries and prefix tokens of a tile.

    Args:
        dtype: of queries, keys and values.
        padded: width of heads.
        count: queries of each prefix.
        prefixes: of all questions and key heads.
    """
    queries, prefix_tokens = TILES[padded]
    if dtype == torch.float32:  # holds twice as much in registers
        queries, prefix_tokens = max(FEW_QUERIES, queries // 2), prefix_tokens // 2
    few = count <= FEW_QUERIES or prefixes * triton.cdiv(count, queries) < MANY_TILES
    return (FEW_QUERIES if few else queries), prefix_tokens


def slot_stages(dtype: torch.dtype) -> int:
    """How many slots of the suffixes are under way, so that they are not waited for one by one."""
    return 3 if dtype == torch.float32 else 4  # with 4, heads of width 256 take more memory than some GPUs have


@triton.jit(do_not_specialize=["lengths", "used", "valid", "valid_row", "siblings", "tokens"])
def _attend(
    query, prefix_keys, prefix_values, keys, values, out, lengths, used, valid,
    query_row, query_head, query_token, prefix_question, prefix_head, prefix_token,
    suffix_row, suffix_head, suffix_slot, valid_row, siblings, tokens, groups, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, HAS_VALID: tl.constexpr,
    SLOT_STAGES: tl.constexpr,
):  # fmt: skip
    per_row = groups * tokens
    tiles, key_head = tl.cdiv(siblings * per_row, QUERIES), tl.program_id(1)
    question = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)
    inside = place < siblings * per_row
    row = question * siblings + place // per_row
    head, token = key_head * groups + place % per_row // tokens, place % tokens
    element = tl.arange(0, PADDED)
    whole = inside[:, None] & (element < WIDTH)[None, :]
    at = row * query_row + head * query_head + token * query_token
    queries = tl.load(query + at[:, None] + element[None, :], whole, 0.0)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, PADDED], tl.float32)

    before = tl.load(used).to(tl.int32)
    suffix_at = row * suffix_row + key_head.to(tl.int64) * suffix_head
    queries_32 = queries.to(tl.float32)
    # first, while the sums lie as loads do: after a product, each slot would be rearranged between threads
    for slot in tl.range(0, before + tokens, num_stages=SLOT_STAGES):
        seen = inside & (slot <= before + token)
        if HAS_VALID:
            seen = seen & (tl.load(valid + row * valid_row + slot, inside, 0) != 0)
        at_suffix = (suffix_at + slot * suffix_slot.to(tl.int64))[:, None] + element[None, :]
        mask = seen[:, None] & (element < WIDTH)[None, :]
        suffix = tl.load(keys + at_suffix, mask, 0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(queries_32 * suffix, 1) * scale, float("-inf"))
        new = tl.maximum(highest, score)
        shift = tl.where(new == float("-inf"), 0.0, new)  # nothing to attend to yet
        weight, kept = tl.exp(score - shift), tl.exp(highest - shift)
        suffix = tl.load(values + at_suffix, mask, 0.0).to(tl.float32)
        sums = sums * kept[:, None] + weight[:, None] * suffix
        total = total * kept + weight
        highest = new

    length = tl.load(lengths + question).to(tl.int32)
    prefix_at = question * prefix_question + key_head.to(tl.int64) * prefix_head
    for start in range(0, length, TOKENS):
        there = start + tl.arange(0, TOKENS)
        known = there < length
        at_prefix = prefix_at + there.to(tl.int64)[:, None] * prefix_token + element[None, :]
        mask = known[:, None] & (element < WIDTH)[None, :]
        prefix = tl.load(prefix_keys + at_prefix, mask, 0.0)
        scores = tl.dot(queries, tl.trans(prefix), input_precision="ieee") * scale
        scores = tl.where(known[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        weights, kept = tl.exp(scores - new[:, None]), tl.exp(highest - new)
        prefix = tl.load(prefix_values + at_prefix, mask, 0.0)
        sums = sums * kept[:, None] + tl.dot(weights.to(prefix.dtype), prefix, input_precision="ieee")
        total = total * kept + tl.sum(weights, 1)
        highest = new

    attended = sums / tl.where(total > 0, total, 1.0)[:, None]
    heads = tl.num_programs(1) * groups
    at_out = (row * tokens + token) * heads * WIDTH + head * WIDTH
    tl.store(out + at_out[:, None] + element[None, :], attended.to(out.dtype.element_ty), whole)
