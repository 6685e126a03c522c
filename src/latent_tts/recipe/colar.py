"""`recipe=colar`: latents are compressed steps; the model learns to predict the next compressed embedding.

Source: Tan et al. 2025 (arXiv 2505.16552), section 3; xiaomi-research/colar.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import VALUE_KINDS, check_fields, require
from latent_tts.training.reasoner.curriculum import Objective, Recipe, Stage

PROMPT_WORDS = ("Question", ":", "Let", "'", "s", "think", "step", "by", "(", "Thinking", "speed", ")", "Answer")


@dataclass(frozen=True)
class Colar(Recipe):
    """The stages: latents of one token each, then latents of `speed` tokens.

    Attributes:
        written_updates: updates at a thinking speed of 1.
        final_updates: updates at the model's thinking speed.
        final_dropout: dropout rate of those; null keeps the backbone's.
        speed: compression factor of the trained reasoner (tokens per latent), which its prompt contains.
        latents: maximum number of latents; longer written steps are refused.
        latent_loss: `mse`, the squared distance to the next compressed embedding (the published checkpoint), or
            `nll`, the negative log-likelihood under a Gaussian whose standard deviation the head learns too (the
            original code).
        latent_weight: of that loss; the cross-entropy has weight 1.
        latent_noise: standard deviation of noise on the latents that are fed in training, in units of the embeddings'
            standard deviation. It imitates the errors of the model's own latents at inference.
        head_hidden: hidden width of the latent head; null: twice the backbone's width.
    """

    written_updates: int
    final_updates: int
    final_dropout: float | None
    speed: int
    latents: int
    latent_loss: str
    latent_weight: float
    latent_noise: float
    head_hidden: int | None

    family: ClassVar[str] = "CoLaR"
    words: ClassVar[tuple[str, ...]] = PROMPT_WORDS

    def __post_init__(self) -> None:
        check_fields(
            "recipe", self, written_updates="an integer, 0 or more", final_updates="an integer, 0 or more",
            final_dropout="a number in [0, 1), or null", latent_loss=("mse", "nll"),
            latent_weight="a finite number, 0 or more", latent_noise="a finite number, 0 or more",
            head_hidden="a positive integer, or null",
        )  # fmt: skip
        fast = VALUE_KINDS["a positive integer"](self.speed)
        require("model.thinking_speed", self.speed, fast, "must be a positive integer")
        check_fields("model", self, latents="a positive integer")

    def stages(self) -> list[Stage]:
        """The stages in order."""
        final = Stage(self.final_updates, self.latents, None, self.final_dropout, self.speed)
        return [Stage(self.written_updates, self.latents * self.speed, None, None, 1), final]

    def add_own_tensors(self, folder: Path, seed: int) -> None:
        """Add a random latent head to a checkpoint without one, and its scale to the config (imports torch)."""
        from latent_tts.training.reasoner.colar import add_head

        add_head(folder, self.head_hidden, seed, spread=self.latent_loss == "nll")

    def objective(self, adapter: CheckpointAdapter) -> Objective:
        """Create the model in training with its loss (imports torch)."""
        from latent_tts.training.reasoner.colar import ColarObjective

        return ColarObjective(cast(Any, adapter), self.latent_weight, self.latent_noise)

    def trained_with(self) -> dict[str, Any]:
        """The thinking speed."""
        return {"thinking_speed": self.speed}
