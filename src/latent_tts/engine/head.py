"""The LM head: which token comes next, how probable it is, and how far ahead of the second.

Logits are many (rows x vocabulary) and each is looked at once. So the head's product is done in pieces of the
vocabulary whose logits stay in a core's cache; there is never a tensor of all of them. Only a sampler that chooses
tokens itself sees whole rows of logits, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BLOCK = 64  # the highest logit is looked for in blocks: maxima are vectorized, places of maxima are not
VALUES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 28}  # logits of a piece


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


def choose(head: nn.Module, hidden_RD: Tensor, token: Callable[[Tensor, slice], Tensor] | None = None) -> Choice:
    """Choose a token in every row.

    Args:
        head: the LM head.
        hidden_RD: final hidden states; what is computed of logits is float32 whatever their precision.
        token: the ids of some rows, from their logits (float32) and which rows they are; None takes the highest
            logit, the lowest id where several are as high.
    """
    if token is None and type(head) is nn.Linear:
        return _highest(head, hidden_RD)
    return _chosen(head(hidden_RD), token)


def _highest(head: nn.Linear, hidden_RD: Tensor) -> Choice:
    """The tokens of the highest logits, piece by piece of the vocabulary."""
    rows, vocabulary = hidden_RD.shape[0], head.out_features
    whole = vocabulary // BLOCK * BLOCK
    at_once = max(1, VALUES_AT_ONCE[hidden_RD.device.type] // rows // BLOCK) * BLOCK
    pieces = [slice(start, min(start + at_once, whole)) for start in range(0, whole, at_once)]
    if whole < vocabulary:
        pieces.append(slice(whole, vocabulary))
    highest_R, second_R = torch.full((2, rows), float("-inf"), device=hidden_RD.device)
    total_R = torch.zeros_like(highest_R)  # of exp(logit - highest)
    token_R = torch.zeros(rows, dtype=torch.long, device=hidden_RD.device)
    # all pieces share their memory: new pages for each would cost as much as the product
    product_PR = hidden_RD.new_empty(max(map(_length, pieces)), rows)
    float_PR = product_PR if product_PR.dtype == torch.float32 else torch.empty_like(product_PR, dtype=torch.float32)
    for piece in pieces:
        product, logits_PR = product_PR[: _length(piece)], float_PR[: _length(piece)]
        # in this order the product needs no rearranged copy of the weights, and places lie side by side for maxima
        torch.mm(head.weight[piece], hidden_RD.t(), out=product)
        if logits_PR.dtype != product.dtype:
            logits_PR.copy_(product)
        if head.bias is not None:
            logits_PR += head.bias[piece].float()[:, None]
        own_R, own_second_R, place_R = _highest_two(logits_PR)
        before_R, highest_R = highest_R, torch.maximum(highest_R, own_R)
        second_R = torch.maximum(torch.minimum(before_R, own_R), torch.maximum(second_R, own_second_R))
        token_R = torch.where(own_R > before_R, piece.start + place_R, token_R)
        total_R = total_R * (before_R - highest_R).exp_() + logits_PR.sub_(highest_R).exp_().sum(0)
    return Choice(token_R, -total_R.log_(), highest_R - second_R)


def _length(piece: slice) -> int:
    return piece.stop - piece.start


def _highest_two(logits_PR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two highest of each column, and the first place of the highest; P is below BLOCK or a multiple of it."""
    logits_BKR = logits_PR.unflatten(0, (-1, min(BLOCK, logits_PR.shape[0])))
    maxima_BR = logits_BKR.amax(1)
    block_R = maxima_BR.argmax(0)
    inside_RK = logits_BKR[block_R, :, torch.arange(len(block_R), device=block_R.device)]
    place_R = inside_RK.argmax(1)
    highest_R = inside_RK.gather(1, place_R[:, None])[:, 0]
    others_R = maxima_BR.scatter_(0, block_R[None], float("-inf")).amax(0)
    second_R = torch.maximum(others_R, inside_RK.scatter_(1, place_R[:, None], float("-inf")).amax(1))
    return highest_R, second_R, block_R * logits_BKR.shape[1] + place_R


def _chosen(logits_RV: Tensor, token: Callable[[Tensor, slice], Tensor] | None) -> Choice:
    """The tokens that `token` chooses, some rows at a time."""
    parts = []
    at_once = max(1, VALUES_AT_ONCE[logits_RV.device.type] // logits_RV.shape[1])
    for start in range(0, logits_RV.shape[0], at_once):
        rows = slice(start, min(start + at_once, logits_RV.shape[0]))
        logits_CV = logits_RV[rows].float()
        token_C = logits_CV.argmax(1) if token is None else token(logits_CV, rows)
        highest_C2 = logits_CV.topk(2).values
        logprob_C = logits_CV.gather(1, token_C[:, None])[:, 0] - logits_CV.logsumexp(1)
        parts.append((token_C, logprob_C, highest_C2[:, 0] - highest_C2[:, 1]))
    token_R, logprob_R, margin_R = (torch.cat(part) for part in zip(*parts, strict=True))
    return Choice(token_R, logprob_R, margin_R)
