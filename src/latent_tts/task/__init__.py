"""Sets of questions, each with a rule for its answers; one option of the group `task` per module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from latent_tts.errors import UsageError
from latent_tts.text.answer import AnswerRule
from latent_tts.types import Question, text_digest

PACKAGE = __name__.partition(".")[0]


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
        """The questions, in file order; the id of each is the `text_digest` of its text, repeats get `-2`, `-3`, ..."""
        ...

    @property
    def rule(self) -> AnswerRule:
        """How answers are read and compared."""
        ...


def questions_of(task: Task) -> list[Question]:
    """The questions of a task. The cache and the tables know them by their ids, which therefore stand for their texts.

    Raises:
        UsageError: there are none, or a task of another package gives them other ids, or answers in another form than
            predictions have.
    """
    questions = task.questions()
    if not questions:
        raise UsageError(f"task={task.name}: it has no questions")
    if type(task).__module__.partition(".")[0] == PACKAGE:
        return questions
    if len({question.answer is None for question in questions}) > 1:
        raise UsageError(f"task={task.name}: some of its questions have gold answers and some have none")
    seen: set[str] = set()
    for question in questions:
        digest = text_digest(question.text)
        if str(question.id).partition("-")[0] != digest or question.id in seen:
            raise UsageError(
                f"task={task.name}: question {question.quoted} has the id {question.id!r}; it must be {digest!r}, "
                "latent_tts.types.text_digest of its text, and -2, -3, ... is appended in repeats of a text"
            )
        seen.add(question.id)
        if question.answer is not None and question.answer != (form := task.rule.parse(question.answer)):
            raise UsageError(
                f"task={task.name}: question {question.quoted} has the answer {question.answer!r}; it must be in the "
                f"form of predictions, which rule.parse gives: {form!r}"
            )
    return questions


def has_gold(questions: Sequence[Question]) -> bool:
    """Whether the gold answers of a task's questions are known: either all have one, or none."""
    return questions[0].answer is not None


def require_gold(task: Task, questions: Sequence[Question], why: str) -> None:
    """Raise UsageError unless the questions of a task have gold answers, which `why` says that something needs."""
    if not has_gold(questions):
        raise UsageError(f"task={task.name}: its questions have no gold answers (the field answer); {why}")
