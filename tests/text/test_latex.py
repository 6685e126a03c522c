import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.text import guard
from latent_tts.text.guard import Guard
from latent_tts.text.latex import EXPRESSIONS, canonical_latex, equal_latex

SAME = [
    [r"\frac{1}{2}", r"\frac12", r"\dfrac 12", "0.5", ".50", "1/2", r"\boxed{\frac{1}{2}}", r"$\frac12$."],
    [r"\frac{1}{4}", r"\(0.25\)", "25/100", r"\left(\frac12\right)^2"],
    [r"\frac{1}{3}", r"0.\overline{3}", r".\overline{3}", "1/3"],
    [r"\frac{13}{6}", r"2.1\overline{6}", r"2\frac{1}{6}"],
    [r"\text{monday}", "Monday", "monday.", r"\text{Monday}"],
    [r"\text{yes}", "Yes", r"\text{yes}."],
    ["3", r"\log_2 8", r"\log_{2} 8"],
    ["18", "= 18", "\u2248 18", r"\approx 18", "9+9=18",
     "18.", "18.00", "+18", "1.8e1", r"1.8\times 10^1", "18%", r"18\%", r"18^\circ", r"18\text{ cm}",
     r"\text{18}", r"\mathbf{18}", "18 apples", "18 dollars.", "\u20ac18", "018", r"\boxed{18}", r"\(18\)", "**18**"],
    ["36", "$36", r"\$36", r"\$36.00"],
    ["10080", "10,080", r"10,\!080"],
    ["10000", r"10\,000", r"10\;000", r"10\ 000", "10~000", "10 000", "10{,}000", "10,000", r"10,\!000", "10'000"],
    ["-3", "- 3", r"-\frac{6}{2}", "\u22123", "\u20133", "-$3", "$-3", "\u2212\\frac{6}{2}"],
    ["0", "-0", "-0.0"],
    [r"2 \sqrt{3}", r"\sqrt{12}", r"\frac{6}{\sqrt{3}}"],
    [r"-1 + \sqrt{2}", r"\frac{1}{1+\sqrt2}"],
    ["6 - 5 i", "6-5i", "-5i+6"],
    ["x^{2} + 2 x + 1", "(x+1)^2", "1+x(x+2)"],
    [r"\left( 3, \  \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"],
    [r"\left\{-2, 1\right\}", "1,-2", "-2, 1", r"\{1,-2\}"],
    [r"\left[\begin{matrix}1\\2\end{matrix}\right]", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
    [r"\left[\begin{matrix}1 & 2\end{matrix}\right]", "\\begin{bmatrix}1&\n2\\end{bmatrix}"],
    [r"\text{east}", r"\text{ east }", r"\text{East}"],
    ["x = 10000", r"x = 10\,000", "x=10 000"],
    [r"x = \frac{7}{2}", "x = 3 1/2", r"x = 3\frac12", "x=3\u00bd"],
    ["2 \\pi", "2\u03c0", r"2\pi"],
    ["x^{2}", "x\u00b2"],
    ["\\emptyset", "\\varnothing", "\u2205"],
    ["x = 5", "x=5"],
    ["1024", "2^{10}"],
    [r"\frac{7}{2}", r"3 \frac12", "3.5", "3 1/2", r"3\ 1/2", "3\u00bd", "3 1/2 cups"],
    [r"-\frac{7}{2}", "-3 1/2", r"-3\frac12"],
    [r"\frac{3}{4}", "3/4 cup", r"\frac 34", r"\frac 3 4", "3\u20444", r"\frac12+\sin^2 30^\circ", r"\cos(30°)^2",
     r"\sin^{2}\left(90^\circ-30^{\circ}\right)"],
    ["1", r"\tan 45^\circ", r"\tan{45^\circ}", r"\tan\left(45^\circ\right)", r"2\sin 30°", r"1 \\"],
    [r"\sqrt[3]{2}", r"\sqrt[3]2", "2^{1/3}"],
    ["1500", r"1.5\times10^{3}", r"1.5 \cdot 10^3", "1.5\u00d710^3", r"1500\degree", "\uff11\uff0c\uff15\uff10\uff10",
     "\u0661\u066c\u0665\u0660\u0660", "\u202a1500\u202c", r"{\bf 1500}", r"\displaystyle 1500", "USD 1500"],
    [r"\frac{1}{6}", "0.1(6)", r"0.1\overline{6}"],
    [r"\frac{1}{7}", r"0.\dot{1}4285\dot{7}", r"0.\overline{142857}"],
    ["x = 18", "18=x", "x=18"],
    ["42_{5}", "42_5", "042_{5}", "$42_5$"],
    [r"\text{6:05pm}", "6:05 PM", r"6:05\text{ p.m.}", "06:05pm"],
    ["3:4:5", "6:8:10", "3 : 4 : 5"],
    [r"\text{allrealnumbers}", "all real numbers", r"\text{all real numbers}"],
    [r"\left\{25, 50\right\}", r"50\%, 25\%", "\uff12\uff15, 50"],
    [r"\left(1, 2\right)", "(1, 2)", r"\langle 1,2\rangle", "\uff081\uff0c2\uff09", "(1, 2) cm"],
    ["10", "10 cm", "10cm", "10 cm^2", "10 cm\u00b2", "10cm\u00b2", "10 km\u00b2", "10 cm2", "10 ft^2", "10 in.",
     "10 km/h", "10 km/hr", "10 m/s", "10 m/s\u00b2", "10 m s^{-1}", r"10\,\text{cm}^{2}", "10\\text{ cm\u00b2}",
     r"10\text{ cm$^2$}",
     r"10 \mathrm{~cm}^2", "10 mm^3", "10 mL", "10 sq. cm", "10~cm^2", r"10^\circ C", "10 \u00b0F", "10th", "10^{th}",
     r"10^\text{th}", "10 (apples)"],
    [r"\frac{1}{2}", "\\frac12 cm\u00b2", "1/2 cm^2", r"\frac{1}{2}\text{ hour}", r"\nicefrac{1}{2}"],
    [r"12 \pi", "12\u03c0 cm\u00b2", r"12\pi\text{ cm}^{2}", r"12\pi\ cm^2", r"12\pi square units", "12pi", "12*pi"],
    [r"2 \sqrt{3}", "2\u221a3 cm\u00b2", "2sqrt3", r"2\sqrt{3} inches", r"2\sqrt{3}\text{ cm}^2"],
    [r"1000 \pi", r"1,000\pi", r"1{,}000\pi", r"1\,000 \pi", "1,000\u03c0 m/s"],
    ["x = 1000", "x=1,000", r"x = 1,000\text{ cm}"],
    [r"\frac{1000}{3}", r"\frac{1,000}{3}", "1,000/3"],
    [r"\left(1000, 2000\right)", "(1,000, 2,000)", "(1000,2000)"],
    [r"\left(100, 200\right)", "(100,200)", "(100, 200)"],
    ["3 t", "3t", r"3\mathrm{t}"],
    ["6 x y z", "6xyz"],
    [r"\frac{b h}{2}", r"\frac12 bh"],
    ["2 i", r"2\mathrm{i}", r"2\text{i}"],
    ["1024", "2\u00b9\u2070", "2**10"],
    [r"\frac{1}{1000}", "10\u207b\u00b3", "10**-3"],
    [r"\text{x_1}", "x\u2081", "x_1"],
    [r"\sin{\left(x \right)}", "sin x", "sin(x)"],
    [r"\sqrt{2}", r"2^\frac12", "sqrt2"],
    ["1100_{2}", "(1100)_2", r"1100_{\text{two}}", "1100_{two}"],
    ["AB_{16}", r"\text{AB}_{16}"],
    [r"\text{may 5}", "May 5", r"\text{May 5}"],
    [r"\text{july 4 1776}", "July 4 1776", "July 4, 1776", r"\text{July 4, 1776}"],
    [r"\text{2020-03-04}", "2020-03-04", r"\text{2020-03-04}"],
    [r"\text{18 is the answer}", "18 is the answer.", r"\text{18 is the Answer}"],
    [r"\text{6 feet 2 inches}", "6 feet, 2 inches", "6 feet 2 inches", "6'2\"", r"6\text{ feet }2\text{ inches}"],
    [r"\text{10:00am}", "10 AM", "10:00 a.m."],
    [r"\text{7 r 2}", "7 R 2", "7r2", "7 remainder 2"],
    ["a", "A)", "(A)", r"\text{(A)}"],
    [r"\left\{5, 6\right\}", "5 cm and 6 cm", "5 and 6"],
]  # fmt: skip


@pytest.mark.every_other
@pytest.mark.parametrize("answers", SAME, ids=lambda answers: answers[0])
def test_equal_values_are_one_vote(answers):
    assert {canonical_latex(answer) for answer in answers} == {answers[0]}


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("5", "x=5"),
        ("x=5", "5"),
        ("5=x", "5"),
        ("5", "5=x"),
        ("42", "42_5"),
        ("42_5", "42"),
        ("east", r"\text{east}"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
        ("-1", r"\cos \pi"),
        ("2^{2000}", "4^{1000}"),
        ("(x+1)^{100}", "(1+x)^{100}"),
        ("10 m", "10"),
        ("10", "10 m^2"),
        ("10 m\u00b2", "10"),
        ("10", "10m2"),
        ("-3.5 m", "-7/2"),
        ("4 L", "4"),
    ],
)
def test_math_verify_decides_equality_where_forms_differ(prediction, gold):
    assert equal_latex(canonical_latex(prediction), canonical_latex(gold))


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("2", "3"),
        (r"\frac12", r"\frac13"),
        ("x+1", "x-1"),
        ("(1,2)", "(2,1)"),
        ("0.34", "1/3"),
        ("no", r"\text{yes}"),
        ("42_5", "42_6"),
        ("42_5", "22"),
        ("3:4:5", "3:5:4"),
        ("3:4:5", "3/20"),
        ("6:05 AM", "6:05 PM"),
        ("6:05", "12:10"),
        (r"\sin 30", r"\sin 30^\circ"),
        ("2^{2000}", "2^{2001}"),
        ("(x+1)^{100}", "(x+1)^{99}"),
        ("3", "3t"),
        ("3t", "3s"),
        ("x+2", "x+2c"),
        ("x+2t", "x+2c"),
        ("x=3", "x=3t"),
        ("6", "6xyz"),
        ("2", r"2\mathrm{i}"),
        (r"3\mathbf{i}+2", r"3\mathbf{i}+2\mathbf{j}"),
        ("10 m^2", "11"),
        ("10 m", "10 s"),
        ("10", "10 x"),
        ("0,1", r"1,000\pi"),
        ("62", "6'2\""),
        ("2 feet 6 inches", "6 feet 2 inches"),
        ("30 h 5 min", "5 h 30 min"),
        (r"2\text{ feet }6\text{ inches}", r"6\text{ feet }2\text{ inches}"),
        ("5 March", "5 January"),
        ("May 5", "Amy 5"),
        ("2020-04-03", "2020-03-04"),
        ("2013", "2020-03-04"),
        ("2/2/2000", "1/1/2000"),
        ("3 to 2", "2 to 3"),
        ("2 R 7", "7 R 2"),
        ("x=17", "18=x"),
    ],
)
def test_other_values_are_not_equal(prediction, gold):
    assert not equal_latex(canonical_latex(prediction), canonical_latex(gold))


