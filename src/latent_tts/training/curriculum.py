"""COCONUT's staged curriculum: written steps give way to latent thoughts, stage by stage.

Source: Hao et al. 2024 (arXiv 2412.06769), section 3; facebookresearch/coconut, `dataset.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latent_tts.errors import bad_value, is_number


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        updates: how many optimizer updates it lasts.
        latents: how many latent thoughts stand before what is written.
        hidden_steps: how many leading steps are left out of what is written; None leaves out all.
    """

    updates: int
    latents: int
    hidden_steps: int | None


@dataclass(frozen=True)
class Curriculum:
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

    def __post_init__(self) -> None:
        for key, value in (("written_updates", self.written_updates), ("final_updates", self.final_updates)):
            if value < 0:
                raise bad_value(f"curriculum.{key}", value, "a number of updates, 0 or more")
        if any(updates < 0 for updates in self.stage_updates):
            raise bad_value("curriculum.stage_updates", list(self.stage_updates), "numbers of updates, 0 or more")
        if not (is_number(self.step_loss) and self.step_loss >= 0):
            raise bad_value("curriculum.step_loss", self.step_loss, "a weight, 0 or more")
        if self.final_dropout is not None and not (is_number(self.final_dropout) and 0 <= self.final_dropout < 1):
            raise bad_value("curriculum.final_dropout", self.final_dropout, "in [0, 1), or null")
        if self.latents < max(1, len(self.stage_updates)):
            raise bad_value("model.latents", self.latents, f"at least the {len(self.stage_updates)} stages")

    def stages(self) -> list[Stage]:
        """The stages in order."""
        middle = [Stage(updates, k, k) for k, updates in enumerate(self.stage_updates, start=1)]
        return [Stage(self.written_updates, 0, 0), *middle, Stage(self.final_updates, self.latents, None)]

    @property
    def updates(self) -> int:
        """Updates of all stages together."""
        return sum(stage.updates for stage in self.stages())

    def stage_at(self, update: int) -> Stage:
        """The stage that update number `update` (from 0) belongs to."""
        for stage in self.stages():
            if update < stage.updates:
                return stage
            update -= stage.updates
        raise IndexError(update)


def written_text(steps: Sequence[str], answer: str, stage: Stage) -> str:
    """What stands after the end of thinking: the steps not hidden, then `### answer`."""
    shown = steps[stage.hidden_steps :] if stage.hidden_steps is not None else ()
    return "".join(f"{step}\n" for step in shown) + f"### {answer}"


def step_results(steps: Sequence[str]) -> list[str]:
    """What each step `<<a+b=c>>` comes to: `c`."""
    return [step.rpartition("=")[2].removesuffix(">>") for step in steps]
