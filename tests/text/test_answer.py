"""Rules of tasks: what they read, in generated texts too, and what is right or one vote."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
import scripted
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.errors import UsageError
from latent_tts.model.coconut import Coconut
from latent_tts.model.codi import Codi
from latent_tts.model.colar import Colar
from latent_tts.model.cot import Cot
from latent_tts.model.pccot import Pccot
from latent_tts.text.answer import RULES, AnswerRule, canonical_words

DATA = os.environ.get("LTTS_DATA")
RULE = {name: AnswerRule(name) for name in RULES}
FAMILIES = {
    "coconut": (Coconut("coconut", "nowhere", 6, {}), "<<3+4=7>>\n### {}"),
    "codi": (Codi("codi", "nowhere", 6, {}), "The answer is: {}"),
    "colar": (Colar("colar", "nowhere", 6, {}), "Answer: {}###"),
    "cot": (Cot("cot", "nowhere", 0, {}), "<<3+4=7>>\n### {}"),
    "pccot": (Pccot("pccot", "nowhere", 6, {}), " {}"),
}
POLAR = r"\left( 3, \frac{\pi}{2} \right)"


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("Sally is a sterpus.", "sally is a sterpus"),
        ("  Every\tcat  is a\ndog . ", "every cat is a dog"),
        ("Dr. No", "dr. no"),
        ("1,000", "1,000"),
        ("caf\u00e9", "caf\u00e9"),
        ("cafe\u0301", "caf\u00e9"),
        ("\ufeffyes\u200b", "yes"),
        ("STRASSE", "strasse"),
        ("Stra\u00dfe", "strasse"),
        ("It\u2019s \u201cso\u201d", 'it\'s "so"'),
        ("...", None),
        ("**Yes.**", "yes"),
        ('"Yes".', "yes"),
        (r"$\text{Yes}$", "yes"),
        ('"a" and "b"', '"a" and "b"'),
        ("(B)", "b"),
        ("B)", "b"),
        ("B:", "b"),
        ("f(b)", "f(b)"),
        ("****", "****"),
        (" ", None),
        ("", None),
        (None, None),
        ("a" * 501, None),
    ],
)
def test_texts_have_one_canonical_form(raw, canonical):
    assert canonical_words(raw) == canonical


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "answer"),
    [("latex", POLAR), ("latex", "(0,1)"), ("latex", "1,-2"), ("latex", r"\{1\pm\sqrt{5},-2\}"),
     ("words", "Every cat is a wumpus."), ("words", "yes, 3 of 4"), ("decimal", "-1234.5"), ("decimal", "1,234")],
)  # fmt: skip
def test_a_gold_answer_that_a_family_writes_in_its_format_is_right(family, name, answer):
    adapter, text = FAMILIES[family]
    rule = RULE[name]
    assert rule.is_right(adapter.read_answer(text.format(answer), rule), rule.parse(answer))


@pytest.mark.parametrize(
    ("family", "text", "number"),
    [
        ("codi", "5-2=3", "3"),
        ("codi", "x-3", "-3"),
        ("codi", "The answer is: 1,8", "18"),
        ("codi", "18 apples and 3 pears", "3"),
        ("colar", "Answer: 1,8", "18"),
        ("colar", "Answer: $18.00 #", "18"),
        ("coconut", "### 1,8", None),
        ("coconut", "### 18 apples", "18"),
        ("coconut", "### 1,234", "1234"),
        ("cot", "<<3+4=7>>\n<<7", None),
    ],
)
def test_numbers_are_read_as_the_family_says(family, text, number):
    assert FAMILIES[family][0].read_answer(text, RULE["decimal"]) == number


def test_a_text_without_an_answer_is_unreadable():
    for rule in RULE.values():
        assert FAMILIES["cot"][0].read_answer("no sign", rule) is None
        assert FAMILIES["codi"][0].read_answer("The answer is: ", rule) is None


def test_what_a_tolerance_lets_pass_is_right_and_not_equal():
    rule = AnswerRule("decimal", 0.5)
    assert rule.is_right("18.4", "18")
    assert not rule.is_right("18.6", "18")
    assert not rule.equal("18.4", "18")


@pytest.mark.parametrize(
    ("prediction", "gold", "right"), [("x+7=9", "9", True), ("9", "x+7=9", False), ("6", "2x+3y=6", False)]
)
def test_the_gold_answers_form_decides_between_an_equation_and_its_value(prediction, gold, right):
    rule = RULE["latex"]
    prediction, gold = rule.parse(prediction), rule.parse(gold)
    assert rule.is_right(prediction, gold) is right
    assert not rule.equal(prediction, gold)
    assert not rule.equal(gold, prediction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits",), r"^task\.answer=digits: must be one of decimal, latex, words$"),
        (("decimal", -1), r"^task\.tolerance=-1: must be a finite number, 0 or more"),
        (("words", 0.1), r"^task\.tolerance=0\.1: must be null: it applies only to task\.answer=decimal$"),
    ],
)
def test_bad_rules_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        AnswerRule(*arguments)


PIECES = [*"0123456789abeixXyz+-*/=<>()[]{}^_,.;:'!|&#$%~\\ \n\u2212\u00bd", r"\frac", r"\sqrt", r"\pi", r"\text{"]
PIECES += [
    r"\sum_{i=1}",
    r"\pm",
    r"\in",
    r"\cup",
    r"\infty",
    r"\begin{pmatrix}",
    r"\end{pmatrix}",
    r"\\",
    r"\le",
    r"\cdot",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=10).map("".join) | st.text(max_size=10)


def check_rules(one, other):
    for rule in RULE.values():
        forms = [rule.parse(one), rule.parse(other)]
        for form in forms:
            assert form is None or (rule.parse(form) == form and rule.equal(form, form) and rule.is_right(form, form))
        first, second = forms
        if first is not None and second is not None:
            assert rule.equal(first, second) == rule.equal(second, first)
            assert not rule.equal(first, second) or rule.is_right(first, second)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(TEXTS, TEXTS)
def test_no_text_raises_and_canonical_forms_are_fixed_points(one, other):
    check_rules(one, other)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=1000)
@given(TEXTS, TEXTS)
def test_no_text_of_a_thousand_raises(one, other):
    check_rules(one, other)


# whole runs


@pytest.fixture
def graded(ltts, tmp_path):
    """The rollouts and the metrics of a run on a model that writes given texts."""

    def run(family, rule, gold, *texts, **more):
        (tmp_path / "q.jsonl").write_text(json.dumps({"question": "What?", "answer": gold}) + "\n")
        checkpoint = scripted.make(tmp_path / "scripted", family, *texts)
        line = {"n": 1, "sampler": "greedy", "task.path": "q.jsonl", "task.answer": rule} | more
        options = [f"{key}={value}" for key, value in line.items()]
        result = ltts(
            "run", "budget=fixed", f"model={family}", f"model.checkpoint={checkpoint}", "task=jsonl", *options
        )
        assert result.code == 0, result.err
        return pd.read_parquet(result.last.parent / "rollouts.parquet"), pd.read_csv(result.last)

    return run


@pytest.mark.every_other
@pytest.mark.parametrize(
    ("family", "rule", "gold", "text"),
    [("codi", "latex", POLAR, f"The answer is: {POLAR}"), ("colar", "latex", "(0,1)", "Answer:(0,1)"),
     ("codi", "words", "Every cat is a wumpus.", "Every cat is a wumpus."),
     ("coconut", "latex", "6", r"### x = 2 \cdot 3 = 6")],
)  # fmt: skip
def test_the_text_that_a_model_writes_reaches_the_rule(graded, family, rule, gold, text):
    rollouts, _ = graded(family, rule, gold, text)
    assert rollouts["correct"].tolist() == [True]


def test_equal_answers_are_one_vote(graded):
    texts = [f"### {answer}" for answer in (r"\text{18}", "18", "x=18", "7", "7.0")]
    more = {"answer.temperature": 1, "n": 64, "answer.top_p": 1, "budget": "fixed"}
    rollouts, metrics = graded("coconut", "latex", "18", *texts, **more)
    assert set(rollouts["prediction"]) == {"18", "7"}
    assert (rollouts["prediction"] == "18").equals(rollouts["correct"])
    assert rollouts["correct"].mean() > 0.5
    majority = metrics[(metrics["metric"] == "accuracy") & (metrics["aggregator"] == "majority")]
    assert majority["value"].tolist() == [1.0]


@pytest.mark.realdata
@pytest.mark.parametrize("family", FAMILIES)
def test_every_gold_answer_of_math500_can_be_graded_with_every_family(family):
    """Before, 182 of 500 could not with CODI."""
    if not DATA:
        pytest.skip("LTTS_DATA names no folder")
    adapter, text = FAMILIES[family]
    lines = (Path(DATA) / "math500.jsonl").read_text().splitlines()
    golds = [json.loads(line)["answer"] for line in lines]
    rule = RULE["latex"]
    graded = [rule.is_right(adapter.read_answer(text.format(gold), rule) or "", rule.parse(gold)) for gold in golds]
    assert sum(graded) == len(golds) == 500
    assert not rule.guard.given_up
