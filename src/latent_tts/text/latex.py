"""LaTeX answers: a canonical form, the same for equal values where possible, and equality by math-verify.

Numbers are read here. Other expressions are read by sympy and math-verify, in a process that starts when the first of
them appears (`guard.py`); if they fail, the answer is unreadable.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from latent_tts.text.guard import Guard
from latent_tts.text.number import (
    MAGNITUDE,
    MAX_LENGTH,
    OTHER_VALUE,
    RAISED_UNIT,
    SPACE,
    STATED,
    is_unit,
    parse_number,
    tidy,
    unwrap,
    write_fraction,
)

EXPRESSIONS = "latent_tts.text.expressions"
MIN_UNIT_LETTERS = 3  # of a unit after a number; shorter words may be variables
MIN_WORD_LETTERS = 4  # of a unit after an expression, and of a bare word in one
RATIONAL = re.compile(r"-?(\d+|\\frac\{\d+\}\{\d+\})")

# how expressions are written, and how math-verify reads them: before units are dropped and words are read
SIGNS = str.maketrans(
    {"\u00d7": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "≤": r"\le ",
     "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "\u222a": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
     "°": r"^\circ "}
)  # fmt: skip
BRACKETS = {r"\langle": "(", r"\rangle": ")", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]"}
NOTATION = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?:[. ]|\\\\)+$", ""),
    (r"\\?%(?=\s*(?:[,;)\]}]|$))", ""),
    (r"(?<!\w)(\d+)C(\d+)(?!\w)", r"\\binom{\1}{\2}"),
    (r"(?<=\d)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(?=\d)", ":"),
    (r"^\(?([A-Z])[).:]\s*$", r"\1"),  # a choice
    (r"\\math(?:rm|it|bf|sf)\s*\{\s*([A-Za-z])\s*\}|\\text(?:rm|it|bf)?\{([ie])\}", r" \1\2"),
    (r"(?<=\d)(?:\s*\^\s*\{?)?(?:\s*\\(?:text|mathrm|rm)\s*)?\{?\s*(?:st|nd|rd|th)[\s}]*$", ""),
    (r"(?<=\d)\s*m([23])(?!\w)", r" m^{\1}"),
    (r"^([^$]*?)\\?\$([^$]*)$", r"\1\2"),  # money, not the start of mathematics
    (STATED, ""),
    (r"^\s*(-?\d*\.\d*)\((\d+)\)\s*$", r"\1\\overline{\2}"),  # `0.1(6)`
    (r"\\varnothing", r"\\emptyset"),
    (r"\\mathbb\s*([A-Z])(?![A-Za-z])", r"\\mathbb{\1}"),
    (r"(\\[lr](?:angle|brace|brack))(?![A-Za-z])", lambda bracket: BRACKETS[bracket[1]]),
    (r"(?:√|\\?\bsqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"√\s*(\d+|\w)", r"\\sqrt{\1}"),
    (r"√\s*(?=[({])", r"\\sqrt"),
)]  # fmt: skip

NAME = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|alpha|beta|gamma"
    r"|phi|omega|lambda)(?![A-Za-z])"
)
BARE_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*(\d+|[A-Za-z](?![A-Za-z]))")
UNIT_AT_END = re.compile(
    rf"(?P<value>.*(?:[\d)}}\]]|\\pi))(?P<gap>(?:{SPACE})?)(?P<unit>[^\W\d_](?:[^\d\\]|{RAISED_UNIT})*)"
)
TEXT_AT_END = re.compile(
    rf"(?P<value>.*[^\s=<>+*/,(\[{{^_~-])(?:\s|~|\\[,;:! ]|/|\\cdot|·)*"
    rf"\\(?:text|textrm|textit|textnormal|mathrm|mathit|mbox)\s*\{{[^{{}}_]*(?:\{{[^{{}}]*\}}[^{{}}]*)*\}}\s*"
    rf"(?:{RAISED_UNIT})?"
)
IN_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
SEVERAL_UNITS = re.compile(r"\d\s*(?!(?:and|or|to)\b)([A-Za-z]+)\.?(?:,?\s+(?:and\s+)?|,)\d[\d.]*\s*([A-Za-z]+)\.?$")
KNOWN_NAME = re.compile(rf"{NAME.pattern}|(?<![A-Za-z])(?:sqrt|infinity|percent)(?![A-Za-z])")
WORD = re.compile(
    rf"(?<![A-Za-z])(?:[A-Za-z][a-z]{{{MIN_WORD_LETTERS - 1},}}|[A-Z][a-z]{{2,}}"
    r"|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)(?![A-Za-z])"
)
WORDS = re.compile(r"(?=.*[A-Za-z]{4}|(?i:yes|no|odd|all|red|one|two|six|ten)\b)[A-Za-z]+(?: [A-Za-z]+)*")
NOT_PLAIN = re.compile(r"[\\{}$=<>^_]")
# answers whose parts math-verify would divide by one another, or drop, in small letters
HALF = r"\s*(?:\\text\s*\{)?\s*([ap])\.?\s*m\b\.?\s*\}?"  # of a day
TEXTS = [(re.compile(pattern), form) for pattern, form in (
    (r"([12]\d{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])|\d{1,2}/\d{1,2}/(?:1\d|20)\d\d)", r"\\text{\1}"),
    (rf"0?(\d{{1,2}}):([0-5]\d){HALF}", r"\\text{\1:\2\3m}"),
    (rf"0?(\d{{1,2}}){HALF}", r"\\text{\1:00\2m}"),
    (r"0?(\d{1,2}):(0\d)", r"\\text{\1:\2}"),
    (r"0*(\d+)\s*(?:r|rem|remainder)\.?\s*0*(\d+)", r"\\text{\1 r \2}"),
)]  # fmt: skip
RATIO = re.compile(r"\d+(?:\s*:\s*\d+){2,}")
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
         "eleven": 11, "twelve": 12, "sixteen": 16}  # fmt: skip
DIGITS = r"(\d[0-9A-Za-z]*|[A-F][0-9A-F]+)"
IN_BASE = re.compile(
    rf"(?:{DIGITS}|\({DIGITS}\)|\\(?:text|mathrm)\{{{DIGITS}\}})"
    rf"_(?:\{{(\d+)\}}|(\d{{1,2}})|\{{?(?:\\(?:text|mathrm)\s*)?\{{?({'|'.join(BASES)})\}}*)"
)
SHORT_UNIT = r"[mgshl](?:\^\{[23]\})?"  # as sympy prints them
IN_SHORT_UNIT = re.compile(rf"(-?)\s*(?:(\d+) {SHORT_UNIT}|\\frac\{{(?:(\d+) )?{SHORT_UNIT}\}}\{{(\d+)\}})")
MISREAD = re.compile(  # not `\log_2 8`, but `1.234.567`, and exponents too large for `parse_number`
    rf"(?<!_)\d(?:{SPACE}|(?:\s|\\q?quad(?![A-Za-z])|\\[lc]?dots(?![A-Za-z]))+)\.?\d|\d\.\d+\.\d|!!|\A[+-]?\s*(?:\d+\.?\d*|\.\d+)[eE][+-]?\d+\Z"
)


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
    if raw is None or len(raw) > MAX_LENGTH or raw.strip().casefold() == "nan":  # a cell without a value
        return None
    text = tidy(raw)
    value = parse_number(text, min_unit_letters=MIN_UNIT_LETTERS)
    if value is not None:
        canonical = write_fraction(value)
    elif (canonical := _other_form(unwrap(text), is_text=text.startswith(r"\text{"))) is None and (
        expression := _expression(text)
    ) is not None:
        canonical = (guard or Guard(EXPRESSIONS)).call("canonical", expression, otherwise=None)
        if canonical is not None and len(canonical) > MAX_LENGTH:  # `2^{2000}`
            canonical = expression
    return canonical if canonical is None or len(canonical) <= MAX_LENGTH else None


def equal_latex(prediction: str, gold: str, guard: Guard | None = None) -> bool:
    """Whether a canonical prediction has the value of a canonical gold answer.

    The form of the gold answer decides how equations are compared: `x+y=5` is right if the gold answer is `5`, but `6`
    is wrong if the gold answer is `2x+3y=6`. A base counts only if both answers have one: `42` is right for `42_{5}`.
    So does a unit of one letter, which may be a variable: `10 m^2` is right for `10`, not for `10 s`.

    Source: math-verify `verify`, with its default settings (decimals are compared to 6 places).
    """
    if prediction == gold:
        return True
    pair = (prediction, gold)
    bases, rationals = ([pattern.fullmatch(text) for text in pair] for pattern in (IN_BASE, RATIONAL))
    if all(bases) or all(rationals) or any(map(RATIO.fullmatch, pair)):  # these have one canonical form
        return False
    if any(bases):
        prediction, gold = (found[1] if found else text for found, text in zip(bases, pair, strict=True))
        return equal_latex(prediction, gold, guard)
    rational, other = pair if rationals[0] else pair[::-1]
    if any(rationals) and (found := IN_SHORT_UNIT.fullmatch(other)):
        sign, whole, upper, lower = found.groups()
        return rational == write_fraction(Fraction(int(f"{sign}{whole or upper or 1}"), int(lower or 1)))
    return (guard or Guard(EXPRESSIONS)).call("equal", prediction, gold, otherwise=False)


def _other_form(text: str, *, is_text: bool) -> str | None:
    """The canonical form of what math-verify would misread; None for anything else.

    These are dates, times, ratios of three or more parts, numbers in another base, quotients with a remainder, and
    phrases with numbers.
    """
    for pattern, form in TEXTS:
        if found := pattern.fullmatch(text.casefold()):
            return found.expand(form)
    if RATIO.fullmatch(text):
        parts = [int(part) for part in text.split(":")]
        return ":".join(str(part // (math.gcd(*parts) or 1)) for part in parts)
    if found := IN_BASE.fullmatch(text):
        digits = (found[1] or found[2] or found[3]).upper().lstrip("0") or "0"
        base = int(found[4] or found[5] or BASES[found[6]])
        with contextlib.suppress(ValueError):  # not digits of such a base
            int(digits, base)
            return digits if base == 10 else f"{digits}_{{{base}}}"
    return _phrase(text, is_text=is_text)


def _phrase(text: str, *, is_text: bool) -> str | None:
    r"""The canonical form of words with numbers, as `July 4`; None for anything else.

    Letters that `\text` says are a text need not look like a word. math-verify would read a product of variables, which
    is equal to `4 July` and to any other order of its letters.
    """
    text = re.sub(r"(?<!\w)(\d+)\s*'\s*(\d+)\s*(?:''|\")?", r"\1 feet \2 inches", IN_TEXT.sub(r"\1", text))
    if NOT_PLAIN.search(text) or MAGNITUDE.search(text) or not re.search(r"\d.*[a-z]{2}|[a-z]{2}.*\d", text, re.I):
        return None
    several = SEVERAL_UNITS.search(text)
    if (several and several[1] == several[2]) or not (several or is_text or _has_words(_without_units(text))):
        return None
    words = re.sub(r"(?<=[A-Za-z0-9])[.,](?=\s|$)", " ", text).casefold().split()
    return rf"\text{{{' '.join(words)}}}"


def _expression(text: str) -> str | None:
    """The text prepared for math-verify; None if it would misread the text.

    It misreads two numbers side by side (it multiplies them) and numbers with an exponent too large for `parse_number`.
    """
    if MAGNITUDE.search(text) and re.search(r"\d", text):
        return None
    text = _rewrite(text.translate(SIGNS), NOTATION)
    if WORDS.fullmatch(text) and not OTHER_VALUE.issuperset(text.casefold().split()):
        text = rf"\text{{{text}}}"  # not a product of variables
    else:
        text = _read_words(_without_units(text))
    text = " ".join(_rewrite(text, VALUES).split())
    return None if not text or MISREAD.search(text) else text


def _rewrite(text: str, rules: Sequence[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text.strip()


def _without_units(text: str) -> str:
    """The text without units at its end, and without those of two numbers in the same one (`5 cm and 6 cm`)."""
    plain = IN_TEXT.sub(r"\1", text)
    if (several := SEVERAL_UNITS.search(plain)) and several[1] == several[2]:
        return re.sub(rf"\s*(?<![A-Za-z]){several[1]}(?![A-Za-z])\.?", "", plain)
    while found := TEXT_AT_END.fullmatch(text):
        text = found["value"]
    found = UNIT_AT_END.fullmatch(text)
    return found["value"] if found and is_unit(found["unit"], MIN_WORD_LETTERS, glued=not found["gap"]) else text


def _read_words(text: str) -> str:
    """The text with names of functions as commands, and words as texts, which are not products of variables."""
    if "\\text" not in text:
        text = NAME.sub(r"\\\1 ", BARE_ROOT.sub(r"\\sqrt{\1}", text))
    if NOT_PLAIN.search(text) or not _has_words(text):
        return text
    parts = (part.strip(" .") for part in text.split(","))
    return ",".join(rf"\text{{{part}}}" if _has_words(part) else part for part in parts)


def _has_words(text: str) -> bool:
    return WORD.search(KNOWN_NAME.sub(" ", text)) is not None


def _repeating(found: re.Match[str]) -> str:
    """The fraction of a repeating decimal."""
    whole, first, again = found.groups()
    digits = int(f"{whole}{first}{again}") - int(f"0{whole}{first}")
    return write_fraction(Fraction(digits, 10 ** len(first) * (10 ** len(again) - 1)))


def _mixed(found: re.Match[str]) -> str:
    whole, upper, lower = found.groups()
    return rf"({whole}+\frac{{{upper}}}{{{lower}}})" if int(upper) < int(lower) else found[0]


DEGREES = r"(?:\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\(?:text)?degree(?![A-Za-z]))"
IN_DEGREES = rf"(\d+(?:\.\d*)?|\.\d+)\s*{DEGREES}"
FUNCTION = r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])\s*(?:\^\s*(?:\{[^{}]*\}|\w)\s*)?(?:\\left\s*)?"
IN_BRACKETS = r"\((?:[^()]|\([^()]*\))*\)|\{(?:[^{}]|\{[^{}]*\})*\}"
FRACTION = r"\\[dtc]?frac\s*"
DIGIT = r"\{?(\d)\}?"  # with a dot over it
# brackets in which commas separate elements, as in `(100,200)`, not `(1,000, 2,000)`
ELEMENTS = rf"(?:\\\{{|[(\[])(?:(?!,(?:{SPACE})|,000)[^()\[\]])*(?:\\\}}|[)\]])"
# the same as `NOTATION`, where units and words have been read
VALUES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\*\*\s*(-?\d+)", r"^{\1}"),
    (r"\*\*", "^"),
    (r"\\(?:nice|s)frac(?![A-Za-z])", r"\\frac"),
    (rf"(?<=[.\d])\s*\\dot\s*{DIGIT}(\d*)\s*\\dot\s*{DIGIT}", r"\\overline{\1\2\3}"),
    (rf"(?<=[.\d])\s*\\dot\s*{DIGIT}", r"\\overline{\1}"),
    (r"(\d*)\.(\d*)\s*\\overline\s*\{\s*(\d+)\s*\}", _repeating),
    (rf"{FRACTION}(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (rf"(\\sqrt\s*\[[^\[\]]*\])\s*(\d)(?!\d|{SPACE}\d)", r"\1{\2}"),
    (rf"\^\s*({FRACTION}(?:\{{[^{{}}]*\}}|\d)\s*(?:\{{[^{{}}]*\}}|\d))", r"^{\1}"),
    (  # math-verify drops the degrees of `\sin 30^\circ`
        rf"({FUNCTION})({IN_BRACKETS}|{IN_DEGREES})",
        lambda found: found[1] + re.sub(IN_DEGREES, r"{(\\frac{\1\\pi}{180})}", found[2]),
    ),
    (DEGREES, r"^\\circ"),
    (
        rf"({ELEMENTS})|(?<![\w.,^])[1-9]\d{{0,2}}(?:,\d{{3}})+(?![\w.]*\d)(?!,\d)",
        lambda found: found[1] or found[0].replace(",", ""),
    ),
    (
        rf"(?<![\w.,^])[1-9]\d{{0,2}}(?:(?:{SPACE}|\{{,\}}|,\s*\\!\s*)\d{{3}})+(?![\w.,]*\d)",
        lambda found: re.sub(r"\D", "", found[0]),
    ),
    (rf"(?<![\w.,^/])(\d+){SPACE}(\d+)\s*/\s*(\d+)(?![\d.])", _mixed),
    (r"(?<=\d)\s*x\s*(?=\d)", r"\\times "),
)]  # fmt: skip
