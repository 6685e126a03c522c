"""`budget=adaptive` and `budget=shared` on rollouts that are there already: who gets how many, in which rounds."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tallies import tally_of

from latent_tts.budget import Rule, Stop
from latent_tts.budget import play as play_rounds
from latent_tts.budget.adaptive import Adaptive
from latent_tts.budget.rule.confidence import Calibration, Confidence
from latent_tts.budget.rule.lockout import Lockout
from latent_tts.budget.rule.posterior import Posterior
from latent_tts.budget.shared import Shared, chance_of_new_best, chance_of_new_leader
from latent_tts.errors import UsageError


def play(budget, questions):
    """Rounds until nobody gets more; how many each question had after each round, and the stops."""
    history = []

    def tallies_after(drawn_Q):
        history.append(drawn_Q.tolist())
        return [tally.until(count) for tally, count in zip(questions, history[-1], strict=True)]

    _, stops = play_rounds(budget, len(questions), tallies_after)
    return history[1:], stops


QUESTIONS = st.lists(
    st.lists(st.sampled_from(["7", "12", "3", None]), min_size=16, max_size=16), min_size=1, max_size=4
)


@given(QUESTIONS, st.integers(1, 9), st.one_of(st.none(), st.integers(1, 9)))
def test_a_question_goes_on_until_its_rule_has_enough(answers, size, first):
    questions = [tally_of(each) for each in answers]
    history, stops = play(Adaptive(Lockout(), size, first), questions)
    for place, (tally, stop) in enumerate(zip(questions, stops, strict=True)):
        whole = Lockout().stop(tally)
        assert stop.used == (16 if whole is None else whole.used)
        assert stop.why == ("n" if whole is None else "lockout")
        sizes = np.diff([0, *dict.fromkeys(round[place] for round in history)])
        expected = [first or size, *[size] * 20]
        ends = np.minimum(np.cumsum(expected), 16)
        assert np.cumsum(sizes).tolist() == ends[: len(sizes)].tolist()
        assert ends[len(sizes) - 1] >= stop.used
        assert len(sizes) == 1 or ends[len(sizes) - 2] < stop.used, "it stops at the first round that is enough"


def test_what_a_round_drew_beyond_the_stop_is_not_used():
    history, stops = play(Adaptive(Posterior(0.95), round=8), [tally_of(["7"] * 64)])
    assert (history, stops) == ([[8]], [Stop(4, "posterior")])


@dataclass(frozen=True)
class Never(Rule):
    name: ClassVar[str] = "never"
    at_cap: ClassVar[str] = "nothing known"

    def enough(self, tally):
        return np.zeros(tally.drawn, dtype=bool)


def test_a_question_without_a_stop_has_n_and_says_so():
    assert play(Adaptive(Never(), 5), [tally_of(["7"] * 12)]) == ([[5], [10], [12]], [Stop(12, "n", "nothing known")])


def test_names_tell_settings_apart():
    names = {
        Adaptive(Posterior(0.95)).label,
        Adaptive(Posterior(0.9)).label,
        Adaptive(Posterior(0.9), 4).label,
        Adaptive(Posterior(0.9), 4, 2).label,
        Adaptive(Lockout()).label,
        Shared(100).label,
        Shared(200).label,
        Shared(100, "gflop").label,
        Shared(1234567).label,
        Shared(1234568).label,
        Adaptive(Confidence("a", fitted=Calibration(0.9, 0.1, 1.0, -2.0, 1.0))).label,
        Adaptive(Confidence("a", fitted=Calibration(0.9, 0.2, 1.0, -2.0, 1.0))).label,
    }
    assert len(names) == 12


@given(QUESTIONS, st.integers(1, 4), st.integers(1, 5), st.integers(0, 60))
def test_shared_spends_its_total_and_no_more(answers, first, size, extra):
    questions = [tally_of(each) for each in answers]
    total = first * len(questions) + extra
    budget = Shared(total, first=first, round=size, step=0.5)
    history, stops = play(budget, questions)
    used = [stop.used for stop in stops]
    assert sum(used) <= total
    assert min(used) >= first
    ended = [tally.until(count) for tally, count in zip(questions, used, strict=True)]
    worthless = [chance_of_new_leader(tally, min(size, 16 - tally.drawn)) == 0 or tally.drawn == 16 for tally in ended]
    assert sum(used) == total or all(worthless)
    assert all(np.less_equal(one, other).all() for one, other in pairwise(history))


def test_shared_gives_to_the_question_that_is_open():
    questions = [tally_of(["7"] * 32), tally_of(["7", "12"] * 16), tally_of(["3"] * 32)]
    _, stops = play(Shared(30, first=4, round=4, step=0.3), questions)
    assert [stop.used for stop in stops] == [4, 22, 4]
    assert {stop.why for stop in stops} == {"total"}


def test_shared_counts_gflop_with_the_prompt():
    # a round costs 1 GFLOP for the prompt, which runs again, and 0.5 per rollout: two rounds of two questions cost 12
    questions = [tally_of(["7", "12"] * 8), tally_of(["7", "12"] * 8)]
    _, stops = play(Shared(12.0, "gflop", first=4, round=4, step=1.0), questions)
    assert [stop.used for stop in stops] == [8, 8]
    _, stops = play(Shared(11.9, "gflop", first=4, round=4, step=1.0), questions)
    assert [stop.used for stop in stops] == [8, 4]


def test_shared_for_best_of_n_gives_to_the_question_whose_scores_differ():
    same, open_ = [1.0, 1.0, 1.0, 1.0] * 8, [1.0, 2.0, 3.0, 1.5] * 8
    questions = [tally_of(["7"] * 32, scores=same), tally_of(["7"] * 32, scores=open_)]
    _, stops = play(Shared(24, first=4, round=4, step=0.5, aggregator="best_of_n"), questions)
    assert [stop.used for stop in stops] == [4, 20]
    assert chance_of_new_best(questions[0], 4) == 0.0
    assert chance_of_new_best(tally_of(["7"] * 4), 4) == 1.0


def test_the_chance_of_an_overtaking_is_that_of_its_model():
    generator, rollouts = np.random.default_rng(0), 4
    shares = generator.beta(3 + 1, 2 + 1, 200_000)  # of the leader, with 3 votes to 2
    gained = generator.binomial(rollouts, 1 - shares)
    lead = 3 + rollouts - gained - (2 + gained)
    expected = (lead < 0).mean() + 0.5 * (lead == 0).mean()
    tally = tally_of(["7", "12", "7", "12", "7"], 64)
    assert chance_of_new_leader(tally, rollouts) == pytest.approx(expected, abs=0.004)
    assert chance_of_new_leader(tally_of(["7"] * 5, 9), 4) == 0.0
    assert chance_of_new_leader(tally_of([None] * 5, 9), 4) == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Adaptive(Lockout(), 0), "budget.round=0: must be a positive integer"),
        (lambda: Adaptive(Lockout(), 8, 0), "budget.first=0: must be a positive integer"),
        (lambda: Shared(0), "budget.total=0: must be a positive number"),
        (lambda: Shared(9, "seconds"), "budget.unit=seconds: must be rollouts or gflop"),
        (lambda: Shared(9, step=0), "budget.step=0: must be a number in"),
        (lambda: Shared(9, aggregator="weighted"), "budget.aggregator=weighted: must be majority or best_of_n"),
        (lambda: Shared(9).check(10, 64, "decimal"), "budget.total=9: 10 questions with budget.first=4 need 40"),
    ],
)
def test_a_setting_out_of_range_is_named(make, words):
    with pytest.raises(UsageError) as refused:
        make()
    assert words in str(refused.value)
