"""`recipe=pccot`: CODI's self-distillation with a student that computes its latents in parallel sweeps.

Source: Wu et al. 2025 (arXiv 2506.18582), section 3; whyNLP/PCCoT, `models/modeling_gpt2.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import check_fields
from latent_tts.training.reasoner.curriculum import Distilled, Objective


@dataclass(frozen=True)
class Pccot(Distilled):
    """The stages: every step written (only the teacher), then teacher and student side by side.

    The original PCCoT starts from a pretrained model and has only the last stage. Stages in between can guide the
    student: it has all T latents and writes one step less in each stage.

    Attributes:
        written_updates: updates of only the teacher.
        stage_updates: updates with the first 1, 2, ... steps hidden from the student.
        final_updates: updates with a student that writes no step.
        final_dropout: dropout rate of those; null keeps the backbone's.
        latents: T of the trained reasoner.
        sweeps: K of the trained reasoner.
        known_first: whether its first sweep begins with h_1, which the prompt's pass makes, and not the latent token.
        projection: whether latents are projected; otherwise they are the hidden states.
        teacher_weight: of the teacher's cross-entropy; the student's has weight 1.
        distill_weight: of the distance between their hidden states before the answer.
        distill_loss: `smooth_l1` or `l1`.
        step_loss: weight of the loss by which each latent predicts the result of its step; 0 is plain PCCoT.
    """

    sweeps: int
    known_first: bool
    projection: bool

    family: ClassVar[str] = "PCCoT"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("recipe", self, projection="true or false", known_first="true or false")
        check_fields("model", self, sweeps="a positive integer")

    def latents_in(self, stage: int) -> int:
        """T in every stage, since a sweep computes all latents together."""
        return self.latents

    def add_own_tensors(self, folder: Path, seed: int) -> None:
        """Add a new projection to a checkpoint without one, and how it sweeps to its config (imports torch)."""
        from latent_tts.training.reasoner.pccot import add_projection

        add_projection(folder, self.sweeps, seed, projection=self.projection, known_first=self.known_first)

    def objective(self, adapter: CheckpointAdapter) -> Objective:
        """Create the model in training with its loss (imports torch)."""
        from latent_tts.training.reasoner.pccot import PccotObjective

        return PccotObjective(adapter, self, self.sweeps, known_first=self.known_first)

    def trained_with(self) -> dict[str, Any]:
        """T, K, and what the first sweep begins with."""
        return {"latents": self.latents, "sweeps": self.sweeps, "known_first": self.known_first}
