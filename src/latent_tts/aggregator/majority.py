"""`aggregator=majority`: the most frequent prediction wins (self-consistency)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latent_tts.aggregator import Aggregator, Vote
from latent_tts.types import RolloutArrays


@dataclass(frozen=True)
class Majority(Aggregator):
    """Each rollout with a readable answer has one vote; a tie goes to the lowest rollout number."""

    name: ClassVar[str] = "majority"

    def rule(self, rollouts: RolloutArrays) -> Vote:
        """Give every vote the same weight."""
        return Vote(np.zeros(rollouts.prediction_QD.shape))
