from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.text.number import MAX_LENGTH, canonical_number, is_close, parse_number, tidy

quick = settings(derandomize=True, deadline=None, max_examples=100)
SAME = {
    "2": ["2", "2.0", "2.", " 2 ", "\n2\t", "+2", "02", "2e0", "0.2E1", "\ufeff2", "2\u200b", "\uff12", "\u0662"],
    "18": ["18. ", "$18", "$18.00", r"\$18", "18$", "$18$", "US$18", "\u20ac18", "18 \u20ac", "18%", r"18\%",
           "18 percent"],
    "29": ["$29.00", "$ 29", "29 dollars", "29 dollars.", "29 USD", "**29**", r"\boxed{29}", r"$\boxed{29}$",
           r"\(29\)"],
    "73": ["73", "073", "73.0 apples", "73 red apples", "73 km/h", "73 m/s", "73 cm^2", "73 m\u00b2", "73\u00b0",
           "73 \u00b0C", r"73\text{ cm}", r"73 \mathrm{cm}^2", r"$73\text{ apples}$", "73 m^{2}",
           "73 m s^{-1}", "73 m\u00b7s\u207b\u00b2", r"73\text{ m}\cdot\text{s}^{-1}", "73 cm2", "73 (apples)",
           r"73\text{ cm$^2$}", "$73/hr", "S$73", "\u20ba73", "73 \u03bcm", "73 \u03a9",
           "{73}", r"\displaystyle 73", "$73/day", "Rs. 73", "EUR 73", "\u202a73\u202c", "73\u3002"],
    "1234": ["1,234", "1 234", r"1\,234", "1{,}234", r"1,\!234", "1'234", "1\u2019234", "1_234", "1\u00a0234",
             "1\u202f234", "\uff11\uff0c\uff12\uff13\uff14",
             "\u0661\u066c\u0662\u0663\u0664", r"1.234\times10^{3}", r"1.234 \cdot 10^3", "12.34 x 10^{2}"],
    "1234567.5": ["1,234,567.50", "1 234 567.5", "$1,234,567.5"],
    "300000000": ["3\u00d710\u2078", "3\u00b710\u2078 m/s", "3e8"],
    "10000": [r"10\,000", "10 000", "10,000 apples", "1e4", "10000"],
    "-3": ["-3", "- 3", "\u22123", "\u20133", "\u20143", "\u20113", "\ufe633", "\uff0d3", "\u02d73", "\u27963",
           "\ufe583", "-$3", "$-3", "\u2212$3.00", r"-\$3", "$\u22123"],
    "3.5": ["3.5", "3\u066b5", "\uff13\uff0e\uff15", "7\u20442", "3 1\u20442", r"35\times 10^{-1}",
            "3 1/2", "3\u00bd", "3 \u00bd", r"3\frac12", r"3 \frac{1}{2}", "7/2", r"\dfrac{7}{2}", r"3\ 1/2",
            "3 1 / 2 cups"],
    "-3.5": ["-3 1/2", "\u22123\u00bd", r"-\frac{7}{2}"],
    "0.5": [".5", "0.50", "\u00bd", "1/2", r"\frac12", "50e-2", "0.5%"],
    "0": ["0", "-0", "-0.0", "0/7", "00", "$0.00"],
}  # fmt: skip
UNREADABLE = {
    "commas that separate no thousands": ["1,8", "0,5", "1,2,3", "1,00", "12,34", "0,500", "1,000,00", "1234,567",
        ",5", "1.234,5"],
    "groups that are not of three": ["3 4", "1 2", "10 00", "1 000,000", "1,000 000", r"1\,00", "1_0", "1 00,000"],
    "fractions": ["1/0", "1/3", "3 5/2", "3 2/2", "3 1/3", "1.5 1/2", "1/2 1/3", "1//2", "1/2/3"],
    "two values": ["3-5", "3\u20135", "3 or 4", "18 and 19", "5:30", "18 apples and 3 pears", "6 ft 2 in", "(18, 19)"],
    "words that change the value": ["2 dozen", "5 million", "5k", "18 and a half", "3 hundred", "18 times", "18 x",
                                    "3\u4e07", "18 not", r"3\text{ million}", "5M", "5 tenths", "2 thousandths",
                                    "5 January", "5 May"],
    "variables": ["12\u03c0", "12\u03c0 cm\u00b2", "4\u03c0r\u00b2", "2\u03b8", "5C2", "7r2"],
    "powers and signs": ["18^2", "18\u00b2", "18!", "--1", "+-1", "-$-5", "18%%", "x=18", "2x", "18e", "1.2.3", "10^3",
                         "10\u2075", r"3\times 10^{8}1", "3\u00d710\u20781"],
    "no number": ["", "  ", ".", "$", "%", "apples", "eighteen", "nan", "sNaN", "inf", "-Infinity", "#", "\ufeff",
                  "\u00b2", "\u00bdx"],
    "out of all proportion": ["1e999999", "1e-999999", "1e99999999999999999999", "1e401", "9" * (MAX_LENGTH + 1),
                              f".{'1' * 401}"],
}  # fmt: skip


