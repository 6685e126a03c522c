"""`budget/rule=lockout` stops only where nothing can change the pick, and as soon as nothing can."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tallies import elected, tally_of

from latent_tts.aggregator.weighted import Weighted
from latent_tts.budget.rule.lockout import Lockout
from latent_tts.errors import UsageError
from latent_tts.results import statistics
from latent_tts.text.answer import shared_forms
from latent_tts.types import RolloutArrays

ANSWERS = st.lists(st.sampled_from(["7", "12", "3", "100", None]), min_size=1, max_size=14)


def near(one: str, other: str) -> bool:
    """An equality that is not transitive."""
    return abs(float(one) - float(other)) <= 1


# short strings come first when classes are formed: "2" joins "1.5" and "2.75" in a class of its own
NEAR_ANSWERS = st.lists(st.sampled_from(["1.5", "2.75", "2", "3.5", "1", "10", None]), min_size=1, max_size=12)


@given(ANSWERS)
@example(["7", None, None, "12"])
@example(["12", "7", "7", "12"])
def test_the_pick_is_that_of_all_rollouts(answers):
    stop = Lockout().stop(tally_of(answers))
    if stop is not None:
        assert stop.used < len(answers)
        assert elected(answers[: stop.used]) == elected(answers)


@given(ANSWERS, st.integers(1, 6))
def test_it_says_no_more_than_it_has_seen(answers, left):
    n = len(answers) + left
    stop = Lockout().stop(tally_of(answers, n))
    for count in range(1, len(answers) + 1):
        early = Lockout().stop(tally_of(answers[:count], n))
        assert early == (stop if stop is not None and stop.used <= count else None)


@given(ANSWERS, st.integers(1, 6))
def test_where_it_goes_on_some_completion_changes_the_pick(answers, left):
    n = len(answers) + left
    if Lockout().stop(tally_of(answers, n)) is not None:
        return
    now = elected(answers)
    completions = [[rival] * left for rival in {*answers, "new"} - {None}]
    picks = {elected([*answers, *completion]) for completion in completions}
    assert now is None or picks != {now}


def test_a_tie_that_goes_to_the_leader_locks():
    # three votes to none, three rollouts left: at worst 3 to 3, and the tie goes to the answer of rollout 0
    assert Lockout().stop(tally_of(["7", "7", "7"], 6)).used == 3
    # the rival was voted for first, so that the tie would go its way
    assert Lockout().stop(tally_of(["12", "7", "7", "7"], 6)) is None
    assert Lockout().stop(tally_of(["7", "12", "7", "7"], 6)).used == 4


def test_unreadable_rollouts_vote_for_none_and_use_up_rollouts():
    assert Lockout().stop(tally_of(["7", None, None, None], 8)) is None
    assert Lockout().stop(tally_of(["7", "7", None, None, None, None], 8)).used == 6
    assert Lockout().stop(tally_of([None] * 7, 8)) is None
    assert Lockout().stop(tally_of([None] * 8, 8)) is None


@given(NEAR_ANSWERS)
@example(["1.5", "2.75", "2.75", "2"])
@example(["2.75", "1.5", "2.75", "1.5", "2.75", "2", "2", "2"])
def test_the_elected_class_is_that_of_all_rollouts_though_a_late_string_forms_it_anew(answers):
    stop = Lockout().stop(tally_of(answers, equal=near))
    if stop is None:
        return
    string = Counter(answer for answer in answers[: stop.used] if answer is not None).most_common(1)[0][0]
    for count in range(stop.used, len(answers) + 1):
        forms = shared_forms(answers[:count], near)
        assert forms[elected(answers[:count], near)] == forms[answers.index(string)]


def test_classes_that_a_late_string_can_form_anew_do_not_lock_by_their_size():
    # "1.5" and "2" are one class of four, until "1" comes: it leads "1.5" and "2"; here the class of "2" splits
    answers = ["2", "1.5", "2", "1.5"]
    assert shared_forms(answers, near) == ["2"] * 4
    assert Lockout().stop(tally_of(answers, 7, equal=near)) is None
    assert Lockout().stop(tally_of(["7"] * 4, 7)) is not None
    assert Lockout().stop(tally_of(["2", "2", "2", "2"], 7, equal=near)).used == 4


SCORED = st.lists(
    st.tuples(st.sampled_from(["7", "12", "3", None]), st.sampled_from([-2.0, -0.3, 0.0, 0.5, 1.0])),
    min_size=1, max_size=12,
)  # fmt: skip


@given(SCORED, st.sampled_from([0.25, 1.0, 8.0]))
def test_a_weighted_pick_is_that_of_all_rollouts(rollouts, temperature):
    answers, scores = zip(*rollouts, strict=True)
    log_weights = [score / temperature for score in scores]
    tally = tally_of(answers, log_weights=log_weights, max_log_weight=1.0 / temperature)
    stop = Lockout("weighted").stop(tally)
    if stop is not None:
        weights = [math.exp(value) for value in log_weights]
        used = slice(stop.used)
        assert elected(answers[used], weights=weights[used]) == elected(answers, weights=weights)


def test_a_weighted_lead_is_held_against_the_largest_weight_that_may_come():
    scores = [0.0] * 4
    assert Lockout("weighted").stop(tally_of(["7"] * 4, 6, log_weights=scores, max_log_weight=0.0)) is not None
    assert Lockout("weighted").stop(tally_of(["7"] * 4, 6, log_weights=scores, max_log_weight=2.0)) is None


def test_a_weighted_tie_does_not_lock():
    answers, log_weights = ["7", "12", "12", "3"], [0.0, 0.0, 0.0, -1.0]
    assert Lockout("weighted").stop(tally_of(answers, 5, log_weights=log_weights)) is None
    weights = [math.exp(value) for value in log_weights]
    assert elected([*answers, "7"], weights=[*weights, 1.0]) == 0  # the rival that was voted for first


def test_weights_that_underflow_are_no_counts():
    # the last vote may be for "12", too: a tie, that the underflown weight of rollout 0 decides
    log_weights = [-1000.0, 0.0]
    tally = tally_of(["12", "7"], 3, log_weights=log_weights, max_log_weight=0.0)
    assert tally.weight_N.tolist() == [0.0, 1.0]
    assert Lockout("weighted").stop(tally) is None
    scores_13 = np.array([[*log_weights, 0.0]])
    arrays = RolloutArrays(np.array([[0, 1, 0]]), None, answer_logprob_QD=scores_13, score_QD=scores_13)
    assert statistics.supported_picks(Weighted(1.0), arrays)[0].tolist() == [0]


def test_it_saves_what_the_field_says_it_does():
    """Simulated means at n=64 of answers .8/.1/.1, .95/.05 and .4/.35/.25."""
    generator = np.random.default_rng(0)
    for shares, mean in (([0.8, 0.1, 0.1], 39.2), ([0.95, 0.05], 34.7), ([0.4, 0.35, 0.25], 59.6)):
        drawn = generator.choice(len(shares), size=(400, 64), p=shares).astype(str)
        stops = [Lockout().stop(tally_of(list(row))) for row in drawn]
        used = [64 if stop is None else stop.used for stop in stops]
        assert np.mean(used) == pytest.approx(mean, abs=1.0)


def test_an_aggregator_without_votes_is_refused():
    with pytest.raises(UsageError, match=r"budget.rule.aggregator=best_of_n: must be majority or weighted"):
        Lockout("best_of_n")
