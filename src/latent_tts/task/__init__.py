"""Sets of questions, each with a rule for its answers; one option of the group `task` per module."""

from __future__ import annotations

from typing import Protocol

from latent_tts.text.answer import AnswerRule
from latent_tts.types import Question


class Task(Protocol):
    """A set of questions and the rule for its answers."""

    @property
    def name(self) -> str:
        """The name of the task in tables."""
        ...

    @property
    def split(self) -> str | None:
        """The split that the questions belong to; None if the task has no splits."""

    def questions(self) -> list[Question]:
        """The questions, in file order."""
        ...

    @property
    def rule(self) -> AnswerRule:
        """How answers are read and compared."""
        ...
