"""How the answers of a task are read (raw texts to canonical predictions), compared, and counted as votes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from latent_tts.errors import check_fields, require
from latent_tts.text import latex
from latent_tts.text.guard import Guard
from latent_tts.text.number import MAX_LENGTH, canonical_number, is_close, tidy

QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
AROUND = re.compile(
    r"(?P<mark>\*\*|[\"'`$*])(?P<text>(?:(?!(?P=mark)).)+)(?P=mark)|\\(?:boxed|text|textbf|mathrm)\{(?P<braced>[^{}]+)\}"
)
CHOICE = re.compile(r"\A\(?([a-z])[):]\Z")
RULES = {"decimal": "a number", "latex": "a LaTeX expression with a value", "words": "a text"}


@dataclass(frozen=True)
class AnswerRule:
    """How the answers of a task are read and compared.

    Attributes:
        name: `decimal` (exact decimals), `latex` (values of LaTeX expressions) or `words` (texts, up to
            case, spaces and a final dot).
        tolerance: largest |prediction - gold| that counts as right; None for exact. Only for `decimal`.
    """

    name: str
    tolerance: float | None = None

    def __post_init__(self) -> None:
        require("task.answer", self.name, self.name in RULES, f"must be one of {', '.join(RULES)}")
        check_fields("task", self, tolerance="a finite number, 0 or more, or null for exact")
        require(
            "task.tolerance",
            self.tolerance,
            self.tolerance is None or self.name == "decimal",
            "must be null: it applies only to task.answer=decimal",
        )

    @cached_property
    def guard(self) -> Guard:
        """The process that runs third-party grading code; only `latex` needs it."""
        return Guard(latex.EXPRESSIONS)

    def parse(self, raw: str | None) -> str | None:
        """The canonical form of an answer; None if it cannot be read."""
        if self.name == "decimal":
            return canonical_number(raw)
        return latex.canonical_latex(raw, self.guard) if self.name == "latex" else canonical_words(raw)

    def is_right(self, prediction: str, gold: str) -> bool:
        """Whether a canonical prediction is right."""
        if self.name == "latex":
            return latex.equal_latex(prediction, gold, self.guard)
        return is_close(prediction, gold, self.tolerance)

    def equal(self, one: str, other: str) -> bool:
        """Whether two canonical answers are one vote: they have exactly the same value, compared in both directions."""
        if self.name != "latex" or one == other:
            return one == other
        return latex.equal_latex(one, other, self.guard) and latex.equal_latex(other, one, self.guard)

    @property
    def equal_by_value(self) -> Callable[[str, str], bool] | None:
        """`equal`; None where only equal texts are one vote, so that nothing needs to be compared."""
        return self.equal if self.name == "latex" else None


def canonical_words(raw: str | None) -> str | None:
    """The canonical form of a text: `Every Cat  is a dog.` and `every cat is a dog` agree.

    Args:
        raw: the text of an answer; None for no answer.

    Returns:
        The text in one case, with single spaces, without final dots and marks around the whole: `**B**` and `(B)` are
        `b`; None if it is empty or too long.
    """
    if raw is None or len(raw) > MAX_LENGTH:
        return None
    text = " ".join(unicodedata.normalize("NFC", tidy(raw).casefold()).translate(QUOTES).split()).rstrip(". ")
    while found := AROUND.fullmatch(text):
        text = (found["text"] or found["braced"]).strip(". ")
    return CHOICE.sub(r"\1", text) or None


def shared_forms(answers: Sequence[str | None], equal: Callable[[str, str], bool] | None) -> list[str | None]:
    """Replace each answer by the first member of its class; answers of one class are one vote.

    Equality by value is not transitive, so classes depend on the order in which they are formed. The distinct answers
    are therefore sorted by length, then by characters, and each joins the class of the first leader that it equals, or
    leads a new class. The result does not depend on the given order or on repetitions.

    Args:
        answers: canonical answers of one question; None for unreadable ones, which have no class.
        equal: whether two answers have the same value; None: where they are equal texts.
    """
    if equal is None:  # answers may be many, and below each is compared with all leaders
        return list(answers)
    leaders: list[str] = []
    leader_of: dict[str | None, str | None] = {None: None}
    for answer in sorted({answer for answer in answers if answer is not None}, key=lambda text: (len(text), text)):
        leader = next((leader for leader in leaders if equal(leader, answer)), None)
        if leader is None:
            leaders.append(answer)
        leader_of[answer] = leader or answer
    return [leader_of[answer] for answer in answers]
