"""LaTeX answers: a canonical form, the same for equal values where possible, and equality by math-verify.

Numbers are read here. Other expressions are read by sympy and math-verify, in a process that starts when the first of
them appears (`guard.py`); if they fail, the answer is unreadable.
"""

from __future__ import annotations

import contextlib
import math
import re
from fractions import Fraction

from latent_tts.text.guard import Guard
from latent_tts.text.number import MAGNITUDE, MAX_LENGTH, OTHER_VALUE, SPACE, parse_number, tidy, unwrap, write_fraction

EXPRESSIONS = "latent_tts.text.expressions"
MIN_UNIT_LETTERS = 3  # of a unit after a number; shorter words may be variables
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
SIDE_BY_SIDE = re.compile(rf"(?<!_)\d{SPACE}\.?\d|\d\.\d+\.\d")  # not in `\log_2 8`, but in `1.234.567`
REPEATING = re.compile(
    r"(\d*)\.(\d*)\s*\\(?:overline\s*\{\s*(\d+)\s*\}|dot\s*\{?(\d)\}?(?:(\d*)\s*\\dot\s*\{?(\d)\}?)?)"
)
WORDS = re.compile(r"(?=.*[A-Za-z]{4}|(?i:yes)\b)[A-Za-z]+(?: [A-Za-z]+)*")
SHORT_ROOT = re.compile(rf"(\\sqrt\s*\[[^\[\]]*\])\s*(\d)(?!\d|{SPACE}\d)")
ROOT_OF_BRACKETS = re.compile(r"(?:√|\\?\bsqrt)\s*\(([^()]*)\)")
BRACKETS = {r"\langle": "(", r"\rangle": ")", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]"}
BLACKBOARD = re.compile(r"\\mathbb\s*([A-Z])(?![A-Za-z])")
BRACKET = re.compile(r"(\\[lr](?:angle|brace|brack))(?![A-Za-z])")
DEGREES = re.compile(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|\\textdegree(?![A-Za-z])")
FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])\s*(?:\^\s*(?:\{[^{}]*\}|\w)\s*)?(?:\\left\s*)?")
IN_DEGREES = re.compile(rf"(\d+(?:\.\d*)?|\.\d+)\s*(?:{DEGREES.pattern})")
# answers whose parts math-verify would divide by one another, or drop
TIME = re.compile(r"(\d{1,2}):([0-5]\d)\s*(?:(?:\\text\s*\{)?\s*([ap])\.?\s*m\b\.?\s*\}?)?", re.IGNORECASE)
RATIO = re.compile(r"\d+(?:\s*:\s*\d+){2,}")
IN_BASE = re.compile(r"(\d[0-9A-Za-z]*)_(?:\{(\d+)\}|(\d{1,2}))")


def canonical_latex(raw: str | None, guard: Guard | None = None) -> str | None:
    r"""The canonical form of a LaTeX answer: `\frac12`, `0.5`, `1/2` and `\boxed{\dfrac{1}{2}}` agree.

    If the canonical form is not read back as the same value, the text of the answer is used instead; equal values may
    then have two forms, which `equal_latex` still finds equal. As in graders of MATH, a final dot, currency, per cent,
    degrees and other units are ignored.

    Args:
        raw: the text of an answer; None for no answer.
        guard: that of the run, whose limits apply to all of its calls; None for a new one.

    Returns:
        LaTeX; None if `raw` cannot be read or its value is too large to be written out.

    Source: math-verify `parse`; ignored parts: hendrycks/math, `modeling/math_equivalence.py`.
    """
    if raw is None or len(raw) > MAX_LENGTH:
        return None
    text = tidy(raw)
    value = parse_number(text, min_unit_letters=MIN_UNIT_LETTERS)
    if value is not None:
        canonical = write_fraction(value)
    elif (canonical := _other_form(unwrap(text))) is None and (expression := _expression(text)) is not None:
        canonical = (guard or Guard(EXPRESSIONS)).call("canonical", expression, otherwise=None)
    return canonical if canonical is None or len(canonical) <= MAX_LENGTH else None


def equal_latex(prediction: str, gold: str, guard: Guard | None = None) -> bool:
    """Whether a canonical prediction has the value of a canonical gold answer.

    The form of the gold answer decides how equations are compared: `x+y=5` is right if the gold answer is `5`, but `6`
    is wrong if the gold answer is `2x+3y=6`. A base counts only if both answers have one: `42` is right for `42_{5}`.

    Source: math-verify `verify`, with its default settings (decimals are compared to 6 places).
    """
    if prediction == gold:
        return True
    if RATIONAL.fullmatch(prediction) and RATIONAL.fullmatch(gold):  # rationals have one canonical form
        return False
    if RATIO.fullmatch(prediction) or RATIO.fullmatch(gold):
        return False
    bases = IN_BASE.fullmatch(prediction), IN_BASE.fullmatch(gold)
    if all(bases):
        return False
    if bases[0] or bases[1]:
        prediction, gold = (found[1] if found else text for found, text in zip(bases, (prediction, gold), strict=True))
        return equal_latex(prediction, gold, guard)
    return (guard or Guard(EXPRESSIONS)).call("equal", prediction, gold, otherwise=False)


