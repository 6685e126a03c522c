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
RATIONAL = re.compile(r"-?(\d+|\\frac\{\d+\}\{\d+\})")

SIGNS = str.maketrans(
    {"\u00d7": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "≤": r"\le ",
     "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "\u222a": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
     "°": r"^\circ "}
)  # fmt: skip
MIN_WORD_LETTERS = 4  # of a unit after an expression, and of a bare word in one
SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)(?!\d)")
RAISED_FRACTION = re.compile(r"\^\s*(\\[dtc]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d))")
COMMA_GROUPS = re.compile(r"(?<![\w.,^])[1-9]\d{0,2}(?:,\d{3})+(?![\w.]*\d)(?!,\d)")
THOUSANDS = re.compile(rf"(?<![\w.,^])[1-9]\d{{0,2}}(?:(?:{SPACE}|\{{,\}}|,\s*\\!\s*)\d{{3}})+(?![\w.,]*\d)")
MIXED = re.compile(rf"(?<![\w.,^/])(\d+){SPACE}(\d+)\s*/\s*(\d+)(?![\d.])")
FLOAT = re.compile(r"[+-]?\s*(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
APART = r"(?:\s|\\q?quad(?![A-Za-z])|\\[lc]?dots(?![A-Za-z]))+"
SIDE_BY_SIDE = re.compile(  # not in `\log_2 8`, but in `1.234.567`
    rf"(?<!_)\d(?:{SPACE}|{APART})\.?\d|\d\.\d+\.\d|!!"
)
REPEATING = re.compile(
    r"(\d*)\.(\d*)\s*\\(?:overline\s*\{\s*(\d+)\s*\}|dot\s*\{?(\d)\}?(?:(\d*)\s*\\dot\s*\{?(\d)\}?)?)"
)
ORDINAL = re.compile(r"(?<=\d)(?:\s*\^\s*\{?)?(?:\s*\\(?:text|mathrm|rm)\s*)?\{?\s*(?:st|nd|rd|th)[\s}]*$")
CHOICE = re.compile(r"^\(?([A-Z])[).:]$")
CHOOSE = re.compile(r"(?<!\w)(\d+)C(\d+)(?!\w)")
FEET = re.compile(r"(?<!\w)(\d+)\s*'\s*(\d+)\s*(?:''|\")?")
TO = re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(?=\d)")
METRES = re.compile(r"(?<=\d)\s*m([23])(?!\w)")
LETTER = re.compile(r"\\math(?:rm|it|bf|sf)\s*\{\s*([A-Za-z])\s*\}|\\text(?:rm|it|bf)?\{([ie])\}")
NAME = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|alpha|beta|gamma"
    r"|phi|omega|lambda)(?![A-Za-z])"
)
BARE_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*(\d+|[A-Za-z](?![A-Za-z]))")
TEXT_AT_END = re.compile(
    rf"(?P<value>.*[^\s=<>+*/,(\[{{^_~-])(?:\s|~|\\[,;:! ]|/|\\cdot|·)*"
    rf"\\(?:text|textrm|textit|textnormal|mathrm|mathit|mbox)\s*\{{[^{{}}_]*(?:\{{[^{{}}]*\}}[^{{}}]*)*\}}\s*"
    rf"(?:{RAISED_UNIT})?"
)
UNIT_AT_END = re.compile(
    rf"(?P<value>.*(?:[\d)}}\]]|\\pi))(?P<gap>(?:{SPACE})?)(?P<unit>[^\W\d_](?:[^\d\\]|{RAISED_UNIT})*)"
)
IN_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
SEVERAL_UNITS = re.compile(r"\d\s*(?!(?:and|or|to)\b)([A-Za-z]+)\.?(?:,?\s+(?:and\s+)?|,)\d[\d.]*\s*([A-Za-z]+)\.?$")
KNOWN_NAME = re.compile(rf"{NAME.pattern}|(?<![A-Za-z])(?:sqrt|infinity|percent)(?![A-Za-z])")
WORD = re.compile(
    rf"(?<![A-Za-z])(?:[A-Za-z][a-z]{{{MIN_WORD_LETTERS - 1},}}|[A-Z][a-z]{{2,}}"
    r"|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)(?![A-Za-z])"
)
NOT_PLAIN = re.compile(r"[\\{}$=<>^_]")
DATE = re.compile(r"[12]\d{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])|\d{1,2}/\d{1,2}/(?:1\d|20)\d\d")
WORDS = re.compile(r"(?=.*[A-Za-z]{4}|(?i:yes|no|odd|all|red|one|two|six|ten)\b)[A-Za-z]+(?: [A-Za-z]+)*")
SHORT_ROOT = re.compile(rf"(\\sqrt\s*\[[^\[\]]*\])\s*(\d)(?!\d|{SPACE}\d)")
ROOT_OF_BRACKETS = re.compile(r"(?:√|\\?\bsqrt)\s*\(([^()]*)\)")
BRACKETS = {r"\langle": "(", r"\rangle": ")", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]"}
BLACKBOARD = re.compile(r"\\mathbb\s*([A-Z])(?![A-Za-z])")
BRACKET = re.compile(r"(\\[lr](?:angle|brace|brack))(?![A-Za-z])")
DEGREES = re.compile(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|\\textdegree(?![A-Za-z])")
FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])\s*(?:\^\s*(?:\{[^{}]*\}|\w)\s*)?(?:\\left\s*)?")
IN_DEGREES = re.compile(rf"(\d+(?:\.\d*)?|\.\d+)\s*(?:{DEGREES.pattern})")
# answers whose parts math-verify would divide by one another, or drop
TIME = re.compile(r"(\d{1,2})(?::([0-5]\d))?\s*(?:(?:\\text\s*\{)?\s*([ap])\.?\s*m\b\.?\s*\}?)?", re.IGNORECASE)
REMAINDER = re.compile(r"(\d+)\s*(?:r|R|rem|[Rr]emainder)\.?\s*(\d+)")
RATIO = re.compile(r"\d+(?:\s*:\s*\d+){2,}")
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
BASES |= {"eleven": 11, "twelve": 12, "sixteen": 16}
DIGITS = r"(\d[0-9A-Za-z]*|[A-F][0-9A-F]+)"
IN_BASE = re.compile(
    rf"(?:{DIGITS}|\({DIGITS}\)|\\(?:text|mathrm)\{{{DIGITS}\}})"
    rf"_(?:\{{(\d+)\}}|(\d{{1,2}})|\{{?(?:\\(?:text|mathrm)\s*)?\{{?({'|'.join(BASES)})\}}*)"
)
SHORT_UNIT = r"[mgshl](?:\^\{[23]\})?"  # as sympy prints them
IN_SHORT_UNIT = re.compile(rf"(-?)\s*(?:(\d+) {SHORT_UNIT}|\\frac\{{(?:(\d+) )?{SHORT_UNIT}\}}\{{(\d+)\}})")


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
    if RATIONAL.fullmatch(gold) and (found := IN_SHORT_UNIT.fullmatch(prediction)):
        return _without_unit(found) == gold
    if RATIONAL.fullmatch(prediction) and (found := IN_SHORT_UNIT.fullmatch(gold)):
        return _without_unit(found) == prediction
    return (guard or Guard(EXPRESSIONS)).call("equal", prediction, gold, otherwise=False)


