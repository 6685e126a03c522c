"""Sets of questions, each with a rule for its answers; one option of the group `task` per module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from latent_tts.errors import UsageError
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


def has_gold(questions: Sequence[Question]) -> bool:
    """Whether the gold answers of a task's questions are known: either all have one, or none."""
    return questions[0].answer is not None


def require_gold(task: Task, questions: Sequence[Question], why: str) -> None:
    """Raise UsageError unless the questions of a task have gold answers, which `why` says that something needs."""
    if not has_gold(questions):
        raise UsageError(f"task={task.name}: its questions have no gold answers (the field answer); {why}")
