"""`aggregator=weighted`: a vote in which better scores weigh more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latent_tts.errors import bad_value, is_number
from latent_tts.types import Bools, Floats, RolloutArrays

DECIMALS = 12  # votes that differ by less are ties, so that summation order decides nothing


@dataclass(frozen=True)
class Weighted:
    """Each readable rollout votes with its softmax weight; a tie goes to the lowest rollout number.

    Attributes:
        temperature: of the softmax over the scores of a subset; None until a scorer says which.
    """

    temperature: float | None = None

    name: ClassVar[str] = "weighted"
    needs_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        value = self.temperature
        if value is not None and not (is_number(value) and value > 0):
            raise bad_value("aggregator.weighted.temperature", value, "a positive number, or null for the scorer's own")

    def values(self, rollouts: RolloutArrays, members_SD: Bools) -> Floats:
        """For each rollout the weight of its prediction (Q, S, D), up to a factor of the subset; -inf for none."""
        assert self.temperature is not None, "no temperature chosen"
        votes_QD = (rollouts.prediction_QD >= 0) & ~np.isnan(rollouts.score_QD)
        # only ratios within a subset matter, so unreadable rollouts drop out of the softmax
        scores_QSD = np.where(votes_QD[:, None, :] & members_SD, rollouts.score_QD[:, None, :], -np.inf)
        highest_QS1 = scores_QSD.max(-1, keepdims=True)
        highest_QS1 = np.where(np.isfinite(highest_QS1), highest_QS1, 0.0)
        weights_QSD = np.exp((scores_QSD - highest_QS1) / self.temperature)
        same_QDD = rollouts.prediction_QD[:, :, None] == rollouts.prediction_QD[:, None, :]
        sums_QSD = np.round(weights_QSD @ same_QDD.astype(np.float64), DECIMALS)
        return np.where(votes_QD[:, None, :] & (sums_QSD > 0), sums_QSD, -np.inf)