@pytest.mark.parametrize(
    "raw",
    [
        None, "", "  ", ".", "$", "$$", "()", "+", "#", r"\frac{1", "(((((", "1/0", "0/0", "\x00",
        "9^{9^{9}}", "9^{9^{9^9}}", "((9^{999})^{999})^{999}", "100000!", "x^{10^{9}}", "1e999", "(a+b+c)^{1000}",
        "1" * 501, r"18 \quad 19", r"18 \ldots 20", "5!!", "nan", "NaN",
        "3 4", "1 2 3", r"3\,4", "1/2 1/3", "2^3 4", "4 10/3", "(3 4, 5)", r"\sqrt 3 4", "18 million",
        r"18\text{ million}", "2 dozen", "1.234.567", "0.1.2",
    ],
)  # fmt: skip
def test_what_has_no_value_or_one_too_large_is_not_read(raw):
    grading = Guard(EXPRESSIONS)
    assert canonical_latex(raw, grading) is None
    assert not grading.given_up


def test_a_name_in_a_text_is_a_symbol_and_never_code():
    assert canonical_latex(r"\text{__import__('os').abort()}") is not None


PIECES = [*"12-+xi(){}^_,./$\\ =", r"\frac", r"\sqrt", r"\pi"]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_a_canonical_form_is_its_own_canonical_form(raw):
    canonical = canonical_latex(raw)
    if canonical is not None:
        assert canonical_latex(canonical) == canonical
        assert equal_latex(canonical, canonical)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(-999, 999), st.integers(1, 99), st.integers(1, 9))
