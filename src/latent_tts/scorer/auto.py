"""`scorer=auto`: the LatentRM that is shipped for the model, else none."""

from __future__ import annotations

from latent_tts.checkpoint.files import SHIPPED_PREFIX
from latent_tts.scorer.latent_rm import LatentRM, checked_settings
from latent_tts.scorer.none import NoScorer


def auto(checkpoint: str | None, latents: int | None, reduce: str | None, positions: str) -> LatentRM | NoScorer:
    """The scorer that a model brings with it.

    Args:
        checkpoint: the model's LatentRM; only a shipped one is taken, so that nothing is fetched unasked.
        latents: T of the model; without latents there is nothing to score.
        reduce: of the LatentRM.
        positions: of the LatentRM.

    Raises:
        UsageError: `reduce` or `positions` is unknown.
    """
    checked_settings(reduce, positions)
    if checkpoint is None or not checkpoint.startswith(SHIPPED_PREFIX):
        hint = "no LatentRM is shipped for this model" if checkpoint is None else "it takes a shipped LatentRM alone"
        return NoScorer(hint)
    if latents == 0:
        return NoScorer("a LatentRM scores latents, and model.latents=0")
    return LatentRM(checkpoint, reduce, positions, only_own=True)
