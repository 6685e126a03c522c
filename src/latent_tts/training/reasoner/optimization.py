"""How the weights of a reasoner are updated; checked without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latent_tts.errors import check_fields, require
from latent_tts.training.optimization import Optimization


@dataclass(frozen=True)
class ReasonerOptimization(Optimization):
    """How the weights of a reasoner are updated.

    Attributes:
        batch, accumulation, lr, weight_decay, clip, gradient_checkpointing: as in `Optimization`.
        batch_tokens: most tokens per update, padding included, with every step written and all latents; None for any
            number. An update then has as many questions of like length as fit, at most `batch`.
        cosine_updates: length of the learning-rate schedule in updates, warm-up included: a cosine from `lr` to
            `lr` / 20. Training may end before.
        warmup: number of updates in the warm-up.
        bf16: whether the forward pass runs under bfloat16 autocast.
        minutes: of training, validation and saving not counted; the recipe's numbers of updates, `warmup` and
            `cosine_updates` are shares of it then. None: the recipe's updates end the run.
        follow: the log of a run by the clock, which this one is to repeat update by update.
    """

    cosine_updates: int
    warmup: int
    bf16: bool
    batch_tokens: int | None = None
    minutes: float | None = None
    follow: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            "optimization", self, cosine_updates="a positive integer", warmup="a positive integer",
            bf16="true or false", batch_tokens="a positive integer, or null", minutes="a positive number, or null",
        )  # fmt: skip
        require(
            "optimization.follow",
            self.follow,
            self.follow is None or (self.minutes is None and isinstance(self.follow, str)),
            "must be a file, with optimization.minutes=null",
        )

    def lr_at(self, update: float) -> float:
        """The learning rate of update number `update`, from 0; between two updates where the clock decides."""
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        done = min(1.0, (update - self.warmup) / max(1, self.cosine_updates - self.warmup))
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
