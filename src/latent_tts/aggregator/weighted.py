"""`aggregator=weighted`: a vote in which higher scores have more weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from latent_tts.aggregator import Vote
from latent_tts.errors import bad_value, check_fields
from latent_tts.types import Float32, Float64, RolloutArrays

MIN_TEMPERATURE = 1e-200  # below it, quotients of scores overflow; the highest score already has all the weight
T = TypeVar("T", Float32, Float64, float)


@dataclass(frozen=True)
class Weighted:
    """Each rollout with a readable answer votes with its softmax weight; a tie goes to the lowest rollout number.

    Attributes:
        temperature: of the softmax over the scores of a subset, above 0; None: that of the scorer, which the pipeline
            fills in.
    """

    temperature: float | None = None

    name: ClassVar[str] = "weighted"
    needs_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields("aggregator.weighted", self, temperature="a positive number, or null for the scorer's own")

    def rule(self, rollouts: RolloutArrays) -> Vote:
        """Weigh votes by exp(score / temperature), the softmax up to a factor; without a score there is no vote."""
        return Vote(self.log_weights(rollouts.score_QD))

    def log_weights(self, score: T) -> T:
        """Logarithms of the weights of scores, up to a constant: score / temperature."""
        if self.temperature is None:  # a record of a run that says less than the run did
            raise bad_value("aggregator.weighted.temperature", None, "must be a positive number where runs are read")
        return score / max(self.temperature, MIN_TEMPERATURE)
