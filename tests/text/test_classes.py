from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_tts.text.answer import AnswerRule, shared_forms

quick = settings(derandomize=True, deadline=None, max_examples=100)
ANSWERS = st.lists(st.none() | st.text("abc", max_size=3), max_size=10)


def near(one, other):
    """Equal within 1: not transitive."""
    return abs(int(one) - int(other)) <= 1


def test_equality_that_is_not_transitive_gives_the_same_classes_in_any_order():
    for answers in permutations(["1", "2", "3", "4", "2", None]):
        forms = dict(zip(answers, shared_forms(answers, near), strict=True))
        assert forms == {"1": "1", "2": "1", "3": "3", "4": "3", None: None}


@quick
@given(ANSWERS, st.randoms(use_true_random=False))
def test_classes_depend_on_the_distinct_answers_alone(answers, random):
    def equal(one, other):
        return len(set(one) & set(other)) > 0 or one == other

    forms = shared_forms(answers, equal)
    again = [*answers, *answers]
    random.shuffle(again)
    assert dict(zip(answers, forms, strict=True)) == dict(zip(again, shared_forms(again, equal), strict=True))
    assert {form for form in forms if form is not None} <= set(answers)
    for answer, form in zip(answers, forms, strict=True):
        assert (answer is None) == (form is None)
        assert form is None or equal(form, answer)
        assert shared_forms([form], equal) == [form]


@quick
@given(ANSWERS)
def test_an_equivalence_gives_its_own_classes(answers):
    def equal(one, other):
        return sorted(one) == sorted(other)

    forms = shared_forms(answers, equal)
    for one, first in zip(answers, forms, strict=True):
        for other, second in zip(answers, forms, strict=True):
            if one is not None and other is not None:
                assert (first == second) == equal(one, other)


def test_each_pair_is_compared_once_and_equal_texts_never():
    asked = []

    def equal(one, other):
        asked.append((one, other))
        return False

    shared_forms(["a", "b", "a", "c", None, "b"], equal)
    assert asked == [("a", "b"), ("a", "c"), ("b", "c")]


def test_what_a_tolerance_lets_pass_is_right_and_still_two_votes():
    rule = AnswerRule("decimal", 0.5)
    assert rule.is_right("18.4", "18")
    assert shared_forms(["18", "18.4", "18"], rule.equal) == ["18", "18.4", "18"]


def test_many_different_numbers_are_not_compared_in_pairs(monkeypatch):
    monkeypatch.setattr(AnswerRule, "equal", lambda *arguments: pytest.fail("two numbers are compared"))
    answers = [*map(str, range(20)), None, "3"]
    assert shared_forms(answers, AnswerRule("decimal").equal_by_value) == answers
    assert shared_forms(answers, AnswerRule("words").equal_by_value) == answers


def test_equal_values_in_latex_are_one_vote():
    rule = AnswerRule("latex")
    raws = [r"\text{18}", "18", "x=18", "7", "7.0", "x = 6 \\cdot 3", "x=7"]
    forms = shared_forms([rule.parse(raw) for raw in raws], rule.equal)
    assert forms == ["18", "18", "18", "7", "7", "18", "7"]
