"""`search=independent`: n rollouts that know nothing of each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.sampler import Sampler
from latent_tts.scorer import Scorer


@dataclass(frozen=True)
class Independent:
    """Every rollout is grown to its end."""

    name: ClassVar[str] = "independent"
    survivors: ClassVar[int | None] = None

    def check(self, n: int, sampler: Sampler, scorer: Scorer | None) -> None:
        """Anything goes."""
