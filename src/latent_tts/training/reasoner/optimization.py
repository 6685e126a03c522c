"""How the weights of a reasoner are updated; checked without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latent_tts.errors import bad_value, check_positive
from latent_tts.training.optimization import Optimization


@dataclass(frozen=True)
class ReasonerOptimization(Optimization):
    """How the weights of a reasoner are updated.

    Attributes:
        batch, accumulation, lr, weight_decay, clip: as in `Optimization`.
        cosine_updates: length of the learning-rate schedule in updates, warm-up included: a cosine from `lr` to
            `lr` / 20. Training may end before.
        warmup: number of updates in the warm-up.
        bf16: whether the forward pass runs under bfloat16 autocast.
    """

    cosine_updates: int
    warmup: int
    bf16: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("optimization", self, whole=("cosine_updates", "warmup"))
        if not isinstance(self.bf16, bool):
            raise bad_value("optimization.bf16", self.bf16, "must be true or false")

    def lr_at(self, update: int) -> float:
        """The learning rate of update number `update`, from 0."""
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        done = min(1.0, (update - self.warmup) / max(1, self.cosine_updates - self.warmup))
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
