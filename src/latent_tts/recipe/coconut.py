"""`recipe=coconut`: a curriculum that replaces written steps by latents, stage by stage.

Source: Hao et al. 2024 (arXiv 2412.06769), section 3; facebookresearch/coconut, `dataset.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import check_fields
from latent_tts.training.reasoner.curriculum import Objective, Staged


@dataclass(frozen=True)
class Coconut(Staged):
    """The stages: all steps written, no latents; then k latents instead of the first k steps; then only T latents.

    Attributes:
        written_updates: updates with every step written out.
        stage_updates: updates with 1, 2, ... latents, each stage hiding one more step.
        final_updates: updates with `latents` latents and no written step.
        final_dropout: dropout rate of those; null keeps the backbone's (a high rate from the start slows learning).
        latents: T of the trained reasoner; at least the number of stages.
        step_loss: weight of the loss by which each latent predicts the result of its step; 0 is plain COCONUT.
    """

    step_loss: float

    family: ClassVar[str] = "COCONUT"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("recipe", self, step_loss="a finite number, 0 or more")

    def objective(self, adapter: CheckpointAdapter) -> Objective:
        """Create the model in training with its loss (imports torch)."""
        from latent_tts.training.reasoner.coconut import CoconutObjective

        return CoconutObjective(adapter, self.step_loss)
