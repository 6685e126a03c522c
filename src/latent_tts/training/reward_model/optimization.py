"""How LatentRM's weights are updated: values alone, checked without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latent_tts.errors import bad_value, check_positive, is_number, is_whole


@dataclass(frozen=True)
class RewardOptimization:
    """How the weights are updated.

    Attributes:
        batch: questions an update, over all processes.
        lr: peak learning rate of AdamW; linear warm-up, then a cosine to 0.
        warmup: share of the updates that warm up.
        epochs: most passes over the questions; 0 leaves LatentRM untrained.
        weight_decay: on matrices, as AdamW does it.
        clip: largest gradient norm.
        evaluations: on `valid_annotations`, an epoch; each keeps a checkpoint.
        patience: evaluations without a better selection accuracy after which training stops.
    """

    batch: int
    lr: float
    warmup: float
    epochs: int
    weight_decay: float
    clip: float
    evaluations: int
    patience: int

    def __post_init__(self) -> None:
        check_positive("optimization", self, whole=("batch", "evaluations", "patience"), real=("lr", "clip"))
        if not (is_whole(self.epochs) and self.epochs >= 0):
            raise bad_value("optimization.epochs", self.epochs, "a number of passes, 0 or more")
        if not (is_number(self.weight_decay) and self.weight_decay >= 0):
            raise bad_value("optimization.weight_decay", self.weight_decay, "0 or more")
        if not (is_number(self.warmup) and 0 <= self.warmup < 1):
            raise bad_value("optimization.warmup", self.warmup, "in [0, 1)")

    def updates_an_epoch(self, questions: int) -> int:
        """Updates of a pass over the questions; the last one may be of fewer."""
        return math.ceil(questions / self.batch)
