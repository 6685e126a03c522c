"""Answers in LaTeX: one canonical text for equal values where it can be had, equality by math-verify.

What is a number is read here. Other expressions are read by sympy and math-verify, in a process that is started when
the first of them is met (`guard.py`): what these cannot read is unreadable, whatever they raise.
"""

from __future__ import annotations

import re

from latent_tts.text.guard import Guard
from latent_tts.text.number import LONGEST, SPACE, number, tidy, write_fraction

EXPRESSIONS = "latent_tts.text.expressions"
UNIT_LETTERS = 3  # of a word after a number: shorter ones may be variables
RATIONAL = re.compile(r"-?(\d+|\\frac\{\d+\}\{\d+\})")

SIGNS = str.maketrans(
    {"\u00d7": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "≤": r"\le ",
     "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "\u222a": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
     "°": r"^\circ ", "²": "^{2}", "³": "^{3}"}
)  # fmt: skip
SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)(?!\d)")
THOUSANDS = re.compile(rf"(?<![\w.,^])[1-9]\d{{0,2}}(?:(?:{SPACE}|\{{,\}}|,\s*\\!\s*)\d{{3}})+(?![\w.,]*\d)")
MIXED = re.compile(rf"(?<![\w.,^/])(\d+){SPACE}(\d+)\s*/\s*(\d+)(?![\d.])")
FLOAT = re.compile(r"[+-]?\s*(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
SIDE_BY_SIDE = re.compile(rf"\d{SPACE}\.?\d")


def canonical_latex(raw: str | None, guard: Guard | None = None) -> str | None:
    r"""The canonical form of a LaTeX answer: `\frac12`, `0.5`, `1/2` and `\boxed{\dfrac{1}{2}}` agree.

    Where the form is not read back as the same value the answer's own text stands in for it: equal values may then have
    two forms, and are still equal by `equal_latex`. What graders of MATH leave out (a final dot, currency, per cent,
    degrees and other units) is left out here.

    Args:
        raw: the text of an answer; None stands for no answer.
        guard: the run's, whose limits count all of its calls; None takes a new one.

    Returns:
        LaTeX, or None if `raw` is not readable or too large to be written out.

    Source: math-verify `parse`; what is left out: hendrycks/math, `modeling/math_equivalence.py`.
    """
    if raw is None or len(raw) > LONGEST:
        return None
    text = tidy(raw)
    value = number(text, unit_letters=UNIT_LETTERS)
    if value is not None:
        canonical = write_fraction(value)
    else:
        expression = _expression(text)
        canonical = (
            None if expression is None else (guard or Guard(EXPRESSIONS)).call("canonical", expression, otherwise=None)
        )
    return canonical if canonical is None or len(canonical) <= LONGEST else None


def equal_latex(prediction: str, gold: str, guard: Guard | None = None) -> bool:
    """Whether the value of a canonical prediction is that of a canonical gold answer.

    An equation is right where its right side is: the gold answer's form decides, so that `x+y=5` is right where `5` is
    asked for, and `6` wrong where `2x+3y=6` is.

    Source: math-verify `verify`, with its own settings (6 places where a decimal is compared).
    """
    if prediction == gold:
        return True
    if RATIONAL.fullmatch(prediction) and RATIONAL.fullmatch(gold):  # each has one canonical form
        return False
    return (guard or Guard(EXPRESSIONS)).call("equal", prediction, gold, otherwise=False)


def _expression(text: str) -> str | None:
    """The text as math-verify is to read it, None for what it would misread.

    That is two numbers side by side, which it multiplies, and a number whose exponent was too large for `number`.
    """
    text = re.sub(r"\\?%$", "", text.rstrip(". ")).rstrip()
    if text.count("$") == 1:  # money, not the start of mathematics
        text = text.replace("\\$", "").replace("$", "").strip()
    text = text.translate(SIGNS).replace(r"\varnothing", r"\emptyset")
    text = re.sub(r"√\s*(\d+|\w|(?=[({]))", lambda root: rf"\sqrt{{{root[1]}}}" if root[1] else r"\sqrt", text)
    text = SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = MIXED.sub(_mixed, text)
    text = re.sub(r"(?<=\d)\s*x\s*(?=\d)", r"\\times ", text)
    return None if not text or SIDE_BY_SIDE.search(text) or FLOAT.fullmatch(text) else " ".join(text.split())


def _mixed(found: re.Match[str]) -> str:
    whole, upper, lower = found.groups()
    return rf"({whole}+\frac{{{upper}}}{{{lower}}})" if int(upper) < int(lower) else found[0]
