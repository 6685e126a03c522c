"""`aggregator=majority`: the most frequent prediction wins (self-consistency)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latent_tts.types import Bools, Floats, RolloutArrays


@dataclass(frozen=True)
class Majority:
    """One vote a readable rollout; unreadable ones do not vote; a tie goes to the lowest rollout number."""

    name: ClassVar[str] = "majority"
    needs_score: ClassVar[bool] = False

    def values(self, rollouts: RolloutArrays, members_SD: Bools) -> Floats:
        """For each rollout the votes of its prediction (Q, S, D); -inf for one that cannot win."""
        same_QDD = rollouts.prediction_QD[:, :, None] == rollouts.prediction_QD[:, None, :]
        votes_QSD = members_SD.astype(np.float32) @ same_QDD.astype(np.float32)
        return np.where((rollouts.prediction_QD >= 0)[:, None, :], votes_QSD, -np.inf)
