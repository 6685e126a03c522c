"""`aggregator=likelihood`: the rollout whose answer the model itself finds most probable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.aggregator import Ranking
from latent_tts.types import RolloutArrays


@dataclass(frozen=True)
class Likelihood:
    """Highest summed log-probability of the answer: the free baseline every reward model must beat."""

    name: ClassVar[str] = "likelihood"
    needs_score: ClassVar[bool] = False

    def rule(self, rollouts: RolloutArrays) -> Ranking:
        """Ranks rollouts by the log-probability of their answer."""
        return Ranking(rollouts.answer_logprob_QD)