@pytest.mark.parametrize(("canonical", "raw"), [(form, raw) for form, raws in SAME.items() for raw in raws])
def test_equal_numbers_have_one_canonical_form(canonical, raw):
    assert canonical_number(raw) == canonical


@pytest.mark.parametrize(("kind", "raw"), [(kind, raw) for kind, raws in UNREADABLE.items() for raw in raws])
def test_what_is_not_one_number_is_unreadable(kind, raw):
    assert canonical_number(raw) is None, kind


def test_no_answer_is_unreadable():
    assert canonical_number(None) is None


ALPHABET = "0123456789.,-+eE_ '/nainf$%\u0663\uff12\u00bd\u00b2\u2212\u2013\\!{}frac"


@quick
@given(st.text(ALPHABET, max_size=12) | st.decimals().map(str) | st.floats().map(repr) | st.text(max_size=8))
def test_a_canonical_form_is_its_own_canonical_form_and_a_number(raw):
    canonical = canonical_number(raw)
    if canonical is not None:
        assert canonical_number(canonical) == canonical
        assert Fraction(canonical) == parse_number(tidy(raw))


@quick
@given(st.decimals(allow_nan=False, allow_infinity=False, places=4).filter(lambda value: abs(value.adjusted()) < 300))
def test_decimals_keep_every_place(value):
    assert Fraction(canonical_number(str(value))) == Fraction(value)


@quick
@given(st.integers(-(10**30), 10**30), st.integers(0, 3), st.sampled_from([",", " ", r"\,", "'", "\u202f"]))
def test_whole_numbers_lose_nothing_but_separators_and_zeros(value, zeros, separator):
    text = f"{value:,}".replace(",", separator)
    assert canonical_number(f"{text}.{'0' * zeros}") == str(value)


@quick
@given(st.integers(0, 999), st.integers(1, 99), st.sampled_from([1, 2, 4, 5, 8, 10, 16, 20, 25, 40, 50]))
def test_mixed_numbers_have_their_value(whole, upper, lower):
    expected = None if upper >= lower else whole + Fraction(upper, lower)
    for text in (f"{whole} {upper}/{lower}", rf"{whole}\frac{{{upper}}}{{{lower}}}"):
        assert parse_number(text) == expected
        assert parse_number(f"-{text}") == (None if expected is None else -expected)


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
        ("1" + "0" * 40, "1" + "0" * 39 + "1", 0.5, False),  # more places than a decimal context keeps
    ],
)
def test_equality_is_exact_or_within_the_tolerance(prediction, gold, tolerance, equal):
    assert is_close(prediction, gold, tolerance) is equal


@quick
@given(st.decimals(-(10**9), 10**9, places=3), st.decimals(-1, 1, places=4))
def test_no_tolerance_and_tolerance_0_are_the_same(value, change):
    prediction, gold = canonical_number(str(value)), canonical_number(str(value + change))
    assert is_close(prediction, gold, None) == is_close(prediction, gold, 0) == (change == 0)
