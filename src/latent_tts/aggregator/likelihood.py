"""`aggregator=likelihood`: the rollout whose answer the model itself finds most probable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latent_tts.types import Bools, Floats, RolloutArrays


@dataclass(frozen=True)
class Likelihood:
    """Highest summed log-probability of the answer: the free baseline every reward model must beat."""

    name: ClassVar[str] = "likelihood"
    needs_score: ClassVar[bool] = False

    def values(self, rollouts: RolloutArrays, members_SD: Bools) -> Floats:
        """The log-probability of each rollout's answer (Q, S, D)."""
        shape = (len(rollouts.prediction_QD), *members_SD.shape)
        return np.broadcast_to(rollouts.answer_logprob_QD[:, None, :], shape)