def test_fractions_are_reduced_exactly(numerator, denominator, factor):
    fraction = canonical_latex(rf"\frac{{{numerator * factor}}}{{{denominator * factor}}}")
    assert fraction == canonical_latex(f"{numerator}/{denominator}")
    if denominator in (1, 2, 4, 5, 8, 10):
        assert fraction == canonical_latex(str(numerator / denominator))


def test_it_works_outside_the_main_thread_where_there_are_no_alarms():
    results = []
    worker = threading.Thread(target=lambda: results.append(canonical_latex(r"\frac{35}{70}")))
    worker.start()
    worker.join()
    assert results == [r"\frac{1}{2}"]


CHAINS = [
    r"x = 2 \cdot 3 = 6", r"P(A)=\frac{2}{4}=\frac{1}{2}", r"x=\sqrt{16}=4", "0<1<x", "x>2>1", "(i,2i)", "[i,2]",
    r"\sum_{i=1}^{3} i = 6", r"\int_0^1 x", r"\lim_{x\to 0} x", r"\begin{pmatrix} 1 & 2 \\ 3 \end{pmatrix}", "f(x)=x=2",
    r"\log_0 1", "x^{x^{x}}", r"\frac{d}{dx} x", r"1 < 0 < x", r"\{x | x > 0\}",
    r"\sqrt[0]{1}",
]  # fmt: skip


