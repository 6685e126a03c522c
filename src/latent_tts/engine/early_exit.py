"""Whether a further latent has moved the distribution of the answer: what `schedule.exit` stops thinking by."""

from __future__ import annotations

from torch import Tensor, nn

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
        share_RV = self._head(hidden_RD).float().softmax(-1)
        moved_R = None
        if self._last is not None:
            token_RK, before_RK = self._last
            now_RK = share_RV.gather(1, token_RK)
            moved_R = ((now_RK - before_RK).abs().sum(1) + (now_RK.sum(1) - before_RK.sum(1)).abs()) / 2
        found = share_RV.topk(min(TOKENS, share_RV.shape[1]))
        self._last = found.indices, found.values
        return moved_R
