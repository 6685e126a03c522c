"""Sets of questions and their rules for answers; one option of the group `task` per module."""

from __future__ import annotations

from typing import Protocol

from latent_tts.text.answer import AnswerRule
from latent_tts.types import Question


class Task(Protocol):
    """A set of questions and its rule for answers."""

    @property
    def name(self) -> str:
        """What tables call the task."""
        ...

    @property
    def split(self) -> str | None:
        """Which part of the task's questions these are."""

    def questions(self) -> list[Question]:
        """The questions, in file order."""
        ...

    @property
    def rule(self) -> AnswerRule:
        """How its answers are read and compared."""
        ...
