"""`aggregator=best_of_n`: the rollout with the highest score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.aggregator import Ranking
from latent_tts.types import RolloutArrays


@dataclass(frozen=True)
class BestOfN:
    """The rollout with the highest score, readable or not; an unreadable answer is wrong.

    Source: You et al. (arXiv 2510.07745), section 4.
    """

    name: ClassVar[str] = "best_of_n"
    needs_score: ClassVar[bool] = True

    def rule(self, rollouts: RolloutArrays) -> Ranking:
        """Rank rollouts by score; a rollout without a score cannot be picked."""
        return Ranking(rollouts.score_QD)
