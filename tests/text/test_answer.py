from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.text.answer import canonical_number, canonical_words, close

quick = settings(derandomize=True, deadline=None, max_examples=100)


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("2", "2"),
        ("2.0", "2"),
        ("2.", "2"),
        (" 18. ", "18"),
        ("\n7\t", "7"),
        ("1,234", "1234"),
        ("1,234,567.50", "1234567.5"),
        ("1e3", "1000"),
        ("1.5E-2", "0.015"),
        ("-0.50", "-0.5"),
        (".5", "0.5"),
        ("+3", "3"),
        ("007", "7"),
        ("100", "100"),
        ("0", "0"),
        ("-0.0", "0"),
        ("0.1000000000000000000000000000000000000001", "0.1000000000000000000000000000000000000001"),
        ("12345678901234567890123456789012345678901", "12345678901234567890123456789012345678901"),
        ("$18", None),
        ("18 dollars", None),
        ("1 2", None),
        ("1/2", None),
        ("--1", None),
        ("", None),
        ("  ", None),
        (".", None),
        (None, None),
        ("nan", None),
        ("sNaN", None),
        ("inf", None),
        ("-Infinity", None),
        ("1e999999", None),
        ("1e-999999", None),
        ("1e99999999999999999999", None),
    ],
)
def test_numbers_have_one_canonical_form(raw, canonical):
    assert canonical_number(raw) == canonical


@quick
@given(st.text("0123456789.,-+eE_ nainf$\u0663\uff12", max_size=12) | st.decimals().map(str) | st.floats().map(repr))
def test_a_canonical_form_is_its_own_canonical_form(raw):
    canonical = canonical_number(raw)
    if canonical is not None:
        assert canonical_number(canonical) == canonical
        assert Decimal(canonical) == Decimal(raw.strip().replace(",", ""))


@quick
@given(st.integers(-(10**30), 10**30), st.integers(0, 3))
def test_whole_numbers_lose_nothing_but_commas_and_zeros(number, zeros):
    assert canonical_number(f"{number:,}.{'0' * zeros}") == str(number)


@pytest.mark.parametrize(
    ("prediction", "gold", "tolerance", "equal"),
    [
        ("2", "2", None, True),
        ("2", "2.0001", None, False),
        ("2", "2", 0, True),
        ("2", "2.1", 0.1, True),  # exact decimals: 2.1 - 2 in floats is larger than 0.1
        ("2.1", "2", 0.1, True),
        ("2.3", "2", 0.3, True),
        ("2", "2.1001", 0.1, False),
        ("-1", "1", 1, False),
        ("-1", "1", 2, True),
        ("1000", "1000.5", 1e-3, False),
    ],
)
def test_equality_is_exact_or_within_the_tolerance(prediction, gold, tolerance, equal):
    assert close(prediction, gold, tolerance) is equal


@quick
@given(st.decimals(-(10**9), 10**9, places=3), st.decimals(-1, 1, places=4))
def test_no_tolerance_and_tolerance_0_are_the_same(number, change):
    prediction, gold = canonical_number(str(number)), canonical_number(str(number + change))
    assert close(prediction, gold, None) == close(prediction, gold, 0) == (change == 0)


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("Sally is a sterpus.", "sally is a sterpus"),
        ("  Every\tcat  is a\ndog . ", "every cat is a dog"),
        ("Dr. No", "dr. no"),
        ("1,000", "1,000"),
        ("...", None),
        (" ", None),
        ("", None),
        (None, None),
    ],
)
def test_texts_have_one_canonical_form(raw, canonical):
    assert canonical_words(raw) == canonical


@quick
@given(st.text("aA .\n\u00df\u0130", max_size=12))
def test_case_spaces_and_final_dots_say_nothing(text):
    canonical = canonical_words(text)
    assert canonical_words(f" {text}. ") == canonical
    assert canonical is None or canonical_words(canonical) == canonical
