"""`task=asked`: questions given as texts, without gold answers; `ltts ask` fills them in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from latent_tts.errors import require
from latent_tts.task.jsonl import read_questions
from latent_tts.text.answer import AnswerRule
from latent_tts.types import Question


@dataclass(frozen=True)
class Asked:
    """Questions without gold answers.

    Attributes:
        texts: of the questions.
        answer: how answers are read: `decimal`, `latex` or `words`.
    """

    texts: list[str]
    answer: str = "decimal"

    name = "asked"
    split = None

    def __post_init__(self) -> None:
        ok = isinstance(self.texts, list) and all(isinstance(text, str) for text in self.texts)
        require("task.texts", self.texts, ok, "must be a list of texts")
        _ = self.rule

    @cached_property
    def rule(self) -> AnswerRule:
        """How answers are read."""
        return AnswerRule(self.answer)

    def questions(self) -> list[Question]:
        """The questions in their order; a repeated text gets the id suffix `-2`, `-3`, ...

        Raises:
            UsageError: there are none, or one is empty.
        """
        rows = ((f"task.texts: number {number}", {"question": text}) for number, text in enumerate(self.texts, 1))
        return read_questions(rows, self.rule, None, "task.texts", gold_optional=True)
