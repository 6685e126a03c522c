"""Raw answer strings to canonical predictions: exact decimals (never floats), words, LaTeX."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from latent_tts.errors import bad_value, is_number
from latent_tts.text import latex

RULES = {"decimal": "a number", "latex": "a LaTeX expression of a value", "words": "a text"}


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

    def parse(self, raw: str | None) -> str | None:
        """The canonical form of a raw answer, None if it cannot be read."""
        if self.name == "decimal":
            return canonical_number(raw)
        return latex.canonical_latex(raw) if self.name == "latex" else canonical_words(raw)

    def equal(self, prediction: str, gold: str) -> bool:
        """Whether a canonical prediction is right."""
        if self.name == "latex":
            return latex.equal_latex(prediction, gold)
        return close(prediction, gold, self.tolerance)


def canonical_number(raw: str | None) -> str | None:
    """The canonical form of a number: `2.0`, `2` and `2.` agree, so do `1,234` and `1234`, `1e3` and `1000`.

    Args:
        raw: the text of an answer; None stands for no answer.

    Returns:
        Plain decimal digits without exponent or trailing zeros, or None if `raw` is not one finite number.
    """
    if raw is None:
        return None
    try:
        value = Decimal(raw.strip().replace(",", ""))
    except InvalidOperation:
        return None
    if not value.is_finite() or abs(value.adjusted()) > 400:  # beyond any float: a runaway exponent, not an answer
        return None
    if value == 0:
        return "0"
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def close(prediction: str, gold: str, tolerance: float | None) -> bool:
    """Whether two canonical numbers are equal, or no further apart than `tolerance`."""
    if tolerance is None:
        return prediction == gold
    return abs(Decimal(prediction) - Decimal(gold)) <= Decimal(str(tolerance))


def canonical_words(raw: str | None) -> str | None:
    """The canonical form of a text: `Every Cat  is a dog.` and `every cat is a dog` agree.

    Args:
        raw: the text of an answer; None stands for no answer.

    Returns:
        The text in one case, with single spaces and without final dots; None if nothing is left.
    """
    return " ".join((raw or "").casefold().split()).rstrip(". ") or None
