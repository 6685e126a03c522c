"""`recipe=coconut`: the staged curriculum, in which written steps give way to latent thoughts.

Source: Hao et al. 2024 (arXiv 2412.06769), section 3; facebookresearch/coconut, `dataset.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from latent_tts.errors import bad_value
from latent_tts.training.curriculum import Recipe, Stage, check_dropout, check_updates, check_weight

if TYPE_CHECKING:
    from latent_tts.adapter import CheckpointAdapter
    from latent_tts.training.coconut import CoconutObjective


@dataclass(frozen=True)
class Coconut(Recipe):
    """The stages: 0 latents with all steps written out, then k latents for the first k steps, last T latents alone.

    Attributes:
        written_updates: updates with every step written out.
        stage_updates: updates with 1, 2, ... latents, each hiding one step more.
        final_updates: updates with `latents` latents and no written step.
        final_dropout: dropout rate of those; null keeps the backbone's (high from the start it slows learning).
        latents: T of the trained reasoner; at least the number of stages.
        step_loss: weight of asking each latent for the result of the step it stands for; 0 is plain COCONUT.
    """

    written_updates: int
    stage_updates: Sequence[int]
    final_updates: int
    final_dropout: float | None
    latents: int
    step_loss: float

    family: ClassVar[str] = "COCONUT"

    def __post_init__(self) -> None:
        check_updates("written_updates", self.written_updates)
        check_updates("final_updates", self.final_updates)
        for updates in self.stage_updates:
            check_updates("stage_updates", updates)
        check_weight("step_loss", self.step_loss)
        check_dropout("final_dropout", self.final_dropout)
        if self.latents < max(1, len(self.stage_updates)):
            raise bad_value("model.latents", self.latents, f"at least the {len(self.stage_updates)} stages")

    def stages(self) -> list[Stage]:
        """The stages in order."""
        middle = [Stage(updates, k, k) for k, updates in enumerate(self.stage_updates, start=1)]
        final = Stage(self.final_updates, self.latents, None, self.final_dropout)
        return [Stage(self.written_updates, 0, 0), *middle, final]

    def objective(self, adapter: CheckpointAdapter) -> CoconutObjective:
        """The model in training and its loss (imports torch)."""
        from latent_tts.training.coconut import CoconutObjective

        return CoconutObjective(adapter, self.step_loss)
