"""The rules that look at probabilities: formulas against slow ones, guarantees by simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import betaincinv
from scipy.stats import t as student
from tallies import tally_of

from latent_tts.budget import NOT_CERTIFIED
from latent_tts.budget.rule.certified import Certified
from latent_tts.budget.rule.confidence import Confidence, calibrate
from latent_tts.budget.rule.lockout import Lockout
from latent_tts.budget.rule.posterior import Posterior
from latent_tts.budget.rule.reward import Reward, expected_gains
from latent_tts.budget.shared import Shared
from latent_tts.errors import RunError, UsageError

ANSWERS = st.lists(st.sampled_from(["7", "12", "3", None]), min_size=1, max_size=40)
FITTED = calibrate([tally_of(["7", "7", "12", "7"], logprobs=[-0.1, -0.5, -2.0, -0.2])], "likelihood")
RULES = [
    Lockout(),
    Certified(0.3),
    Certified(0.3, answers=3),
    Posterior(0.9),
    Confidence(calibration="run", threshold=0.8, fitted=FITTED),
    Reward(0.3),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@given(ANSWERS, st.integers(0, 5))
def test_a_rule_depends_on_nothing_that_comes_after(rule, answers, left):
    generator = np.random.default_rng(len(answers))
    logprobs, scores = -generator.exponential(size=len(answers)), generator.normal(size=len(answers))
    tally = tally_of(answers, len(answers) + left, logprobs=logprobs, scores=scores)
    stop = rule.stop(tally)
    for count in range(len(answers) + 1):
        assert rule.stop(tally.until(count)) == (stop if stop is not None and stop.used <= count else None)


def ratio(a: int, b: int) -> float:
    """2^(a+b) B(a+1, b+1)."""
    return 2 ** (a + b) * math.factorial(a) * math.factorial(b) / math.factorial(a + b + 1)


@given(ANSWERS, st.sampled_from([None, 3, 5]), st.sampled_from([0.05, 0.3]))
def test_certified_stops_at_the_first_rollout_with_every_ratio_above_the_threshold(answers, known, delta):
    n = 64

    def enough(count: int) -> bool:
        seen = [answer for answer in answers[:count] if answer is not None]
        votes = sorted((seen.count(answer) for answer in set(seen)), reverse=True)
        if not votes:
            return False
        a = votes[0] - (known is None)
        rivals = votes[1:] or [0]
        threshold = ((known or n) - 1) / delta
        return all(a > b and ratio(a, b) >= threshold for b in rivals)

    expected = next((count for count in range(1, len(answers) + 1) if enough(count)), None)
    stop = Certified(delta, known).stop(tally_of(answers, n))
    assert (stop and stop.used) == expected
    assert stop is None or stop.certificate == f"error <= {delta}"


def test_certified_stops_unanimous_rollouts_where_the_field_says_it_does():
    assert Certified(0.05, answers=2).stop(tally_of(["7"] * 64)).used == 8
    assert Certified(0.05).stop(tally_of(["7"] * 64)).used == 16
    assert Certified(0.05).at_cap == NOT_CERTIFIED


def test_certified_names_more_answers_than_were_declared():
    with pytest.raises(RunError, match=r"budget.rule.answers=2: a question has 3 different answers"):
        Certified(0.05, answers=2).stop(tally_of(["7", "12", "3"], 64))


def test_posterior_is_the_beta_rule():
    assert Posterior(0.95).stop(tally_of(["7"] * 9)).used == 4
    for answers in (["12", "7", "7", "7"], ["12", "3"] * 2 + ["7"] * 6, [None, "7", None]):
        a, b = sorted([*(answers.count(each) for each in {*answers} - {None}), 0, 0], reverse=True)[:2]
        above, whole = (quad(lambda p, a=a, b=b: p**a * (1 - p) ** b, low, 1)[0] for low in (0.5, 0.0))
        last = [posterior for posterior in (above / whole - 1e-6, above / whole + 1e-6) if posterior > 0.5]
        stops = [Posterior(threshold).stop(tally_of(answers)) for threshold in last]
        assert [stop is not None for stop in stops] == [True, False][: len(stops)]


def test_posterior_stops_on_the_wrong_answer_as_often_as_its_docs_say():
    generator = np.random.default_rng(1)
    drawn = generator.choice(3, size=(1500, 64), p=[0.4, 0.35, 0.25]).astype(str)
    tallies = [tally_of(list(row)) for row in drawn]
    stops = [(Posterior(0.95).stop(tally), tally) for tally in tallies]
    stopped = [(stop, tally) for stop, tally in stops if stop is not None and stop.used < 64]
    wrong = [tally.votes.leader_N[stop.used - 1] for stop, tally in stopped]
    answers = [_string_of(tally, leader) for (_, tally), leader in zip(stopped, wrong, strict=True)]
    assert len(stopped) / len(drawn) == pytest.approx(0.34, abs=0.04)
    assert np.mean([answer != "0" for answer in answers]) == pytest.approx(0.30, abs=0.06)


def _string_of(tally, leader: int) -> str:
    return list(dict.fromkeys(answer for answer in tally.answers if answer is not None))[leader]


def test_expected_gains_are_those_of_students_t():
    scores = np.array([0.3, np.nan, 1.7, -0.4, 1.1, 5.0, np.nan])
    gains = expected_gains(scores)
    assert np.isinf(gains[:3]).all()
    for count in range(4, len(scores) + 1):
        seen = scores[:count][~np.isnan(scores[:count])]
        k, best = len(seen), seen.max()
        law = student(k - 1, seen.mean(), seen.std(ddof=1) * math.sqrt(1 + 1 / k))
        expected = quad(lambda x, law=law, best=best: (x - best) * law.pdf(x), best, np.inf)[0]
        assert gains[count - 1] == pytest.approx(expected, rel=1e-6)
    assert expected_gains(scores + 1e6) == pytest.approx(gains, rel=1e-5)


def test_reward_stops_where_scores_do_not_differ_and_goes_on_where_one_may_be_better():
    assert Reward(1e-9).stop(tally_of(["7"] * 5, 64, scores=[2.0] * 5)).used == 3
    assert Reward(1e-9).stop(tally_of(["7"] * 3, 64, scores=[2.0, 1.0, 3.0])) is None
    assert Reward(10.0).stop(tally_of(["7"] * 3, 64, scores=[2.0, 1.0, 3.0])).used == 3
    assert Reward(10.0).stop(tally_of(["7"] * 3, 64)) is None


def made_up_questions(count: int, seed: int, n: int = 32):
    """Questions of which a part is hard; answers with more log-probability are the frequent ones more often."""
    generator = np.random.default_rng(seed)
    tallies = []
    for _ in range(count):
        share = generator.uniform(0.3, 1.0)
        right = generator.random(n) < share
        answers = np.where(right, "0", generator.integers(1, 4, n).astype(str))
        logprobs = np.where(right, -0.2, -1.5) - generator.exponential(size=n)
        tallies.append(tally_of(list(answers), logprobs=logprobs))
    return tallies


def test_confidence_says_how_often_drawing_on_changes_nothing():
    fitted = calibrate(made_up_questions(300, 0), "likelihood")
    assert fitted.vote > 0
    assert fitted.slope > 0, "log-probability tells in these questions"
    rule = Confidence(calibration="run", threshold=0.9, fitted=fitted)
    stopped = agreed = 0
    stated = []
    for tally in made_up_questions(400, 1):
        posterior_N, leader_N = rule.posterior(tally), tally.votes.leader_N
        for place in (2, 5, 9):
            stated.append((posterior_N[place], leader_N[place] == leader_N[-1]))
        stop = rule.stop(tally)
        if stop is not None and stop.used < tally.n:
            stopped += 1
            agreed += leader_N[stop.used - 1] == leader_N[-1]
    assert stopped > 200
    assert agreed / stopped > 0.85
    said, happened = np.array(stated).T
    assert said.mean() == pytest.approx(happened.mean(), abs=0.04)


def test_weights_of_which_the_largest_is_not_known_are_relative_to_the_largest_so_far():
    tally = tally_of(list("abc"), log_weights=[-770.0, -768.0, -800.0], max_log_weight=None)
    np.testing.assert_allclose(tally.weight_N, np.exp([-2.0, 0.0, -32.0]))


def test_a_total_that_no_round_is_worth_is_named(caplog):
    shared, tallies = Shared(total=100.0, first=4, round=2), [tally_of("aaaa", n=16), tally_of("bbbb", n=4)]
    assert shared.next(tallies).tolist() == [0, 0]
    assert [stop.why for stop in shared.stops(tallies)] == ["worth", "n"]
    assert "budget.total=100: 8 spent; the next 2 rollouts" in caplog.text
    caplog.clear()
    assert [stop.why for stop in Shared(total=8.0, first=4, round=2).stops(tallies)] == ["worth", "n"]
    assert not caplog.text  # nothing of the total is left
    assert [stop.why for stop in Shared(total=9.0).stops([tally_of("aabb", n=16)])] == ["total"]


def test_a_total_below_the_first_rollouts_is_named(caplog):
    shared = Shared(total=3.0, unit="gflop", first=4)
    tallies = [replace(tally_of(answers, n=16), rounds=1) for answers in ("aabb", "aaab")]
    assert shared.next(tallies).tolist() == [0, 0]
    assert "budget.total=3: the first 4 rollouts of all questions alone took 6 GFLOP" in caplog.text


def test_confidence_without_a_spread_is_refused():
    with pytest.raises(ValueError, match="confidences that differ"):
        calibrate([tally_of(["7"] * 4)], "likelihood")
    with pytest.raises(ValueError, match="confidences that differ"):
        calibrate([tally_of([None] * 4, logprobs=[-1, -2, -3, -4])], "likelihood")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Certified(0.0), "budget.rule.delta=0.0: must be a number in"),
        (lambda: Certified(1.0), "budget.rule.delta=1.0: must be a number in"),
        (lambda: Certified("x"), "budget.rule.delta=x: must be a number in"),
        (lambda: Certified(0.05, answers=1), "budget.rule.answers=1: must be 2 or more"),
        (lambda: Certified(0.05).check("latex"), "budget/rule=certified: certifies answers that are equal as strings"),
        (lambda: Posterior(0.5), "budget.rule.threshold=0.5: must be a number in"),
        (lambda: Posterior(1.0), "budget.rule.threshold=1.0: must be a number in"),
        (lambda: Confidence(), "budget.rule.calibration=null: must be the folder of a run"),
        (lambda: Confidence("run", threshold=1.0), "budget.rule.threshold=1.0: must be a number in"),
        (lambda: Confidence("run", by="luck"), "budget.rule.by=luck: must be likelihood or score"),
        (
            lambda: Confidence("run", aggregator="best_of_n"),
            "aggregator=best_of_n: must be majority or weighted",
        ),
        (lambda: Reward(0.0), "budget.rule.cost=0.0: must be a positive number"),
    ],
)
def test_a_setting_out_of_range_is_named(make, words):
    with pytest.raises(UsageError) as refused:
        make()
    assert words in str(refused.value)


# Simulation of the guarantee


def upper_bound(wrong: int, trials: int, confidence: float = 0.999) -> float:
    """Exact one-sided upper bound of a probability (Clopper and Pearson)."""
    return 1.0 if wrong == trials else float(betaincinv(wrong + 1, trials - wrong, confidence))


def shares_of_many() -> list[float]:
    """200 answers, all equally probable but for one that is twice as probable."""
    return [2 / 201] + [1 / 201] * 199


CAP, TRIALS, DELTA = 10_000, 400, 0.05
SIMULATED = [
    ([0.6, 0.4], 0.5),
    ([0.5, 0.3, 0.2], 0.5),
    ([0.4, 0.35, 0.25], 0.5),
    (shares_of_many(), 0.0),
]


class LooksAtTheEnd:
    """A planted rule that breaks the guarantee: the test of the end alone, applied after every rollout."""

    def stop_of(self, codes: np.ndarray, classes: int) -> tuple[int, int] | None:
        """The first rollout at which a one-sided 95 % test of leader against runner-up is passed, and the leader."""
        counts = np.cumsum(np.eye(classes, dtype=np.int32)[codes], axis=0)
        order = np.sort(counts, axis=1)
        lead, second = order[:, -1], order[:, -2]
        enough = (lead - second > 1.645 * np.sqrt(lead + second)) & (lead >= 4)
        return (int(enough.argmax()), int(counts[enough.argmax()].argmax())) if enough.any() else None


def simulate(stop_of, shares, seed: int) -> tuple[int, int]:
    """How many of `TRIALS` questions were stopped, and how many of them with a wrong leader."""
    generator = np.random.default_rng(seed)
    stopped = wrong = 0
    for _ in range(TRIALS):
        codes = generator.choice(len(shares), size=CAP, p=shares)
        found = stop_of(codes, len(shares))
        if found is not None:
            stopped += 1
            wrong += found[1] != 0
    return stopped, wrong


def certified_stop(rule: Certified):
    """The rule on a long sequence, looked at in growing prefixes so that most of it need not be counted."""

    def stop_of(codes: np.ndarray, classes: int) -> tuple[int, int] | None:
        del classes
        for count in (100, 1_000, CAP):
            answers = [str(code) for code in codes[:count]]
            stop = rule.stop(tally_of(answers, CAP))
            if stop is not None:
                values, counts = np.unique(codes[: stop.used], return_counts=True)
                return stop.used, int(values[counts.argmax()])
        return None

    return stop_of


@pytest.mark.slow
@pytest.mark.parametrize(("shares", "least"), SIMULATED, ids=["60", "50", "40", "many"])
@pytest.mark.parametrize("known", [False, True], ids=["any_number", "K"])
def test_certified_is_wrong_at_most_as_often_as_it_says(shares, least, known):
    rule = Certified(DELTA, answers=len(shares) if known else None)
    stopped, wrong = simulate(certified_stop(rule), shares, seed=len(shares) + known)
    assert stopped / TRIALS >= least
    assert upper_bound(wrong, TRIALS) < DELTA


@pytest.mark.slow
def test_the_simulation_finds_a_rule_that_looks_again_and_again():
    stopped, wrong = simulate(LooksAtTheEnd().stop_of, [0.4, 0.35, 0.25], seed=9)
    assert stopped > TRIALS / 2
    assert upper_bound(wrong, TRIALS) > DELTA
