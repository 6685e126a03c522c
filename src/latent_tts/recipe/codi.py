"""`recipe=codi`: self-distillation. One model is its own teacher, which writes its steps, and student, which thinks.

Source: Shen et al. 2025 (arXiv 2502.21074), section 3; zhenyi4/codi, `src/model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from latent_tts.errors import bad_value, is_whole
from latent_tts.training.reasoner.curriculum import Distilled, check_dropout

if TYPE_CHECKING:
    from latent_tts.checkpoint.adapter import CheckpointAdapter
    from latent_tts.training.reasoner.codi import CodiObjective


@dataclass(frozen=True)
class Codi(Distilled):
    """The stages: every step written out (the teacher alone), then teacher and student side by side.

    CODI itself starts from a pretrained model and has the last stage alone. Between the two a student can be led there
    as COCONUT is: k latents for the first k steps, the others written.

    Attributes:
        written_updates: updates of the teacher alone.
        stage_updates: updates with 1, 2, ... latents, each hiding one step more from the student.
        final_updates: updates of a student that writes no step.
        final_dropout: dropout rate of those; null keeps the backbone's.
        latents: T of the trained reasoner.
        teacher_weight: of the teacher's cross-entropy; the student's counts 1.
        distill_weight: of the distance between the hidden states of both before the answer.
        distill_loss: `smooth_l1` or `l1`.
        projector_hidden: width inside the projector; null: the backbone's, or twice that for `identity`.
        projector_init: `random`, or `identity`: at first the latents are the hidden states, as COCONUT's are.
        projector_dropout: rate before the projector's first layer, while training.
        step_loss: weight of asking each latent for the result of the step it stands for; 0 is plain CODI.
    """

    projector_hidden: int | None
    projector_init: str
    projector_dropout: float

    family: ClassVar[str] = "CODI"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projector_hidden is not None and not (is_whole(self.projector_hidden) and self.projector_hidden >= 1):
            raise bad_value("recipe.projector_hidden", self.projector_hidden, "a positive width, or null")
        if self.projector_init not in ("random", "identity"):
            raise bad_value("recipe.projector_init", self.projector_init, "random or identity")
        if self.projector_dropout is None:
            raise bad_value("recipe.projector_dropout", None, "in [0, 1)")
        check_dropout("projector_dropout", self.projector_dropout)
        if not (is_whole(self.latents) and self.latents >= max(1, len(self.stage_updates))):
            raise bad_value(
                "model.latents", self.latents, f"1 or more, and at least the {len(self.stage_updates)} stages"
            )

    def add_own_tensors(self, folder: Path, seed: int) -> None:
        """Give a checkpoint without one a new projector (imports torch)."""
        from latent_tts.training.reasoner.codi import add_projector

        add_projector(folder, self.projector_hidden, seed, identity=self.projector_init == "identity")

    def objective(self, adapter: CheckpointAdapter) -> CodiObjective:
        """The model in training and its loss (imports torch)."""
        from latent_tts.training.reasoner.codi import CodiObjective

        return CodiObjective(adapter, self.weights, self.projector_dropout)
