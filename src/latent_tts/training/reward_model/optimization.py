"""How LatentRM's weights are updated, checked without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latent_tts.errors import bad_value, check_positive, is_number, is_whole
from latent_tts.training.optimization import Optimization


@dataclass(frozen=True)
class RewardOptimization(Optimization):
    """How the weights are updated; after the warm-up a cosine to 0.

    Attributes:
        batch, accumulation, lr, weight_decay, clip: as in `Optimization`.
        warmup: share of the updates that warm up.
        epochs: largest number of passes over the questions; 0 leaves LatentRM untrained.
        evaluations: number of evaluations on `valid_annotations` per epoch; each saves a state.
        patience: evaluations without a better selection accuracy after which training stops.
    """

    warmup: float
    epochs: int
    evaluations: int
    patience: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("optimization", self, whole=("evaluations", "patience"))
        if not (is_whole(self.epochs) and self.epochs >= 0):
            raise bad_value("optimization.epochs", self.epochs, "a number of passes, 0 or more")
        if not (is_number(self.warmup) and 0 <= self.warmup < 1):
            raise bad_value("optimization.warmup", self.warmup, "in [0, 1)")

    def updates_per_epoch(self, questions: int) -> int:
        """Updates in one pass over the questions; the last one may have fewer questions."""
        return math.ceil(questions / self.batch)
