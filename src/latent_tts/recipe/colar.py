"""`recipe=colar`: latents are compressed steps; the model learns to predict the next compressed embedding.

Source: Tan et al. 2025 (arXiv 2505.16552), section 3; xiaomi-research/colar.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from latent_tts.errors import bad_value, check_positive, is_whole
from latent_tts.training.reasoner.curriculum import Recipe, Stage, check_dropout, check_updates, check_weight

if TYPE_CHECKING:
    from latent_tts.checkpoint.adapter import CheckpointAdapter
    from latent_tts.training.reasoner.colar import ColarObjective

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
        check_updates("written_updates", self.written_updates)
        check_updates("final_updates", self.final_updates)
        check_dropout("final_dropout", self.final_dropout)
        if self.latent_loss not in ("mse", "nll"):
            raise bad_value("recipe.latent_loss", self.latent_loss, "must be mse or nll")
        check_weight("latent_weight", self.latent_weight)
        check_weight("latent_noise", self.latent_noise)
        if not (is_whole(self.speed) and self.speed >= 1):
            raise bad_value("model.thinking_speed", self.speed, "must be an integer, 1 or more")
        if self.head_hidden is not None and not (is_whole(self.head_hidden) and self.head_hidden >= 1):
            raise bad_value("recipe.head_hidden", self.head_hidden, "must be a positive integer, or null")
        check_positive("model", self, whole=("latents",))

    def stages(self) -> list[Stage]:
        """The stages in order."""
        final = Stage(self.final_updates, self.latents, None, self.final_dropout, self.speed)
        return [Stage(self.written_updates, self.latents * self.speed, None, None, 1), final]

    def add_own_tensors(self, folder: Path, seed: int) -> None:
        """Add a random latent head to a checkpoint without one, and its scale to the config (imports torch)."""
        from latent_tts.training.reasoner.colar import add_head

        add_head(folder, self.head_hidden, seed, spread=self.latent_loss == "nll")

    def objective(self, adapter: CheckpointAdapter) -> ColarObjective:
        """Create the model in training with its loss (imports torch)."""
        from latent_tts.model.colar import Colar as ColarAdapter
        from latent_tts.training.reasoner.colar import ColarObjective

        assert isinstance(adapter, ColarAdapter)
        return ColarObjective(adapter, self.latent_weight, self.latent_noise)

    def trained_with(self, adapter: CheckpointAdapter) -> dict[str, Any]:
        """The thinking speed."""
        return {"thinking_speed": self.speed}
