"""`schedule=sequential`: one latent after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.schedule import LatentModel, Thoughts


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

    def think(self, thoughts: Thoughts) -> None:
        """Make the latents that are still missing, until no row thinks any more."""
        while thoughts.unfinished:
            thoughts.advance()

    def repeated(self, latents: int) -> list[tuple[int, int]]:
        """Nothing is run twice."""
        del latents
        return []
