"""`scorer=auto`: the built-in LatentRM of the model, or no scorer."""

from __future__ import annotations

from collections.abc import Sequence

from latent_tts.checkpoint.files import SHIPPED_PREFIX
from latent_tts.scorer.latent_rm import LatentRM
from latent_tts.scorer.none import NoScorer


def auto(
    checkpoint: str | None,
    latents: int | None,
    reduce: str | None,
    positions: str,
    range: Sequence[float] | None = None,
) -> LatentRM | NoScorer:
    """The built-in scorer of a model.

    Args:
        checkpoint: the model's LatentRM; used only if it is built in, so that nothing is downloaded without a request.
        latents: T of the model; if 0 there is nothing to score.
        reduce: of the LatentRM.
        positions: of the LatentRM.
        range: of the LatentRM.

    Raises:
        UsageError: `reduce`, `positions` or `range` is not allowed.
    """
    scorer = LatentRM(str(checkpoint), reduce, positions, range=range, only_own=True)
    if checkpoint is None or not checkpoint.startswith(SHIPPED_PREFIX):
        hint = f" (scorer=latent_rm takes {checkpoint})" if checkpoint else ""
        return NoScorer(f"there is no built-in LatentRM for this model{hint}")
    if latents == 0:
        return NoScorer("a LatentRM scores latents, and model.latents=0")
    return scorer
