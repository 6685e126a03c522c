"""What the LM head's logits say of the next token: which it is, how probable, and how far ahead of the second.

Logits are many (rows x vocabulary) and each is needed once, so they are read in pieces that stay in a core's cache, and
no copy of all of them in float32 is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64  # the highest logit is looked for in blocks: maxima are vectorized, places of maxima are not
VALUES_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 28}  # logits in float32: on a CPU 1 MiB


@dataclass(frozen=True)
class Choice:
    """The next token of each of R rows.

    Attributes:
        token_R: its id.
        logprob_R: its log-probability, float32.
        margin_R: gap between the two highest logits, float32.
    """

    token_R: Tensor
    logprob_R: Tensor
    margin_R: Tensor


def choose(logits_RV: Tensor, token: Callable[[Tensor, slice], Tensor | None]) -> Choice:
    """Choose a token in every row.

    Args:
        logits_RV: of any precision; what is computed of them is float32.
        token: the ids of some rows, from their logits (float32, not to be changed) and which rows they are; None
            stands for the highest logit, the lowest id where several are as high.
    """
    (rows, vocabulary), device = logits_RV.shape, logits_RV.device
    token_R = torch.empty(rows, dtype=torch.long, device=device)
    logprob_R, margin_R = torch.empty(2, rows, dtype=torch.float32, device=device)
    at_once = max(1, VALUES_AT_ONCE[device.type] // vocabulary)
    blocks = -(-vocabulary // BLOCK)
    work_CW = torch.empty(min(rows, at_once), blocks * BLOCK, dtype=torch.float32, device=device)
    for start in range(0, rows, at_once):
        part = slice(start, min(start + at_once, rows))
        padded_CW = work_CW[: part.stop - start]
        padded_CW[:, :vocabulary] = logits_RV[part]
        padded_CW[:, vocabulary:] = float("-inf")
        highest_C, second_C, first_C = _highest_two(padded_CW.unflatten(1, (blocks, BLOCK)))
        chosen_C = token(padded_CW[:, :vocabulary], part)
        token_R[part] = chosen_C = first_C if chosen_C is None else chosen_C
        logit_C = padded_CW.gather(1, chosen_C[:, None])[:, 0]
        margin_R[part] = highest_C - second_C
        logprob_R[part] = logit_C - highest_C - padded_CW.sub_(highest_C[:, None]).exp_().sum(1).log_()
    return Choice(token_R, logprob_R, margin_R)


def _highest_two(logits_CBK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two highest of each row's logits, which lie in B blocks of K, and the first place of the highest."""
    maxima_CB = logits_CBK.amax(2)
    block_C1 = maxima_CB.argmax(1, keepdim=True)
    inside_CK = logits_CBK.gather(1, block_C1[..., None].expand(-1, -1, BLOCK))[:, 0]
    place_C1 = inside_CK.argmax(1, keepdim=True)
    highest_C = inside_CK.gather(1, place_C1)[:, 0]
    others_C = maxima_CB.scatter_(1, block_C1, float("-inf")).amax(1)
    second_C = torch.maximum(others_C, inside_CK.scatter_(1, place_C1, float("-inf")).amax(1))
    return highest_C, second_C, (block_C1 * BLOCK + place_C1)[:, 0]
