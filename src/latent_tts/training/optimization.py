"""How weights are updated: the settings that trainings share, checked without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from latent_tts.errors import check_fields, require

NO_LIMIT = 10**7  # updates of a run that the clock ends


@dataclass(frozen=True)
class Optimization:
    """How weights are updated, by AdamW.

    Attributes:
        batch: questions per update, over all processes.
        accumulation: micro-batches per update and process; more need less memory for the same number of questions. The
            loss of an update is the mean over its micro-batches.
        lr: peak learning rate, after a linear warm-up.
        weight_decay: AdamW's weight decay, 0 or more; only on matrices.
        clip: maximum norm of the gradient.
        gradient_checkpointing: whether blocks keep only their input for the backward pass, which computes the rest
            again: less memory, about a third more time, the same gradients.
    """

    batch: int
    accumulation: int
    lr: float
    weight_decay: float
    clip: float
    gradient_checkpointing: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(
            "optimization", self, batch="a positive integer", accumulation="a positive integer", lr="a positive number",
            weight_decay="a finite number, 0 or more", clip="a positive number", gradient_checkpointing="true or false",
        )  # fmt: skip
        divides = self.batch % self.accumulation == 0
        require("optimization.accumulation", self.accumulation, divides, f"must divide optimization.batch={self.batch}")


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
