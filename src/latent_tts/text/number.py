r"""Numbers as people write them, as exact fractions: `1,234.50`, `10\,000`, `3 1/2`, `-$5`, `50%`, `18 apples`."""

from __future__ import annotations

import re
import unicodedata
from decimal import Context, Decimal, Inexact
from fractions import Fraction

MAX_LENGTH = 500  # characters of an answer; the longest gold answer of MATH-500 has 53
MAX_EXPONENT = 400  # beyond the range of floats; a larger one is not an answer
# more digits than a finite decimal with MAX_LENGTH characters can have: 1/2**k has k, and 2**k has k * log10(2)
EXACT = Context(prec=8 * MAX_LENGTH, traps=[Inexact])

INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
# what NFKC leaves: the ideographic full stop, the Arabic separators, the slashes of fractions
PLAIN_FORMS = str.maketrans("\u3002\u066a\u066b\u066c\u2044\u2215", ".%.,//")
VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # fractions of one sign
# the minus sign and hyphens always mean minus; a dash between two values may mean a range
MINUS = re.compile("[\u02d7\u2010\u2011\u2212\u2796\ufe63]")
DASH = re.compile(r"(^|[(\[{,;:=<>$])\s*[\u2012-\u2015\ufe58]\s*(?=[\d.$\\])")
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n", strict=True))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
SCRIPT = re.compile(f"(?P<raised>[{''.join(RAISED)}]+)|[{''.join(LOWERED)}]+")

