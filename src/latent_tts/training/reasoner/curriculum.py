"""Shared by the recipes of all families: stages, Protocols, and the text to write after the latents.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from latent_tts.checkpoint.files import LATENT_TOKENS
from latent_tts.errors import check_fields, is_whole, require

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
        hidden_steps: number of leading steps that are not written; None for all.
        dropout: rate of every active dropout module; None keeps the backbone's.
        speed: number of written tokens that each latent compresses (only CoLaR).
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
        own: the modules that the family adds, by the prefix of their tensors in a checkpoint.
    """

    lm: PreTrainedModel
    own: nn.ModuleDict

    def loss(self, questions: list[Question], stage: Stage) -> Tensor:
        """The loss of a batch, a scalar with gradients."""
        ...

    def exact_matches(self, questions: list[Question], stage: Stage) -> int:
        """The number of questions answered exactly; called without gradients and without dropout."""
        ...


class Recipe(Protocol):
    """How reasoners of a family are trained: the stages and the objective.

    Attributes:
        family: the family of the trained checkpoints, as adapters name it.
        words: words in the adapter's prompts and answers that the task's vocabulary lacks (for word-level tokenizers).
        tokens: special tokens that the adapter needs.
        new_tokens: what the rows of those begin from that a model lacks: `mean`, or a token of it.
    """

    family: ClassVar[str]
    words: ClassVar[tuple[str, ...]] = ()
    tokens: ClassVar[tuple[str, ...]] = ()
    new_tokens: str = "mean"

    def stages(self) -> list[Stage]:
        """The stages in order."""
        ...

    def add_own_tensors(self, folder: Path, seed: int) -> None:
        """Add the family's own tensors to a checkpoint, unless it has them (imports torch)."""

    def objective(self, adapter: CheckpointAdapter) -> Objective:
        """Create the model in training with its loss (imports torch)."""
        ...

    def trained_with(self) -> dict[str, Any]:
        """The record `latent_tts` in the trained checkpoint's config; runs with other values warn."""
        return {"latents": self.stages()[-1].latents}

    @property
    def updates(self) -> int:
        """Total number of updates."""
        return sum(stage.updates for stage in self.stages())

    def stage_at(self, update: int) -> Stage:
        """The stage of update number `update`, from 0."""
        for stage in self.stages():
            if update < stage.updates:
                return stage
            update -= stage.updates
        raise IndexError(update)


@dataclass(frozen=True)
class Staged(Recipe):
    """Stages that replace written steps by latents: all steps written, then one step less per stage, then none.

    Attributes:
        written_updates: updates with every step written and no latents.
        stage_updates: updates with the first 1, 2, ... steps hidden.
        final_updates: updates with `latents` latents and no written step.
        final_dropout: dropout rate of those; null keeps the backbone's.
        latents: T of the trained reasoner.
        new_tokens: what embeddings of the latent tokens begin from in a model that lacks them: `mean`, or a token.
    """

    tokens: ClassVar[tuple[str, ...]] = LATENT_TOKENS

    written_updates: int
    stage_updates: Sequence[int]
    final_updates: int
    final_dropout: float | None
    latents: int
    new_tokens: str = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        kinds = dict.fromkeys(("written_updates", "final_updates"), "an integer, 0 or more")
        check_fields("recipe", self, **kinds, final_dropout="a number in [0, 1), or null")
        updates = self.stage_updates
        listed = isinstance(updates, list) and all(is_whole(each) and each >= 0 for each in updates)
        require("recipe.stage_updates", updates, listed, "must be a list of numbers of updates, as in [100,100]")
        whole = is_whole(self.latents)
        least = max(1, self.latents_in(len(updates))) if whole else 1
        allowed = f"must be {least} or more (recipe.stage_updates has {len(updates)} stages)"
        require("model.latents", self.latents, whole and self.latents >= least, allowed)

    def latents_in(self, stage: int) -> int:
        """Number of latents of the stage that hides the first `stage` steps: one per step."""
        return stage

    def stages(self) -> list[Stage]:
        """The stages in order."""
        middle = [Stage(updates, self.latents_in(k), k) for k, updates in enumerate(self.stage_updates, start=1)]
        final = Stage(self.final_updates, self.latents, None, self.final_dropout)
        return [Stage(self.written_updates, 0, 0), *middle, final]


@dataclass(frozen=True)
class Distilled(Staged):
    """Stages with a teacher, which writes every step, and a student with latents; the first stage has no student.

    Attributes:
        teacher_weight: of the teacher's cross-entropy; the student's has weight 1.
        distill_weight: of the distance between their hidden states before the answer.
        distill_loss: `smooth_l1` or `l1`.
        step_loss: weight of the loss by which each latent predicts the result of its step.
    """

    teacher_weight: float
    distill_weight: float
    distill_loss: str
    step_loss: float

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = dict.fromkeys(("teacher_weight", "distill_weight", "step_loss"), "a finite number, 0 or more")
        check_fields("recipe", self, **weights, distill_loss=("smooth_l1", "l1"))


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
