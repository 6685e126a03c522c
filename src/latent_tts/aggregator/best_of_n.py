"""`aggregator=best_of_n`: the rollout with the highest score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latent_tts.types import Bools, Floats, RolloutArrays


@dataclass(frozen=True)
class BestOfN:
    """The scorer's favourite, whatever it answers: if that cannot be read, the pick is wrong.

    Source: You et al. (arXiv 2510.07745), section 4.
    """

    name: ClassVar[str] = "best_of_n"
    needs_score: ClassVar[bool] = True

    def values(self, rollouts: RolloutArrays, members_SD: Bools) -> Floats:
        """The score of each rollout (Q, S, D); -inf where there is none."""
        scores_QD = np.where(np.isnan(rollouts.score_QD), -np.inf, rollouts.score_QD)
        return np.broadcast_to(scores_QD[:, None, :], (len(scores_QD), *members_SD.shape))