@pytest.mark.parametrize("raw", CHAINS)
def test_what_other_code_raises_at_is_an_answer_or_unreadable(raw):
    canonical = canonical_latex(raw)
    if canonical is not None:
        assert canonical_latex(canonical) == canonical
        for other in ("6", canonical, r"\frac{1}{2}", "x"):
            assert equal_latex(canonical, other) in (True, False)


@pytest.mark.parametrize(("raw", "gold"), [(CHAINS[0], "6"), (CHAINS[1], r"\frac{1}{2}"), (CHAINS[2], "4")])
def test_a_chain_of_equations_is_right_where_its_end_is(raw, gold):
    assert equal_latex(canonical_latex(raw), gold)
    assert not equal_latex(canonical_latex(raw), "7")


def test_what_takes_too_long_counts_as_unreadable_and_is_named(monkeypatch, caplog):
    monkeypatch.setattr(guard, "SECONDS", 0.3)
    grading = Guard(EXPRESSIONS)
    slow = "(" * 40 + "x" + ")" * 40  # the time of the grammar doubles with each
    assert canonical_latex(slow, grading) is None
    assert "no result within 0.3 s" in caplog.text
    assert grading.given_up == {("canonical", slow)}
    assert canonical_latex("3.0", grading) == "3"  # numbers need no process
