"""Answers in LaTeX: one canonical text for equal values where it can be had, equality by math-verify.

sympy and math-verify are imported when the first answer needs them.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Result = TypeVar("Result")

LONGEST = 500  # characters of an answer; the longest gold answer of MATH-500 has 53
LARGEST = 10_000  # bits of a number that is written out
MOST_TERMS = 1000  # of an expression that is multiplied out
SECONDS = 5  # for one answer or one comparison: the last resort, since the limits above catch what is known to be slow

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
DELIMITER = re.compile(r"(?<!\\)(\$|\\\(|\\\[)")


def canonical_latex(raw: str | None) -> str | None:
    r"""The canonical form of a LaTeX answer: `\frac12`, `0.5`, `1/2` and `\boxed{\dfrac{1}{2}}` agree.

    Where the form is not read back as the same value the answer's own text stands in for it: equal values may then be
    two votes, and are still equal by `equal_latex`. Signs that graders of MATH leave out (a final dot, dollars, per
    cent, degrees and other units) are left out here.

    Args:
        raw: the text of an answer; None stands for no answer.

    Returns:
        LaTeX, or None if `raw` is not readable or too large to be written out.

    Source: math-verify `parse`; what is left out: hendrycks/math, `modeling/math_equivalence.py`.
    """
    text = _clean(raw)
    if text is None:
        return None
    canonical = _written(Fraction(text)) if NUMBER.fullmatch(text) else _limited(_canonical, text, on_timeout=None)
    return canonical if canonical is None or len(canonical) <= LONGEST else None


def equal_latex(prediction: str, gold: str) -> bool:
    """Whether two canonical forms have equal values.

    Source: math-verify `verify`, with its own settings (6 places where a decimal is compared).
    """
    return prediction == gold or _limited(_equal, prediction, gold, on_timeout=False)


def _clean(raw: str | None) -> str | None:
    """The answer on one line, without what says nothing about its value; None if there is nothing or too much."""
    if raw is None or len(raw) > LONGEST:
        return None
    text = " ".join(raw.split()).rstrip(". ")
    text = re.sub(r"\\?%$", "", text).rstrip()
    if text.count("$") == 1:  # money, not the start of mathematics
        text = text.replace("\\$", "").replace("$", "").strip()
    return text or None


def _written(number: Fraction) -> str:
    sign = "-" if number < 0 else ""
    if number.denominator == 1:
        return f"{sign}{abs(number.numerator)}"
    return rf"{sign}\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


@lru_cache(maxsize=1 << 16)
def _canonical(text: str) -> str | None:
    value = _value(text)
    if value is None:
        return None
    try:
        written = _print(value)
        if _value(written) == value:
            return written
    except Exception:  # sympy's printers and math-verify's grammar raise whatever they meet
        log.debug("no canonical form of %r", text, exc_info=True)
    return text


@lru_cache(maxsize=1 << 16)
def _equal(prediction: str, gold: str) -> bool:
    from math_verify import verify

    return verify(_expression(gold), _expression(prediction), timeout_seconds=0)


@lru_cache(maxsize=1 << 16)
def _expression(text: str) -> Any:
    """What math-verify reads: an expression of sympy, or None."""
    from math_verify import LatexExtractionConfig, parse

    inside = text if DELIMITER.search(text) else f"${text}$"
    found = parse(inside, [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=0)
    return found[0] if found else None


def _value(text: str) -> Any:
    """The evaluated expression of a text, None if it has no value that can be written out."""
    import sympy

    found = _expression(text)
    try:
        value = None if found is None else _evaluated(found)
    except OverflowError:
        return None
    if value is None or value.has(sympy.zoo, sympy.nan):
        return None
    if _terms(value) > MOST_TERMS:
        return None
    if isinstance(value, sympy.Expr):
        value = sympy.expand(value)
        if value.is_number:
            value = sympy.radsimp(value)
    return value


def _evaluated(expression: Any) -> Any:
    """The expression with sympy's automatic evaluation, which math-verify switches off, and decimals as fractions.

    Raises:
        OverflowError: a number out of all proportion would have to be written out.
    """
    import sympy
    from sympy.functions.combinatorial.factorials import CombinatorialFunction

    if isinstance(expression, sympy.MatrixBase):
        return sympy.ImmutableMatrix(expression.applyfunc(_evaluated))
    if isinstance(expression, sympy.Float):
        return sympy.Rational(str(expression))
    if isinstance(expression, sympy.Symbol) and expression.name == "i":  # read as a symbol or not, as spaces fall
        return sympy.I
    if not expression.args:
        if _bits(expression) > LARGEST:
            raise OverflowError
        return expression
    arguments = [_evaluated(argument) for argument in expression.args]
    if isinstance(expression, sympy.Pow):
        base, exponent = arguments
        if exponent.is_Rational and abs(exponent) * _bits(base) > LARGEST:
            raise OverflowError
    if isinstance(expression, CombinatorialFunction | sympy.gamma) and any(
        argument.is_real and abs(argument) > LARGEST // 10 for argument in arguments if argument.is_number
    ):
        raise OverflowError
    return expression.func(*arguments)


def _bits(number: Any) -> int:
    """Bits of a fraction's larger part; 1 for what is no fraction."""
    return max(int(number.p).bit_length(), int(number.q).bit_length()) if number.is_Rational else 1


def _terms(expression: Any) -> int:
    """How many terms an expression has at most when its products and powers of sums are multiplied out."""
    import sympy

    terms = [_terms(argument) for argument in expression.args]
    if isinstance(expression, sympy.Add):
        return sum(terms)
    if isinstance(expression, sympy.Mul):
        return math.prod(terms)
    if isinstance(expression, sympy.Pow) and expression.exp.is_Integer:
        power = abs(int(expression.exp))
        return max(1, math.comb(terms[0] + power - 1, power))
    return max(terms, default=1)


def _print(value: Any) -> str:
    import sympy

    if value.is_Rational:
        return _written(Fraction(int(value.p), int(value.q)))
    words = {symbol: rf"\text{{{symbol}}}" for symbol in value.free_symbols if len(symbol.name) > 1}
    return sympy.latex(value, symbol_names=words)


def _limited(function: Callable[..., Result], *arguments: str, on_timeout: Result) -> Result:
    """Call under math-verify's alarm where the process can have one: in the main thread, on a system with signals."""
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    # parse and verify would warn that they have no limit of their own: the one limit is here
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    can = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGALRM")
    try:
        return timeout(SECONDS if can else None)(function)(*arguments)
    except TimeoutException:
        log.warning("%s: no result within %d s, so it counts as unreadable or wrong", " and ".join(arguments), SECONDS)
        return on_timeout
