"""`schedule=sequential`: one latent after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.schedule import LatentModel, LatentSequence


@dataclass(frozen=True)
class Sequential:
    """The order in which models were trained to think."""

    name: ClassVar[str] = "sequential"
    stepwise: ClassVar[bool] = True
    guess: ClassVar[str | None] = None
    exact: ClassVar[bool] = True
    verify: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """The schedule's part of the cache key."""
        return self.name

    def check(self, model: LatentModel) -> None:
        """Accept every model."""

    def run(self, latents: LatentSequence) -> None:
        """Compute the missing latents, until every row has ended its thinking."""
        while latents.unfinished:
            latents.advance()

    def repeated_passes(self, latents: int) -> list[tuple[int, int]]:
        """None: nothing is run twice."""
        del latents
        return []
