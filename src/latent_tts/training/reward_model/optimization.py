"""How the weights of LatentRM are updated; checked without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latent_tts.errors import check_fields
from latent_tts.training.optimization import Optimization


@dataclass(frozen=True)
class RewardOptimization(Optimization):
    """How the weights of LatentRM are updated; after the warm-up the learning rate falls to 0 by a cosine.

    Attributes:
        batch, accumulation, lr, weight_decay, clip, gradient_checkpointing: as in `Optimization`.
        warmup: share of the updates in the warm-up, in [0, 1).
        epochs: maximum number of passes over the questions; 0 leaves LatentRM untrained.
        evaluations: number of evaluations on `valid_annotations` per epoch; each saves a state.
        patience: number of evaluations without a better selection accuracy after which training stops.
    """

    warmup: float
    epochs: int
    evaluations: int
    patience: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            "optimization", self, warmup="a number in [0, 1)", epochs="an integer, 0 or more",
            evaluations="a positive integer", patience="a positive integer",
        )  # fmt: skip

    def updates_per_epoch(self, questions: int) -> int:
        """Number of updates per pass over the questions; the last update may have fewer questions."""
        return math.ceil(questions / self.batch)
