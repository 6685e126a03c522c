"""`recipe=codi`: self-distillation; one model is the teacher, with written steps, and the student, with latents.

Source: Shen et al. 2025 (arXiv 2502.21074), section 3; zhenyi4/codi, `src/model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import check_fields
from latent_tts.training.reasoner.curriculum import Distilled, Objective


@dataclass(frozen=True)
class Codi(Distilled):
    """The stages: every step written (only the teacher), then teacher and student side by side.

    The original CODI starts from a pretrained model and has only the last stage. Stages in between can guide the
    student as in COCONUT: k latents instead of the first k steps, the others written.

    Attributes:
        written_updates: updates of only the teacher.
        stage_updates: updates with 1, 2, ... latents, each stage hiding one more step from the student.
        final_updates: updates with a student that writes no step.
        final_dropout: dropout rate of those; null keeps the backbone's.
        latents: T of the trained reasoner.
        teacher_weight: of the teacher's cross-entropy; the student's counts 1.
        distill_weight: of the distance between their hidden states before the answer.
        distill_loss: `smooth_l1` or `l1`.
        projector_hidden: hidden width of the projector; null: the backbone's width, or twice that for `identity`.
        projector_init: `random`, or `identity`: at first the latents are the hidden states, as in COCONUT.
        projector_dropout: dropout rate before the projector's first layer, in [0, 1).
        step_loss: weight of the loss by which each latent predicts the result of its step; 0 is plain CODI.
    """

    projector_hidden: int | None
    projector_init: str
    projector_dropout: float

    family: ClassVar[str] = "CODI"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            "recipe", self, projector_hidden="a positive integer, or null", projector_init=("random", "identity"),
            projector_dropout="a number in [0, 1)",
        )  # fmt: skip

    def add_own_tensors(self, folder: Path, seed: int) -> None:
        """Add a new projector to a checkpoint without one (imports torch)."""
        from latent_tts.training.reasoner.codi import add_projector

        add_projector(folder, self.projector_hidden, seed, identity=self.projector_init == "identity")

    def objective(self, adapter: CheckpointAdapter) -> Objective:
        """Create the model in training with its loss (imports torch)."""
        from latent_tts.training.reasoner.codi import CodiObjective

        return CodiObjective(adapter, self, self.projector_dropout)
