"""Whether a further latent has moved the distribution of the answer: what `schedule.exit` stops thinking by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latent_tts.engine.head import rows_at_once

TOKENS = 32  # that are distinguished; all others count as one


class AnswerMovement:
    """Compares the distribution of the answer's first token after a latent with that after the latent before it.

    The distance is total variation over the `TOKENS` most probable tokens of the distribution before and the rest as
    one, so it is never above that over all tokens.
    """

    def __init__(self, head: nn.Module) -> None:
        """Begin without a distribution; `head` is the LM head."""
        self._head = head
        self._last: tuple[Tensor, Tensor] | None = None  # ids and shares (R, K) of the tokens of the last distribution

    def since_last(self, hidden_RD: Tensor) -> Tensor | None:
        """How far the distribution has moved (R), 0 to 1; None at the first call.

        Args:
            hidden_RD: final hidden states at the position before the answer's first token.
        """
        moved, token, share = [], [], []
        at_once = rows_at_once(self._head, hidden_RD)
        for start in range(0, hidden_RD.shape[0], at_once):
            rows = slice(start, start + at_once)
            share_CV = self._head(hidden_RD[rows]).float().softmax(-1)
            if self._last is not None:
                token_CK, before_CK = (each[rows] for each in self._last)
                now_CK = share_CV.gather(1, token_CK)
                apart_C = (now_CK - before_CK).abs().sum(1) + (now_CK.sum(1) - before_CK.sum(1)).abs()
                moved.append(apart_C / 2)
            found = share_CV.topk(min(TOKENS, share_CV.shape[1]))
            token.append(found.indices)
            share.append(found.values)
        self._last = torch.cat(token), torch.cat(share)
        return torch.cat(moved) if moved else None
