"""What the recipes of all families share: stages, the two Protocols, and the text to write after the latents.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from latent_tts.errors import bad_value, is_number, is_whole

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from latent_tts.checkpoint.adapter import CheckpointAdapter
    from latent_tts.types import Question


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Attributes:
        updates: number of optimizer updates.
        latents: number of latents before the written text.
        hidden_steps: number of leading steps that are not written; None hides all.
        dropout: rate of every active dropout; None keeps the backbone's.
        speed: tokens of the written steps per latent, where latents are compressed steps (CoLaR).
    """

    updates: int
    latents: int
    hidden_steps: int | None
    dropout: float | None = None
    speed: int = 1


class Objective(Protocol):
    """A model in training and its loss in each stage.

    Attributes:
        lm: the causal LM.
        own: the family's own modules, each under the prefix of its tensors in a checkpoint.
    """

    lm: PreTrainedModel
    own: nn.ModuleDict

    def loss(self, questions: list[Question], stage: Stage) -> Tensor:
        """The loss of a batch, a scalar with gradients."""
        ...

    def exact_matches(self, questions: list[Question], stage: Stage) -> int:
        """The number of questions answered exactly; called without gradients and dropout."""
        ...


class Recipe(Protocol):
    """How the reasoners of a family are trained: the stages, and the objective.

    Attributes:
        family: the family of checkpoints that it trains, as adapters name it.
        words: words of the adapter's prompts and answers that the task's vocabulary lacks (for word-level tokenizers).
    """

    family: ClassVar[str]
    words: ClassVar[tuple[str, ...]] = ()

    def stages(self) -> list[Stage]:
        """The stages in order."""
        ...

    def check(self, adapter: CheckpointAdapter) -> None:
        """Raises UsageError unless the adapter and the recipe go together."""

    def add_own_tensors(self, folder: Path, seed: int) -> None:
        """Add the family's own tensors to the checkpoint of a plain causal LM, unless it has them (imports torch)."""

    def objective(self, adapter: CheckpointAdapter) -> Objective:
        """The model in training and its loss (imports torch)."""
        ...

    def trained_with(self, adapter: CheckpointAdapter) -> dict[str, Any]:
        """What the trained checkpoint's config says under `latent_tts`; other values are warned of when it is run."""
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


@dataclass(frozen=True)
class Staged(Recipe):
    """Stages that replace written steps by latents: all steps written, then one less in each stage, then none.

    Attributes:
        written_updates: updates with every step written out and no latents.
        stage_updates: updates with the first 1, 2, ... steps hidden.
        final_updates: updates with `latents` latents and no written step.
        final_dropout: dropout rate of those; null keeps the backbone's.
        latents: T of the trained reasoner.
    """

    written_updates: int
    stage_updates: Sequence[int]
    final_updates: int
    final_dropout: float | None
    latents: int

    def __post_init__(self) -> None:
        check_updates("written_updates", self.written_updates)
        check_updates("final_updates", self.final_updates)
        if not isinstance(self.stage_updates, list):
            raise bad_value("recipe.stage_updates", self.stage_updates, "a list of numbers of updates, as in [100,100]")
        for updates in self.stage_updates:
            check_updates("stage_updates", updates)
        check_dropout("final_dropout", self.final_dropout)

    def latents_in(self, stage: int) -> int:
        """Latents of the stage that hides the first `stage` steps: one per step."""
        return stage

    def stages(self) -> list[Stage]:
        """The stages in order."""
        middle = [Stage(updates, self.latents_in(k), k) for k, updates in enumerate(self.stage_updates, start=1)]
        final = Stage(self.final_updates, self.latents, None, self.final_dropout)
        return [Stage(self.written_updates, 0, 0), *middle, final]


@dataclass(frozen=True)
class DistillationWeights:
    """The weights of the parts of a distillation loss; the student's cross-entropy has weight 1.

    Attributes:
        teacher: of the teacher's cross-entropy.
        distill: of the distance between the hidden states of both before the answer.
        step: of the cross-entropy of each latent's step result.
        distill_loss: the distance, `smooth_l1` or `l1`.
    """

    teacher: float
    distill: float
    step: float
    distill_loss: str


@dataclass(frozen=True)
class Distilled(Staged):
    """Stages with a teacher, which writes every step, and a student, which has latents; the first has no student.

    Attributes:
        teacher_weight: of the teacher's cross-entropy; the student's counts 1.
        distill_weight: of the distance between the hidden states of both before the answer.
        distill_loss: `smooth_l1` or `l1`.
        step_loss: weight of asking each latent for the result of the step it stands for.
    """

    teacher_weight: float
    distill_weight: float
    distill_loss: str
    step_loss: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("teacher_weight", "distill_weight", "step_loss"):
            check_weight(key, getattr(self, key))
        if self.distill_loss not in ("smooth_l1", "l1"):
            raise bad_value("recipe.distill_loss", self.distill_loss, "smooth_l1 or l1")

    @property
    def weights(self) -> DistillationWeights:
        """The weights of the parts of the loss."""
        return DistillationWeights(self.teacher_weight, self.distill_weight, self.step_loss, self.distill_loss)


def written_text(steps: Sequence[str], answer: str, stage: Stage) -> str:
    """The text after the latents: the steps that are not hidden, then `### answer`."""
    return written_before_answer(steps, stage) + f" {answer}"


def written_before_answer(steps: Sequence[str], stage: Stage) -> str:
    """The text after the latents up to the answer: the steps that are not hidden, then `###`."""
    shown = steps[stage.hidden_steps :] if stage.hidden_steps is not None else ()
    return "".join(f"{step}\n" for step in shown) + "###"


def step_results(steps: Sequence[str]) -> list[str]:
    """The result `c` of each step `<<a+b=c>>`."""
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
