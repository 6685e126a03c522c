"""`schedule=sequential`: one latent after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.schedule import LatentModel, LatentSequence, Schedule


@dataclass(frozen=True)
class Sequential(Schedule):
    """The order in which models were trained to think."""

    name: ClassVar[str] = "sequential"
    stepwise: ClassVar[bool] = True

    @property
    def exact(self) -> bool:
        """True: these are the latents that others are compared with."""
        return True

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
