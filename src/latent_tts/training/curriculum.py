"""What a curriculum is made of: stages, and what is written after thinking in each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from latent_tts.errors import bad_value, is_number, is_whole

if TYPE_CHECKING:
    from pathlib import Path

    from latent_tts.adapter import CheckpointAdapter
    from latent_tts.training.loop import Objective


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        updates: how many optimizer updates it lasts.
        latents: how many latent thoughts stand before what is written.
        hidden_steps: how many leading steps are left out of what is written; None leaves out all.
        dropout: rate at every dropout in use; None keeps the backbone's.
    """

    updates: int
    latents: int
    hidden_steps: int | None
    dropout: float | None = None


@dataclass(frozen=True)
class SpeedStage(Stage):
    """A stage in which a latent stands for a number of tokens.

    Attributes:
        speed: c, tokens of the written steps that are compressed into one latent.
    """

    speed: int = 1


class Recipe(Protocol):
    """How the reasoners of a family are trained: stages, and the loss in each. Nothing here imports torch.

    Attributes:
        family: whose checkpoints it trains, as adapters call it.
        words: what the adapter's prompts and answers hold beside the task's own words (for a word-level vocabulary).
    """

    family: ClassVar[str]
    words: ClassVar[tuple[str, ...]] = ()

    def stages(self) -> list[Stage]:
        """The stages in order."""
        ...

    def check(self, adapter: CheckpointAdapter) -> None:
        """Raises UsageError unless the adapter and the recipe go together."""

    def add_own_tensors(self, folder: Path, seed: int) -> None:
        """Give a plain causal LM's checkpoint the family's own tensors, if it lacks them (imports torch)."""

    def objective(self, adapter: CheckpointAdapter) -> Objective:
        """The model in training and its loss (imports torch)."""
        ...

    def trained_with(self, adapter: CheckpointAdapter) -> dict[str, Any]:
        """What the trained checkpoint's config says under `latent_tts`, so that other values can be warned of."""
        return {"latents": adapter.latents}

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
    return written_before_answer(steps, stage) + f" {answer}"


def written_before_answer(steps: Sequence[str], stage: Stage) -> str:
    """The same without the answer: the steps not hidden, then `###`."""
    shown = steps[stage.hidden_steps :] if stage.hidden_steps is not None else ()
    return "".join(f"{step}\n" for step in shown) + "###"


def step_results(steps: Sequence[str]) -> list[str]:
    """What each step `<<a+b=c>>` comes to: `c`."""
    return [step.rpartition("=")[2].removesuffix(">>") for step in steps]


def check_updates(key: str, value: object) -> None:
    """Raise the usual error unless a value is a number of updates."""
    if not (is_whole(value) and value >= 0):
        raise bad_value(f"recipe.{key}", value, "a number of updates, 0 or more")


def check_weight(key: str, value: object) -> None:
    """Raise the usual error unless a value is the weight of a loss."""
    if not (is_number(value) and value >= 0):
        raise bad_value(f"recipe.{key}", value, "a weight, 0 or more")


def check_dropout(key: str, value: object) -> None:
    """Raise the usual error unless a value is a dropout rate or None."""
    if value is not None and not (is_number(value) and 0 <= value < 1):
        raise bad_value(f"recipe.{key}", value, "in [0, 1), or null")
