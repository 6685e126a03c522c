"""How a task's answers are read and compared: raw texts to canonical predictions, and which of these are equal."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from latent_tts.errors import bad_value, is_number
from latent_tts.text import latex
from latent_tts.text.guard import Guard
from latent_tts.text.number import LONGEST, canonical_number, close, tidy

RULES = {"decimal": "a number", "latex": "a LaTeX expression of a value", "words": "a text"}


class AnswerFormat(Protocol):
    """Where a family of reasoners writes its answers, of `latent_tts.model.ModelAdapter`."""

    def answer_span(self, answer_text: str) -> str | None:
        """The part of an answer's text that holds the answer, unchanged; None if there is none."""

    def raw_answer(self, answer_text: str) -> str | None:
        """The number in an answer's text as the family's own evaluation reads it; None if there is none."""


@dataclass(frozen=True)
class AnswerRule:
    """How a task's answers are read and compared.

    Attributes:
        name: `decimal` (exact decimals), `latex` (values of LaTeX expressions) or `words` (texts, whatever their
            case, spaces and final dot).
        tolerance: largest |prediction - gold| that counts as right; None is exact. For `decimal` alone.
    """

    name: str
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise bad_value("task.answer", self.name, f"one of {', '.join(RULES)}")
        if self.tolerance is not None and not (is_number(self.tolerance) and self.tolerance >= 0):
            raise bad_value("task.tolerance", self.tolerance, "0 or more, or null for exact")
        if self.tolerance is not None and self.name != "decimal":
            raise bad_value("task.tolerance", self.tolerance, f"null, since task.answer={self.name} is no number")

    @property
    def wanted(self) -> str:
        """What an answer has to be, as an error says it."""
        return RULES[self.name]

    @cached_property
    def guard(self) -> Guard:
        """Third-party grading code, which `latex` alone needs, and what it has given up."""
        return Guard(latex.EXPRESSIONS)

    @property
    def given_up(self) -> int:
        """How many answers and comparisons had no result within their limits: they count as unreadable or wrong."""
        return len(self.guard.given_up)

    def read(self, answer_text: str, family: AnswerFormat) -> str | None:
        """The canonical form of the answer in a generated text, None if it cannot be read.

        Numbers are read as the family's own evaluation does, other answers from the text unchanged.
        """
        where = family.raw_answer if self.name == "decimal" else family.answer_span
        return self.parse(where(answer_text))

    def parse(self, raw: str | None) -> str | None:
        """The canonical form of an answer, None if it cannot be read."""
        if self.name == "decimal":
            return canonical_number(raw)
        return latex.canonical_latex(raw, self.guard) if self.name == "latex" else canonical_words(raw)

    def is_right(self, prediction: str, gold: str) -> bool:
        """Whether a canonical prediction is right."""
        if self.name == "latex":
            return latex.equal_latex(prediction, gold, self.guard)
        return close(prediction, gold, self.tolerance)

    def equal(self, one: str, other: str) -> bool:
        """Whether two canonical answers have one value, and so are one vote: exactly, and in both directions."""
        if self.name != "latex" or one == other:
            return one == other
        return latex.equal_latex(one, other, self.guard) and latex.equal_latex(other, one, self.guard)


def canonical_words(raw: str | None) -> str | None:
    """The canonical form of a text: `Every Cat  is a dog.` and `every cat is a dog` agree.

    Args:
        raw: the text of an answer; None stands for no answer.

    Returns:
        The text in one case, with single spaces and without final dots; None if nothing is left, or too much.
    """
    if raw is None or len(raw) > LONGEST:
        return None
    return " ".join(unicodedata.normalize("NFC", tidy(raw).casefold()).split()).rstrip(". ") or None
