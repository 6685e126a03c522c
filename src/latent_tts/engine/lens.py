"""Latents read through the LM head (logit lens): which tokens a latent would say if it were a final hidden state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ROWS_AT_ONCE = 256  # rows of logits that are made together


@torch.inference_mode()
def read_latents(head: nn.Module, latents_RD: Tensor, top: int, token_ids: Sequence[int]) -> tuple[Tensor, ...]:
    """What the LM head makes of latents.

    Args:
        head: see `engine.head.head_of`.
        latents_RD: as they were fed back.
        top: K, the number of tokens.
        token_ids: G tokens whose ranks are asked for.

    Returns:
        The ids (R, K) of the most probable tokens, their probabilities (R, K), and how many tokens have a higher logit
        than each of `token_ids` (R, G).
    """
    parts: list[tuple[Tensor, ...]] = []
    ids = torch.tensor(token_ids, dtype=torch.long, device=latents_RD.device)
    for piece in latents_RD.split(ROWS_AT_ONCE):
        logits_RV = head(piece).float()
        highest = logits_RV.topk(min(top, logits_RV.shape[1]), dim=1)
        probability_RK = (highest.values - logits_RV.logsumexp(1, keepdim=True)).exp()
        ranks = [(logits_RV > logits_RV[:, token, None]).sum(1) for token in ids]
        rank_RG = torch.stack(ranks, 1) if ranks else ids.new_zeros(len(piece), 0)
        parts.append((highest.indices, probability_RK, rank_RG))
    return tuple(torch.cat(each).cpu() for each in zip(*parts, strict=True))
