"""Intervals: Wilson's at 0/1 values, never of width 0, continuous, and as often right as they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import picked_accuracy

from latent_tts.aggregator.majority import Majority
from latent_tts.results import statistics as stats
from latent_tts.types import RolloutArrays

quick = settings(derandomize=True, deadline=None, max_examples=60)
SHARES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.99]
QUESTIONS = [10, 20, 50, 100, 200, 500, 1000]


def wilson(hits, n, z=1.959963984540054):
    share = hits / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


@quick
@given(st.integers(1, 2000), st.data())
def test_values_of_zero_and_one_have_wilsons_interval(questions, data):
    hits = data.draw(st.integers(0, questions))
    values = np.arange(questions) < hits
    assert stats.interval(values.astype(float)) == pytest.approx(wilson(hits, questions), abs=1e-9)


values_in_range = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=40)


@quick
@given(values_in_range, st.data())
def test_the_mean_lies_within_and_the_interval_within_the_range_with_a_width(values, data):
    clusters = np.array(data.draw(st.lists(st.integers(0, 5), min_size=len(values), max_size=len(values))))
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (0.0, 2.0)):
        found = stats.interval(np.array(values), clusters, low=low, high=high)
        assert low <= found[0] <= np.mean(values) + 1e-12
        assert np.mean(values) - 1e-12 <= found[1] <= high
        assert found[1] - found[0] > 1e-5


@quick
@given(values_in_range)
def test_up_and_down_are_alike_and_the_scale_does_not_matter(values):
    values = np.array(values)
    low, high = stats.interval(values)
    assert stats.interval(1 - values) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    assert stats.interval(5 * values - 3, low=-3.0, high=2.0) == pytest.approx((5 * low - 3, 5 * high - 3), abs=1e-8)


def test_values_that_are_all_equal_up_to_rounding_have_the_interval_of_equal_ones():
    equal = np.full(50, 0.3)
    noisy = equal + np.random.default_rng(0).normal(0, 1e-16, 50)
    slightly = equal + np.random.default_rng(0).normal(0, 1e-8, 50)
    assert stats.interval(noisy) == pytest.approx(stats.interval(equal), abs=1e-9)
    assert stats.interval(slightly) == pytest.approx(stats.interval(equal), abs=1e-3)
    low, high = stats.interval(equal)
    assert low < 0.28
    assert high > 0.32


def test_many_values_inside_the_range_have_the_normal_interval():
    values = np.random.default_rng(0).beta(20, 30, 1000)
    low, high = stats.interval(values)
    half = 1.96 * values.std() / np.sqrt(1000)
    assert low == pytest.approx(values.mean() - half, abs=0.03 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.03 * half)


def test_sixty_values_inside_the_range_have_about_students_interval():
    values = 0.5 + 0.02 * np.random.default_rng(1).normal(size=60)
    low, high = stats.interval(values)
    half = 2.001 * values.std(ddof=1) / np.sqrt(60)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_entries_of_a_question_count_as_one_and_larger_clusters_weigh_more():
    generator = np.random.default_rng(2)
    by_question = generator.random(30)
    clusters = generator.permutation(np.repeat(np.arange(30), 4))
    assert stats.interval(by_question[clusters], clusters) == pytest.approx(stats.interval(by_question), abs=1e-12)
    uneven = np.repeat(np.arange(30), [40] + [1] * 29)
    low, high = stats.interval(by_question[uneven], uneven)
    plain = stats.interval(by_question)
    assert high - low > 1.5 * (plain[1] - plain[0])


def test_paired_differences_have_a_width_even_where_nothing_differs():
    ones = np.ones(100)
    mean, low, high = stats.paired_difference(ones, ones, np.arange(100))
    reach = 1.96**2 / (100 + 1.96**2)
    assert (mean, low, high) == pytest.approx((0, -reach, reach), abs=1e-4)


def test_a_paired_difference_is_of_whole_questions():
    clusters = np.array([0, 1] * 50)
    a = np.where(clusters == 0, 1.0, 0.0)
    mean, low, high = stats.paired_difference(a, np.zeros(100), clusters)
    assert (mean, low) == (0.5, pytest.approx(stats.interval(np.array([1.0, 0.0]), low=-1.0)[0]))
    _, alone_low, alone_high = stats.paired_difference(a, np.zeros(100), np.arange(100))
    assert high - low > 4 * (alone_high - alone_low)


@pytest.mark.parametrize("spread", [0.3, 3.0, 1000.0])
def test_a_curve_has_no_step_where_n_reaches_what_was_drawn(spread):
    generator = np.random.default_rng(3)
    drawn, share = 16, generator.beta(0.4 * spread, 0.6 * spread, (400, 1))
    correct = generator.random((400, drawn)) < share
    rollouts = RolloutArrays(correct.astype(int), correct, np.zeros(correct.shape), np.zeros(correct.shape))
    widths = {}
    for n in range(11, drawn + 1):  # even n have ties of two answers, so that they are compared with even ones
        low, high = stats.interval(picked_accuracy(Majority(), rollouts, n))
        widths[n] = high - low
    # votes become more uniform within a question towards n = drawn: widths grow, at the same pace throughout
    steps = {n: widths[n] / widths[n - 1] - 1 for n in range(12, drawn + 1)}
    assert steps[drawn] < 0.05 + 2 * max(abs(steps[n]) for n in range(12, drawn))


# How often an interval holds the mean. `ten` says where at least ten hits and ten misses are expected.


def coverage_of(draw, low, seed, repeats):
    """Shares of intervals that hold the true mean, by (share, questions)."""
    generator = np.random.default_rng(seed)
    held = {}
    for share in SHARES:
        for questions in QUESTIONS:
            hits = 0
            for _ in range(repeats):
                values, clusters, truth = draw(generator, share, questions)
                bottom, top = stats.interval(values, clusters, low=low)
                hits += bottom - 1e-12 <= truth <= top + 1e-12
            held[share, questions] = hits / repeats
    return held


def spread_out(drawn, concentration):
    """Shares of `drawn` rollouts that are right: questions differ in difficulty by a beta distribution."""

    def draw(generator, share, questions):
        rates = generator.beta(concentration * share, concentration * (1 - share), questions)
        return generator.binomial(drawn, rates) / drawn, None, share

    return draw


def all_alike(generator, share, questions):
    return generator.binomial(64, share, questions) / 64, None, share


def seeds_per_question(generator, share, questions):
    rates = generator.beta(share, 1 - share, questions)
    clusters = np.tile(np.arange(questions), 3)
    return (generator.random(3 * questions) < rates[clusters]).astype(float), clusters, share


def differences(drawn, loss):
    def draw(generator, share, questions):
        rates = generator.beta(share, 1 - share, questions)
        a, b = (generator.binomial(drawn, rates * kept) / drawn for kept in (1, 1 - loss))
        return a - b, None, share * loss

    return draw


CASES = {
    "shares of 64 rollouts": (spread_out(64, 1.0), 0.0),
    "shares of 4 rollouts": (spread_out(4, 1.0), 0.0),
    "easy or hard questions": (spread_out(64, 0.3), 0.0),
    "questions of about one difficulty": (spread_out(64, 10.0), 0.0),
    "questions of one difficulty": (all_alike, 0.0),
    "three seeds": (seeds_per_question, 0.0),
    "differences": (differences(1, 0.1), -1.0),
    "differences of shares": (differences(64, 0.1), -1.0),
}


def exact_coverage_of_zero_and_one(share, questions):
    log_factorial = np.cumsum(np.log(np.maximum(np.arange(questions + 1), 1)))
    hits = np.arange(questions + 1)
    log_chance = log_factorial[-1] - log_factorial - log_factorial[::-1]
    chance = np.exp(log_chance + hits * np.log(share) + (questions - hits) * np.log1p(-share))
    ends = np.array([stats.interval((hits < h).astype(float)[:questions]) for h in hits])
    return chance[(ends[:, 0] <= share) & (share <= ends[:, 1])].sum()


@pytest.mark.slow
def test_intervals_of_zero_and_one_hold_the_mean_as_often_as_they_say():
    held = {(p, q): exact_coverage_of_zero_and_one(p, q) for p in SHARES for q in QUESTIONS}
    assert min(held.values()) >= 0.90
    ten = [value for (p, q), value in held.items() if q * min(p, 1 - p) >= 10 - 1e-9]
    assert min(ten) >= 0.93
    assert max(ten) <= 0.97
    assert 0.94 <= np.mean(list(held.values())) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_intervals_hold_the_mean_as_often_as_they_say(case):
    draw, low = CASES[case]
    repeats = 1000
    error = np.sqrt(0.95 * 0.05 / repeats)
    held = coverage_of(draw, low, list(CASES).index(case), repeats)
    assert min(held.values()) >= 0.90 - 2 * error
    # of differences a hit is one that differs
    ten = [value for (p, q), value in held.items() if q * min(p, 1 - p) >= (40 if low < 0 else 10 - 1e-9)]
    assert min(ten) >= 0.93 - 3 * error
    assert max(ten) <= 0.97 + 3 * error
    # rates of differences near 0 are certain to be held: nothing differs
    assert 0.94 <= np.mean(list(held.values())) <= (0.975 if low < 0 else 0.97)
