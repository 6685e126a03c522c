"""Adapters of checkpoints with random weights in published layouts."""

from pathlib import Path

from latent_tts.model.colar import Colar

COLAR = Path(__file__).parents[1] / "parity" / "colar"
MAX_LATENTS = 16  # as in the official code


def colar(folder: Path = COLAR, **more) -> Colar:
    return Colar(name="colar", checkpoint=str(folder), latents=MAX_LATENTS, recommended={}, **more)
