"""`schedule=sequential`: one latent after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.schedule import LatentModel, LatentSequence


@dataclass(frozen=True)
class Sequential:
    """The order in which the models think."""

    name: ClassVar[str] = "sequential"
    stepwise: ClassVar[bool] = True

    @property
    def key(self) -> str:
        """What keys of caches hold."""
        return self.name

    def check(self, model: LatentModel) -> None:
        """Anything goes."""

    def run(self, latents: LatentSequence) -> None:
        """Make the latents that are still missing, until no row thinks any more."""
        while latents.unfinished:
            latents.advance()

    def repeated_passes(self, latents: int) -> list[tuple[int, int]]:
        """Nothing is run twice."""
        del latents
        return []
