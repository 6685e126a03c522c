"""Raw answer strings to canonical predictions: exact decimals, never floats."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation


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
