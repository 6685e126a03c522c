"""What is read from logits on a GPU in one kernel: each row's two highest ones, and the sum of exponentials.

Imported only if Triton is installed. `head.py` compares the kernel with the operators before it uses it.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# Triton is not installed with CPU builds of torch, and a kernel is launched by indexing it

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8


def look(logits_RP: Tensor, bias_P: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The two highest logits of each row (2, R) and their places (2, R), and the sum of exp(logit - highest) (R).

    Args:
        logits_RP: in any dtype up to float32, rows contiguous.
        bias_P: added to each row; None adds nothing.
    """
    rows, tokens = logits_RP.shape
    highest_2R = torch.empty(2, rows, device=logits_RP.device)
    place_2R = torch.empty(2, rows, dtype=torch.long, device=logits_RP.device)
    total_R = torch.empty(rows, device=logits_RP.device)
    with torch.cuda.device_of(logits_RP):
        _look[(rows,)](
            logits_RP, logits_RP if bias_P is None else bias_P, highest_2R, place_2R, total_R,
            logits_RP.stride(0), tokens, HAS_BIAS=bias_P is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return highest_2R, place_2R, total_R


@triton.jit(do_not_specialize=["bias", "tokens"])
def _look(logits, bias, highest, places, total, stride, tokens, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row, rows = tl.program_id(0), tl.num_programs(0)
    first, second = float("-inf"), float("-inf")
    first_place, second_place, sum_of = 0, 0, 0.0
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        known = token < tokens
        # up to the stride, which may say that many values can be loaded at once; the number of tokens does not
        values = tl.load(logits + row.to(tl.int64) * stride + token, token < stride, 0.0).to(tl.float32)
        if HAS_BIAS:
            values += tl.load(bias + token, known, 0.0).to(tl.float32)
        values = tl.where(known, values, float("-inf"))
        top = tl.max(values, 0)
        # the lowest of equal ones; among NaN none equals the highest, but places stay those of tokens
        place = tl.minimum(tl.min(tl.where(values == top, token, tokens), 0), tokens - 1)
        others = tl.where(token == place, float("-inf"), values)
        next_top = tl.max(others, 0)
        next_place = tl.min(tl.where((others == next_top) & (token != place), token, tokens), 0)
        next_place = tl.minimum(next_place, tokens - 1)
        new = tl.maximum(first, top)
        shift = tl.where(new == float("-inf"), 0.0, new)
        sum_of = sum_of * tl.exp(first - shift) + tl.sum(tl.exp(values - shift), 0)
        # of equal ones the earlier block's
        leads = (top > first) | (start == 0)
        rival, rival_place = tl.where(leads, first, top), tl.where(leads, first_place, place)
        known_second = tl.where(leads, next_top, second)
        known_second_place = tl.where(leads, next_place, second_place)
        earlier = (start > 0) & tl.where(leads, rival >= known_second, rival > known_second)
        second = tl.where(earlier, rival, known_second)
        second_place = tl.where(earlier, rival_place, known_second_place)
        first_place = tl.where(leads, place, first_place)
        first = new
    tl.store(highest + row, first)
    tl.store(highest + rows + row, second)
    tl.store(places + row, first_place.to(tl.int64))
    tl.store(places + rows + row, second_place.to(tl.int64))
    tl.store(total + row, sum_of)