SPACE = r"(?:\s|~|\\[,;:! ])+"
SEPARATOR = rf"(?:{SPACE}|,(?:\s*\\!\s*)?|\{{,\}}|[_'\u2019])"
TIMES = r"\s*(?:[xX*\u00d7\u00b7]|\\times(?![A-Za-z])|\\cdot(?![A-Za-z]))\s*"
DIGITS = rf"(?:[1-9]\d{{0,2}}(?P<separator>{SEPARATOR})\d{{3}}(?:(?P=separator)\d{{3}})*|\d+)"
PLAIN = rf"(?:(?P<digits>{DIGITS}(?:\.\d*)?|\.\d+)(?:[eE](?P<exponent>[+-]?\d{{1,9}}))?)"
ARGUMENT = r"\s*(?:\{\s*(\d+)\s*\}|(\d))"
MIXED = rf"(?:(?P<whole>\d+){SPACE})?(?P<upper>\d+)\s*/\s*(?P<lower>\d+)"
CURRENCY = (
    r"(?:(?:US|AU|CA|NZ|HK|[ACRS])?\\?\$|[£¥¢฿\u20a0-\u20cf]|\\pounds|\\euro"
    r"|(?:USD|EUR|GBP|JPY|CNY|INR|Rs\.?)(?=[\s\d]))"
)
RAISED_UNIT = r"\^\s*\{\s*-?[1-3]\s*\}|\^\s*-?[1-3]|(?<=[mtnd])[23](?![A-Za-z])"  # the power of `cm^2`, `s^{-1}`, `m2`
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*{CURRENCY}?\s*(?P<inner_sign>[+-]?)\s*(?:{MIXED}|{PLAIN})"
    rf"(?:{SPACE})?(?P<tail>(?:{CURRENCY}|\\?%|(?P<degrees>°|\^\s*\\circ(?![A-Za-z])|\^\s*\{{\s*\\circ\s*\}})(?:{SPACE})?)?(?P<unit>(?:[^\d\\]|{RAISED_UNIT})*))"
)
UNIT_POWER = re.compile(rf"(?<=[^\W\d_])\.?\s*(?:{RAISED_UNIT})")
WRAPPERS = [
    *(("**", "**"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("{", "}")),
    *((rf"\{name}{{", "}") for name in ("boxed", "text", "textbf", "mathrm", "mathbf", "mbox")),
]
STATED = re.compile(r"^\s*(?:=|≈|\\approx(?![A-Za-z]))\s*(?=\S)")
STYLE = re.compile(r"\\(?:displaystyle|textstyle|bf|rm|it)(?![A-Za-z])")
# how some parts of a number are written, and how `NUMBER` reads them
PLAIN_WRITING = [(re.compile(pattern), plain) for pattern, plain in (
    (rf"\\(?:text|textrm|textit|mathrm|mathit|mbox|rm)\s*\{{([^{{}}\\\d$]*)\$?((?:{RAISED_UNIT})?)\$?\}}", r" \1\2"),
    (r"\s*\\cdot\s*(?=[^\W\d_])", "\u00b7"),
    (rf"\\[dtc]?frac{ARGUMENT}{ARGUMENT}(?!\s*\d)", r" \1\2/\3\4"),
    (rf"(?<=[\d.]){TIMES}10\s*\^\s*(?:\{{\s*([+-]?)\s*(\d{{1,9}})\s*\}}|(\d)(?!\d))", r"e\1\2\3"),
)]  # fmt: skip
# units that are shorter than other words, for texts with variables; `ab` and `st` are not among them
UNIT_NAMES = frozenset(
    re.split(
        r"\s+",
        """nm um µm μm mm cm dm km ft in yd yds mi sq cu ha cc ml mL cl cL dl dL kl kL oz lb lbs mg kg gm ms
        min mins sec secs hr hrs yr yrs mph kph kmh Hz kHz MHz kW MW kWh kJ kN Pa kPa eV rad deg rpm pt pts qt gal cal
        cups feet""",
    )
)
SHORT_UNITS = frozenset("mglLsh")  # in `km/h` and `m/s`; alone they may be variables
SCALES = ("C", "F", "K")
# millions, and Greek letters that are variables: all but those of ohms and micrometres
NO_UNIT = re.compile("M\\Z|.*[\u0370-\u03ff](?<![\u03a9\u03bc])")
# words after a number that change its value or continue a sentence, so they are not units
OTHER_VALUE = frozenset(
    re.split(
        r"\s+",
        """and or to than minus plus times over by half third quarter point squared cubed factorial not
        hundred thousand million billion trillion dozen score hundreds thousands millions billions dozens k b bn mn
        hundredth hundredths thousandth thousandths millionth millionths tenth tenths halves thirds fifths sixths
        eighths trillions jan feb mar apr jun jul aug sep sept oct nov dec january february march april may june july
        august september october november december
        x y z n i e inf nan pi sin cos tan cot sec csc log ln exp sqrt mod deg alpha beta theta infty
        百 千 万 亿 萬 億 半""",
    )
)
MAX_UNIT_WORDS = 4
GLUED_LETTERS = 2  # more letters that a unit needs right after a digit, where letters may be variables
MAGNITUDE = re.compile(r"(?<![A-Za-z])(?:hundred|thousand|million|billion|trillion|dozen)s?(?![A-Za-z])", re.I)


def without_commas(text: str) -> str:
    """The text without commas, as the evaluations of CODI and CoLaR read it: `1,234` is 1234, and `1,8` is 18."""
    return text.replace(",", "")


def tidy(raw: str) -> str:
    """The text on one line in ASCII digits and minus signs: single spaces, fractions and scripts written out."""
    text = VULGAR.sub(_plain_fraction, SCRIPT.sub(_plain_script, INVISIBLE.sub("", raw)))
    text = MINUS.sub("-", unicodedata.normalize("NFKC", text).translate(PLAIN_FORMS))
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text)
    return " ".join(DASH.sub(r"\1-", " ".join(text.split())).split())


def parse_number(text: str, *, min_unit_letters: int = 1) -> Fraction | None:
    r"""The value of a text that is one number, with or without currency, per cent, degrees or a unit.

    Currency and units are ignored, as in graders of GSM8K and MATH: `50%` is 50, `$29.00` is 29. A comma, space, `\,`,
    `'` or `_` between digits must separate groups of three; otherwise the text is unreadable. A fraction after a whole
    number must be proper: `3 1/2` is 7/2, `3 5/2` is unreadable.

    Args:
        text: the result of `tidy`.
        min_unit_letters: a word with fewer letters is no unit, but for `cm` and its like; more than 1 if letters may
            be variables.

    Returns:
        The value; None if the text is not one number.
    """
    if len(text) > MAX_LENGTH:
        return None
    text = unwrap(text)
    for pattern, plain in PLAIN_WRITING:
        text = pattern.sub(plain, text)
    found = NUMBER.fullmatch(text.strip())
    if found is None or (found["sign"] and found["inner_sign"]):
        return None
    glued = found.start("unit") > 0 and found.string[found.start("unit") - 1].isalnum()
    unit = found["unit"] or ""
    if not (found["degrees"] and unit in SCALES) and not is_unit(unit, min_unit_letters, glued=glued):
        return None
    if found["upper"]:
        whole, upper, lower = (int(found[part] or 0) for part in ("whole", "upper", "lower"))
        if lower == 0 or (found["whole"] and upper >= lower):
            return None
        value = whole + Fraction(upper, lower)
    else:
        decimal = Decimal(f"{re.sub(r'[^0-9.]', '', found['digits'])}e{found['exponent'] or 0}")
        places = max(abs(decimal.adjusted()), -int(decimal.as_tuple().exponent))  # before or after the point
        if decimal and places > MAX_EXPONENT:
            return None
        value = Fraction(decimal)
    return -value if "-" in (found["sign"], found["inner_sign"]) else value