def _other_form(text: str) -> str | None:
    """The canonical form of a time, a ratio of three or more parts, or a number in another base; None if it is none."""
    if (found := TIME.fullmatch(text)) and (found[3] or found[2].startswith("0")):
        half = f"{found[3].lower()}m" if found[3] else ""
        return rf"\text{{{int(found[1])}:{found[2]}{half}}}"
    if RATIO.fullmatch(text):
        parts = [int(part) for part in text.split(":")]
        return ":".join(str(part // (math.gcd(*parts) or 1)) for part in parts)
    if found := IN_BASE.fullmatch(text):
        digits, base = found[1].upper().lstrip("0") or "0", int(found[2] or found[3])
        with contextlib.suppress(ValueError):  # not digits of such a base
            int(digits, base)
            return digits if base == 10 else f"{digits}_{{{base}}}"
    return None


def _expression(text: str) -> str | None:
    """The text prepared for math-verify; None if it would misread the text.

    It misreads two numbers side by side (it multiplies them) and numbers with an exponent too large for `parse_number`.
    """
    if MAGNITUDE.search(text) and re.search(r"\d", text):
        return None
    text = re.sub(r"\\?%(?=\s*(?:[,;)\]}]|$))", "", re.sub(r"(?:[. ]|\\\\)+$", "", text)).rstrip()
    if text.count("$") == 1:  # money, not the start of mathematics
        text = text.replace("\\$", "").replace("$", "").strip()
    text = text.translate(SIGNS).replace(r"\varnothing", r"\emptyset")
    text = BLACKBOARD.sub(r"\\mathbb{\1}", text)
    text = BRACKET.sub(lambda bracket: BRACKETS[bracket[1]], text)
    text = ROOT_OF_BRACKETS.sub(r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*(\d+|\w|(?=[({]))", lambda root: rf"\sqrt{{{root[1]}}}" if root[1] else r"\sqrt", text)
    if WORDS.fullmatch(text) and not OTHER_VALUE.issuperset(text.casefold().split()):
        text = rf"\text{{{text}}}"  # not a product of variables
    text = REPEATING.sub(_repeating, text)
    text = SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = SHORT_ROOT.sub(r"\1{\2}", text)
    text = DEGREES.sub(r"^\\circ", _in_radians(text))
    text = THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = MIXED.sub(_mixed, text)
    text = re.sub(r"(?<=\d)\s*x\s*(?=\d)", r"\\times ", text)
    return None if not text or SIDE_BY_SIDE.search(text) or FLOAT.fullmatch(text) else " ".join(text.split())


def _repeating(found: re.Match[str]) -> str:
    """The fraction of a repeating decimal."""
    whole, first, again = found[1], found[2], found[3] or "".join(filter(None, found.group(4, 5, 6)))
    value = Fraction(
        int((whole + first + again) or 0) - int((whole + first) or 0), 10 ** len(first) * (10 ** len(again) - 1)
    )
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _in_radians(text: str) -> str:
    r"""The text with degrees in arguments of functions as radians; math-verify drops the degrees of `\sin 30^\circ`."""
    written, end = "", 0
    for function in FUNCTION.finditer(text):
        start = function.end()
        if start < end:
            continue
        stop = closing(text, start)
        if stop is None:
            number = IN_DEGREES.match(text, start)
            stop = number.end() if number else start
        written += text[end:start] + IN_DEGREES.sub(r"{(\\frac{\1\\pi}{180})}", text[start:stop])
        end = stop
    return written + text[end:]


def closing(text: str, start: int, opening: str = "({", ending: str = ")}") -> int | None:
    """The end of the group that a bracket at a place of a text starts; None if there is none."""
    depth = 0
    for place in range(start, len(text) if text[start : start + 1] in list(opening) else start):
        depth += (text[place] in opening) - (text[place] in ending)
        if depth == 0:
            return place + 1
    return None


def _mixed(found: re.Match[str]) -> str:
    whole, upper, lower = found.groups()
    return rf"({whole}+\frac{{{upper}}}{{{lower}}})" if int(upper) < int(lower) else found[0]
