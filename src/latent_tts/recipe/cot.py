"""`recipe=cot`: every step written, no latents. An explicit chain of thought, from which other recipes can start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.checkpoint.adapter import CheckpointAdapter
from latent_tts.errors import check_fields
from latent_tts.training.reasoner.curriculum import Objective, Recipe, Stage


@dataclass(frozen=True)
class Cot(Recipe):
    """A single stage.

    Attributes:
        written_updates: updates with every step written.
    """

    written_updates: int

    family: ClassVar[str] = "COCONUT"  # the same files: a plain causal LM

    def __post_init__(self) -> None:
        check_fields("recipe", self, written_updates="an integer, 0 or more")

    def stages(self) -> list[Stage]:
        """The only stage."""
        return [Stage(self.written_updates, 0, 0)]

    def objective(self, adapter: CheckpointAdapter) -> Objective:
        """Create the model in training with its loss (imports torch)."""
        from latent_tts.training.reasoner.coconut import CoconutObjective

        return CoconutObjective(adapter, step_loss=0.0)