def unwrap(text: str) -> str:
    r"""The text without a final dot, `=` in front and enclosing marks such as `$...$` or `\boxed{...}`."""
    before = None
    while text != before:
        before = text
        text = STATED.sub("", STYLE.sub("", text).strip()).removesuffix(".").rstrip()
        for left, right in WRAPPERS:
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                inside = text[len(left) : -len(right)].strip()
                text = inside if right != "}" or closing(text, len(left) - 1) == len(text) else text
    return text


def closing(text: str, start: int) -> int | None:
    """The end of the group that the brace at a place of a text starts; None if there is none."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place + 1
    return None


def is_unit(text: str, min_letters: int, *, glued: bool = False) -> bool:
    """Whether a text after a number is nothing, or a unit: `cm^2`, `km/h`, `red apples`, `(apples)`.

    Args:
        text: what follows the number.
        min_letters: as `min_unit_letters` of `parse_number`.
        glued: whether it follows a digit without a space, as the variables of `6xyz` do.
    """
    is_rate = "/" in text or re.search(r"\^\s*\{?-", text) is not None
    text = UNIT_POWER.sub("", text).strip(" .")
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    if (found := re.match(r"/([^\W\d_]+)", text)) and (len(found[1]) > 2 or found[1] in UNIT_NAMES):
        text = text[1:]  # `$5/hour`
    words = re.split(r"[\s/*·-]+", text) if text else []
    if len(words) > MAX_UNIT_WORDS:
        return False
    is_rate = is_rate and bool(words) and words[0] in UNIT_NAMES | SHORT_UNITS
    for place, word in enumerate(words):
        name = word.replace(".", "").lstrip("°")
        if not name.isalpha() or NO_UNIT.match(name) or OTHER_VALUE & {word.casefold(), name.casefold()}:
            return False
        letters = min_letters + (GLUED_LETTERS if glued and place == 0 and min_letters > 1 else 0)
        if not (len(name) >= letters or name in UNIT_NAMES or (is_rate and name in SHORT_UNITS)):
            return False
    return True


def _plain_fraction(found: re.Match[str]) -> str:
    upper, _, lower = unicodedata.normalize("NFKC", found[0]).partition("\u2044")
    return rf" \frac{{{upper}}}{{{lower}}}"


def _plain_script(found: re.Match[str]) -> str:
    mark, signs = ("^", RAISED) if found["raised"] else ("_", LOWERED)
    return f"{mark}{{{''.join(signs[sign] for sign in found[0])}}}"


def canonical_number(raw: str | None) -> str | None:
    """The canonical form of a number: `2.0`, `2` and `2.` agree, so do `1,234` and `$1234`, `1e3` and `1000`.

    Args:
        raw: the text of an answer; None for no answer.

    Returns:
        Plain decimal digits without exponent or trailing zeros; None if `raw` is not one number, or its decimals are
        infinite.
    """
    value = None if raw is None or len(raw) > MAX_LENGTH else parse_number(tidy(raw))
    if value is None:
        return None
    try:
        return f"{EXACT.divide(Decimal(value.numerator), Decimal(value.denominator)):f}"
    except Inexact:
        return None


def write_fraction(value: Fraction) -> str:
    r"""LaTeX of a fraction, as `-\frac{1}{2}`, or of an integer, as `-3`."""
    if value.denominator == 1:
        return str(value.numerator)
    return rf"{'-' * (value < 0)}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def is_close(prediction: str, gold: str, tolerance: float | None) -> bool:
    """Whether two canonical numbers are equal, or differ by at most `tolerance`."""
    if tolerance is None:
        return prediction == gold
    return abs(Fraction(prediction) - Fraction(gold)) <= Fraction(str(tolerance))
