"""Expressions in LaTeX: sympy and math-verify, as the process behind `latex.py` calls them.

Nothing here has a limit of its own in time, and sympy's printers and math-verify's grammar raise whatever they meet:
call it by `guard.Guard` alone.
"""

from __future__ import annotations

import logging
import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from latent_tts.text.number import write_fraction

LARGEST = 10_000  # bits of a number that is written out
MAX_TERMS = 1000  # of an expression that is multiplied out
DIFFERENT = 1e-5  # relative distance of numbers that are not equal; math-verify compares six places

DELIMITER = re.compile(r"(?<!\\)(\$|\\\(|\\\[)")


def warm_up() -> None:
    """Import what is needed, and build the tables of the grammar."""
    # parse and verify would warn that they have no limit of their own: it is the caller's
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    equal(r"\frac{x}{2}", r"\frac{x}{2} + 0")


def canonical(text: str) -> str | None:
    """LaTeX of a text's value, or the text itself where that is not read back as the same value.

    Returns:
        None if math-verify cannot read the text, or its value is not finite or too large to be written out.
    """
    try:
        if _expression(text) is None:
            return None
    except Exception:
        return None
    try:
        value = _value(text)
        if value is None:
            return None
        written = _print(value)
        return written if _value(written) == value else text
    except Exception:
        return text


def equal(prediction: str, gold: str) -> bool:
    """Whether the values of two texts are equal, where the gold one's form decides between an equation and its value.

    Source: math-verify `verify`, with its own settings (6 places where a decimal is compared).
    """
    from math_verify import verify

    try:
        if _are_far_apart(_value(prediction), _value(gold)):
            return False
    except Exception:
        pass  # not numbers, or not for sympy: math-verify has its own ways
    try:
        return verify(_expression(gold), _expression(prediction), timeout_seconds=0)
    except Exception:
        return False


@lru_cache(maxsize=1 << 12)
def _expression(text: str) -> Any:
    """What math-verify reads: an expression of sympy, or None."""
    from math_verify import LatexExtractionConfig, parse

    inside = text if DELIMITER.search(text) else f"${text}$"
    found = parse(inside, [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=0)
    return found[0] if found else None


@lru_cache(maxsize=1 << 12)
def _value(text: str) -> Any:
    """The evaluated expression of a text, None if it has no value that can be written out."""
    import sympy

    found = _expression(text)
    if isinstance(found, sympy.Eq) and not found.free_symbols:
        found = found.rhs  # `9 + 9 = 18` states 18
    try:
        value = None if found is None else _evaluated(found)
    except OverflowError:
        return None
    if value is None or value.has(sympy.zoo, sympy.nan):
        return None
    if _terms(value) > MAX_TERMS:
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


def _are_far_apart(one: Any, other: Any) -> bool:
    """Whether both are numbers whose difference needs no closer look."""
    import sympy

    if not all(isinstance(value, sympy.Expr) and value.is_number for value in (one, other)):
        return False
    one, other = complex(one), complex(other)
    return abs(one - other) > DIFFERENT * max(1.0, abs(one), abs(other))


def _print(value: Any) -> str:
    import sympy

    if value.is_Rational:
        return write_fraction(Fraction(int(value.p), int(value.q)))
    words = {symbol: rf"\text{{{symbol}}}" for symbol in value.free_symbols if len(symbol.name) > 1}
    return sympy.latex(value, symbol_names=words)
