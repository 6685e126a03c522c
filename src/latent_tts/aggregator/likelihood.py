"""`aggregator=likelihood`: the rollout whose answer the model itself finds most probable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.aggregator import Aggregator, Ranking
from latent_tts.types import RolloutArrays


@dataclass(frozen=True)
class Likelihood(Aggregator):
    """The rollout with the highest summed log-probability of its answer: a baseline that needs no reward model."""

    name: ClassVar[str] = "likelihood"

    def rule(self, rollouts: RolloutArrays) -> Ranking:
        """Rank rollouts by the log-probability of their answer."""
        return Ranking(rollouts.answer_logprob_QD)