def _without_unit(found: re.Match[str]) -> str:
    sign, whole, upper, lower = found.groups()
    return write_fraction(Fraction(int(f"{sign}{whole or upper or 1}"), int(lower or 1)))


def _other_form(text: str, *, is_text: bool) -> str | None:
    """The canonical form of what math-verify would misread; None for anything else.

    These are dates, times, ratios of three or more parts, numbers in another base, quotients with a remainder, and
    phrases with numbers.
    """
    if DATE.fullmatch(text):
        return rf"\text{{{text}}}"
    if (found := TIME.fullmatch(text)) and (found[3] or (found[2] or "").startswith("0")):
        half = f"{found[3].lower()}m" if found[3] else ""
        return rf"\text{{{int(found[1])}:{found[2] or '00'}{half}}}"
    if RATIO.fullmatch(text):
        parts = [int(part) for part in text.split(":")]
        return ":".join(str(part // (math.gcd(*parts) or 1)) for part in parts)
    if found := IN_BASE.fullmatch(text):
        digits = (found[1] or found[2] or found[3]).upper().lstrip("0") or "0"
        base = int(found[4] or found[5] or BASES[found[6]])
        with contextlib.suppress(ValueError):  # not digits of such a base
            int(digits, base)
            return digits if base == 10 else f"{digits}_{{{base}}}"
    if found := REMAINDER.fullmatch(text):
        return rf"\text{{{int(found[1])} r {int(found[2])}}}"
    return _phrase(text, is_text=is_text)


def _expression(text: str) -> str | None:
    """The text prepared for math-verify; None if it would misread the text.

    It misreads two numbers side by side (it multiplies them) and numbers with an exponent too large for `parse_number`.
    """
    if MAGNITUDE.search(text) and re.search(r"\d", text):
        return None
    text = re.sub(r"\\?%(?=\s*(?:[,;)\]}]|$))", "", re.sub(r"(?:[. ]|\\\\)+$", "", text)).rstrip()
    text = CHOICE.sub(r"\1", TO.sub(":", CHOOSE.sub(r"\\binom{\1}{\2}", text)))
    text = METRES.sub(r" m^{\1}", ORDINAL.sub("", LETTER.sub(r" \1\2", text).strip()))
    if text.count("$") == 1:  # money, not the start of mathematics
        text = text.replace("\\$", "").replace("$", "").strip()
    text = STATED.sub("", text)
    if re.fullmatch(r"-?\d*\.\d*\(\d+\)", text):  # `0.1(6)`
        text = text.replace("(", r"\overline{").replace(")", "}")
    text = text.translate(SIGNS).replace(r"\varnothing", r"\emptyset")
    text = BLACKBOARD.sub(r"\\mathbb{\1}", text)
    text = BRACKET.sub(lambda bracket: BRACKETS[bracket[1]], text)
    text = ROOT_OF_BRACKETS.sub(r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*(\d+|\w|(?=[({]))", lambda root: rf"\sqrt{{{root[1]}}}" if root[1] else r"\sqrt", text)
    if WORDS.fullmatch(text) and not OTHER_VALUE.issuperset(text.casefold().split()):
        text = rf"\text{{{text}}}"  # not a product of variables
    else:
        text = _read_words(_without_units(text))
    text = re.sub(r"\*\*\s*(-?\d+)", r"^{\1}", text).replace("**", "^")
    text = REPEATING.sub(_repeating, re.sub(r"\\(?:nice|s)frac(?![A-Za-z])", r"\\frac", text))
    text = SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = RAISED_FRACTION.sub(r"^{\1}", SHORT_ROOT.sub(r"\1{\2}", text))
    text = DEGREES.sub(r"^\\circ", _in_radians(text))
    text = THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), _join_groups(text))
    text = MIXED.sub(_mixed, text)
    text = re.sub(r"(?<=\d)\s*x\s*(?=\d)", r"\\times ", text)
    return None if not text or SIDE_BY_SIDE.search(text) or FLOAT.fullmatch(text) else " ".join(text.split())


def _phrase(text: str, *, is_text: bool) -> str | None:
    r"""The canonical form of words with numbers, as `July 4`; None for anything else.

    Letters that `\text` says are a text need not look like a word. math-verify would read a product of variables, which
    is equal to `4 July` and to any other order of its letters.
    """
    text = IN_TEXT.sub(r"\1", FEET.sub(r"\1 feet \2 inches", text))
    if NOT_PLAIN.search(text) or MAGNITUDE.search(text) or not re.search(r"\d.*[a-z]{2}|[a-z]{2}.*\d", text, re.I):
        return None
    several = SEVERAL_UNITS.search(text)
    if (several and several[1] == several[2]) or not (several or is_text or _has_words(_without_units(text))):
        return None
    words = re.sub(r"(?<=[A-Za-z0-9])[.,](?=\s|$)", " ", text).casefold().split()
    return rf"\text{{{' '.join(words)}}}"


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


def _join_groups(text: str) -> str:
    r"""The text without commas that separate thousands.

    Within brackets they separate elements, as in `(100,200)`, unless elements are separated by a comma and a space, as
    in `(1,000, 2,000)`, or a group is `000`.
    """

    def join(found: re.Match[str]) -> str:
        start, end = _enclosing(text, found.start())
        inside = start >= 0
        spaced = bool(re.search(rf",(?:{SPACE})", text[max(start, 0) : end]))
        return found[0].replace(",", "") if not inside or spaced or ",000" in found[0] else found[0]

    return COMMA_GROUPS.sub(join, text)


def _enclosing(text: str, place: int) -> tuple[int, int]:
    """The innermost brackets around a place, braces of a set included; (-1, length) if there are none."""
    opened: list[int] = []
    for found in re.finditer(r"\\[{}]|[()\[\]]", text):
        if found[0] in ("(", "[", r"\{"):
            opened.append(found.start())
        elif opened:
            start = opened.pop()
            if start < place < found.start():
                return start, found.start()
    return -1, len(text)


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
