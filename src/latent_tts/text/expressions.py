"""LaTeX expressions, read and compared by sympy and math-verify in the process that `latex.py` starts.

These functions have no time limits, and sympy and math-verify may raise anything. Call them only through
`guard.Guard`.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy.functions.combinatorial.factorials import CombinatorialFunction

from latent_tts.text.number import write_fraction

MAX_BITS = 10_000  # of a number that is written out
MIN_DIFFERENCE = 1e-5  # relative; of numbers that differ by more math-verify may take long to say so
MAX_POWER = 1000  # below which a sum is multiplied out

DELIMITER = re.compile(r"(?<!\\)(\$|\\\(|\\\[)")


def warm_up() -> None:
    """Build the tables of the grammar."""
    # silences the warning that parse and verify run without a time limit: the caller has one
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    equal(r"\frac{x}{2}", r"\frac{x}{2} + 0")


def canonical(text: str) -> str | None:
    """LaTeX of the value of a text, or the text itself if that LaTeX is not read back as the same value.

    Returns:
        None if math-verify cannot read the text, or its value is not finite or too large to be written out.
    """
    readable = False
    try:
        readable = _expression(text) is not None
        value = _value(text) if readable else None
        if value is None:
            return None
        words = {symbol: rf"\text{{{symbol}}}" for symbol in value.free_symbols if len(symbol.name) > 1}
        written = sympy.latex(value, symbol_names=words)
        if value.is_Rational:
            written = write_fraction(Fraction(int(value.p), int(value.q)))
        return written if _value(written) == value else text
    except OverflowError:
        return None
    except Exception:
        return text if readable else None


def equal(prediction: str, gold: str) -> bool:
    """Whether two texts have equal values; the form of `gold` decides whether an equation or its value is compared.

    Source: math-verify `verify`, with its default settings (decimals are compared to 6 places).
    """
    try:
        one, other = (complex(_value(text)) for text in (prediction, gold))
        if abs(one - other) > MIN_DIFFERENCE * max(1.0, abs(one), abs(other)):
            return False
    except Exception:
        pass  # not numbers, or sympy fails: math-verify has other ways to compare
    try:
        return verify(_expression(gold), _expression(prediction), timeout_seconds=0)
    except Exception:
        return False


@lru_cache(maxsize=1 << 12)
def _expression(text: str) -> Any:
    """The sympy expression that math-verify reads; None if it cannot read the text."""
    inside = text if DELIMITER.search(text) else f"${text}$"
    config = LatexExtractionConfig()
    # its list of units has letters that are variables: `3t` would be 3
    rules = replace(config, normalization_config=replace(config.normalization_config, units=False))
    found = parse(inside, [rules], fallback_mode="no_fallback", parsing_timeout=0)
    if found and isinstance(found[0], sympy.Eq) and found[0].rhs.is_Symbol and not found[0].lhs.free_symbols:
        return sympy.Eq(found[0].rhs, found[0].lhs, evaluate=False)  # `18 = x`
    return found[0] if found else None


@lru_cache(maxsize=1 << 12)
def _value(text: str) -> Any:
    """The evaluated expression of a text; None if its value cannot be written out.

    Raises:
        OverflowError: a number is too large to be written out, or a power to be multiplied out.
    """
    found = _expression(text)
    if isinstance(found, sympy.Eq) and not found.free_symbols:
        found = found.rhs  # `9 + 9 = 18` states 18
    value = None if found is None else _evaluated(found)
    if value is None or value.has(sympy.zoo, sympy.nan):
        return None
    if isinstance(value, sympy.Expr):
        value = sympy.expand(value)
        if value.is_number:
            value = sympy.radsimp(value)
    return value


def _evaluated(expression: Any) -> Any:
    """Evaluate an expression, which math-verify leaves unevaluated, with decimals as fractions.

    Raises:
        OverflowError: see `_value`.
    """
    if isinstance(expression, sympy.MatrixBase):
        return sympy.ImmutableMatrix(expression.applyfunc(_evaluated))
    if isinstance(expression, sympy.Float):
        return sympy.Rational(str(expression))
    if isinstance(expression, sympy.Symbol) and expression.name == "i":  # a symbol or not, depending on spaces
        return sympy.I
    if not expression.args:
        if _bits(expression) > MAX_BITS:
            raise OverflowError
        return expression
    arguments = [_evaluated(argument) for argument in expression.args]
    is_large = isinstance(expression, CombinatorialFunction | sympy.gamma) and any(
        argument.is_real and abs(argument) > MAX_BITS // 10 for argument in arguments if argument.is_number
    )
    if isinstance(expression, sympy.Pow):
        base, exponent = arguments
        too_high = MAX_POWER if isinstance(base, sympy.Add) else MAX_BITS // _bits(base) + 1
        is_large = exponent.is_Rational and abs(exponent) >= too_high
    if is_large:
        raise OverflowError
    return expression.func(*arguments)


def _bits(number: Any) -> int:
    """Bits of the numerator or denominator of a fraction, whichever has more; 1 for anything else."""
    return max(int(number.p).bit_length(), int(number.q).bit_length()) if number.is_Rational else 1
