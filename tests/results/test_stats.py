from collections import Counter
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import picked_accuracy, rollout_lists

from latent_tts.aggregator.likelihood import Likelihood
from latent_tts.aggregator.majority import Majority
from latent_tts.results import statistics as stats
from latent_tts.types import RolloutArrays

GOLD = 1
VALUES = [-4.0, -2.5, -1.0, -0.5]  # log-probabilities
quick = settings(derandomize=True, deadline=None, max_examples=40)


def arrays(predictions, logprobs=None):
    """Rollouts of questions whose right answer is GOLD; -1 is unreadable."""
    predictions = np.array(predictions, dtype=np.int64)
    logprobs = np.zeros(predictions.shape) if logprobs is None else np.array(logprobs, dtype=np.float64)
    return RolloutArrays(predictions, predictions == GOLD, logprobs, np.full(predictions.shape, np.nan))


def plain_majority(predictions, logprobs, members):
    votes = {}
    for i in members:  # in rollout order, so the first of equally frequent predictions was seen first
        if predictions[i] != -1:
            votes[predictions[i]] = votes.get(predictions[i], 0) + 1
    return bool(votes) and max(votes, key=votes.get) == GOLD


def plain_likelihood(predictions, logprobs, members):
    best = members[0]
    for i in members[1:]:
        if logprobs[i] > logprobs[best]:
            best = i
    return predictions[best] == GOLD


def over_all_subsets(plain, predictions, logprobs, n):
    subsets = list(combinations(range(len(predictions)), n))
    return sum(plain(predictions, logprobs, members) for members in subsets) / len(subsets)


AGGREGATORS = [
    pytest.param(Majority(), plain_majority, id="majority"),
    pytest.param(Likelihood(), plain_likelihood, id="likelihood"),
]


# Coverage


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=7))
def test_coverage_is_the_share_of_subsets_with_a_right_rollout(correct):
    for n in range(1, len(correct) + 1):
        subsets = list(combinations(correct, n))
        expected = sum(map(any, subsets)) / len(subsets)
        assert stats.coverage(np.array([correct]), n)[0] == pytest.approx(expected, abs=1e-12)


@quick
@given(drawn=st.integers(1, 80), seed=st.integers(0, 999))
def test_coverage_is_a_fraction_that_never_falls_and_ends_at_any(drawn, seed):
    generator = np.random.default_rng(seed)
    correct = generator.random((20, drawn)) < generator.random((20, 1))
    curve = np.array([stats.coverage(correct, n) for n in range(1, drawn + 1)])
    assert (curve >= 0).all()
    assert (curve <= 1).all()
    assert (np.diff(curve, axis=0) >= 0).all()
    np.testing.assert_allclose(curve[0], correct.mean(1), atol=1e-12)
    np.testing.assert_array_equal(curve[-1], correct.any(1))


@pytest.mark.parametrize(
    ("right", "drawn", "n", "expected"),
    [(1, 4, 2, 1 / 2), (2, 4, 2, 5 / 6), (2, 5, 3, 9 / 10), (0, 4, 4, 0), (1, 64, 16, 1 / 4)],
)
def test_coverage_of_hand_worked_cases(right, drawn, n, expected):
    correct = np.arange(drawn)[None, :] >= drawn - right
    assert stats.coverage(correct, n) == pytest.approx([expected])


@pytest.mark.parametrize("n", [0, -1, 5])
def test_coverage_refuses_an_n_that_was_not_drawn(n):
    with pytest.raises(ValueError, match=f"n={n} "):
        stats.coverage(np.ones((1, 4), dtype=bool), n)


@pytest.mark.parametrize(("drawn", "counts", "tolerance"), [(64, 65, 1e-12), (1024, 1025, 1e-12), (2**20, 40, 1e-8)])
def test_coverage_is_within_rounding_of_exact_fractions(drawn, counts, tolerance):
    correct = np.arange(drawn)[None, :] < np.arange(counts)[:, None]
    for n in (1, 2, 37, drawn // 2, drawn - 1, drawn):
        none, exact = Fraction(1), []
        for right in range(counts):
            exact.append(float(1 - none))
            # of no one more right rollout in the subset; later terms are below any tolerance
            none *= Fraction(drawn - n - right, drawn - right) if drawn - n > right and none > 1e-30 else 0
        np.testing.assert_allclose(stats.coverage(correct, n), exact, rtol=0, atol=tolerance)


# Subsets and picks


def subsets_of(drawn, n):
    return np.concatenate(list(stats.subsets(drawn, n)))


@pytest.mark.parametrize(("drawn", "n"), [(12, 5), (64, 16), (300, 2), (10_000, 7)])
def test_random_subsets_have_n_members_and_are_always_the_same(drawn, n):
    members = subsets_of(drawn, n)
    assert members.shape == (stats.SUBSETS, n)
    assert (np.diff(members, axis=1) > 0).all()
    assert members.min() >= 0
    assert members.max() < drawn
    np.testing.assert_array_equal(members, subsets_of(drawn, n))


@pytest.mark.parametrize(("drawn", "n"), [(1, 1), (5, 5), (64, 1), (256, 1), (300, 1), (16, 2), (10, 5), (7, 6)])
def test_where_subsets_are_few_each_is_there_once(drawn, n):
    assert subsets_of(drawn, n).tolist() == list(map(list, combinations(range(drawn), n)))


def test_subsets_are_nested_in_those_of_larger_budgets():
    for small, large in pairwise([2, 3, 8, 33, 62]):
        for inner, outer in zip(subsets_of(64, small), subsets_of(64, large), strict=True):
            assert set(inner) < set(outer)


def test_permutations_in_pieces_are_those_made_at_once():
    drawn = 5000
    pieces = list(stats._permutations(drawn))
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate(pieces), stats._permutations_of(drawn, 0, stats.SUBSETS))
    assert (np.sort(pieces[-1], axis=1) == np.arange(drawn)).all()


@pytest.mark.parametrize(("drawn", "n"), [(12, 3), (16, 4), (64, 16), (64, 32)])
def test_rollouts_are_about_equally_often_in_random_subsets(drawn, n):
    share = n / drawn
    error = np.sqrt(share * (1 - share) / stats.SUBSETS)
    often = np.bincount(subsets_of(drawn, n).ravel(), minlength=drawn) / stats.SUBSETS
    assert np.abs(often - share).max() < 4 * error


def test_subsets_are_mostly_different():
    assert len(np.unique(subsets_of(32, 8), axis=0)) > 250


@pytest.mark.parametrize(("aggregator", "plain"), AGGREGATORS)
@quick
@given(table=rollout_lists(VALUES))
def test_a_pick_out_of_all_rollouts_equals_plain_python(aggregator, plain, table):
    predictions, logprobs = table
    drawn = len(predictions[0])
    expected = [plain(p, lp, range(drawn)) for p, lp in zip(*table, strict=True)]
    np.testing.assert_array_equal(picked_accuracy(aggregator, arrays(predictions, logprobs), drawn), expected)


@quick
@given(table=rollout_lists(VALUES), data=st.data())
def test_votes_out_of_fewer_rollouts_equal_plain_python_on_the_same_subsets(table, data):
    predictions, logprobs = table
    drawn = len(predictions[0])
    n = data.draw(st.integers(1, drawn))
    members = subsets_of(drawn, n).tolist()
    expected = [np.mean([plain_majority(p, lp, m) for m in members]) for p, lp in zip(*table, strict=True)]
    np.testing.assert_allclose(picked_accuracy(Majority(), arrays(predictions, logprobs), n), expected)


@pytest.mark.parametrize(("drawn", "n"), [(8, 1), (8, 3), (8, 7), (11, 4)])  # 330 subsets are more than are taken
@pytest.mark.parametrize(("aggregator", "plain"), AGGREGATORS)
def test_picks_out_of_fewer_rollouts_are_means_over_all_subsets_or_close_to_them(aggregator, plain, drawn, n):
    generator = np.random.default_rng(n)
    predictions, logprobs = generator.integers(-1, 4, (40, drawn)), generator.normal(size=(40, drawn)).round(1)
    expected = [
        over_all_subsets(plain, p, lp, n) for p, lp in zip(predictions.tolist(), logprobs.tolist(), strict=True)
    ]
    got = picked_accuracy(aggregator, arrays(predictions, logprobs), n)
    exact = drawn == 8 or isinstance(aggregator, Likelihood)
    error = 0 if exact else 0.5 / np.sqrt(stats.SUBSETS)
    np.testing.assert_allclose(got, expected, rtol=0, atol=4.5 * error + 1e-12)
    assert got.mean() == pytest.approx(np.mean(expected), abs=0.03 if error else 1e-12)


@pytest.mark.parametrize(("drawn", "n"), [(1, 1), (6, 1), (6, 3), (6, 6), (300, 1), (64, 20), (5000, 3)])
def test_agreement_is_the_share_of_the_most_frequent_answer_in_the_same_subsets(drawn, n):
    predictions = np.random.default_rng(n).integers(-1, 4, (5, drawn))
    predictions[1] = -1
    members = subsets_of(drawn, n)
    expected = [np.mean([Counter(row[row >= 0]).most_common(1)[0][1] if (row >= 0).any() else 0 for row in p[members]])
                for p in predictions]  # fmt: skip
    np.testing.assert_allclose(stats.agreement(predictions, n), np.array(expected) / n, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("aggregator", "plain"), AGGREGATORS)
def test_many_questions_are_the_same_as_one_at_a_time(aggregator, plain):
    generator = np.random.default_rng(0)
    rollouts = arrays(generator.integers(-1, 3, (300, 4)), generator.normal(size=(300, 4)))
    together = picked_accuracy(aggregator, rollouts, 3)
    alone = [picked_accuracy(aggregator, rollouts.questions(slice(i, i + 1)), 3)[0] for i in range(300)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("predictions", "right"),
    [
        ([1, 1, 2], True),
        ([2, 1, 1, 2], False),  # a tie goes to the lowest rollout number
        ([1, 2, 2, 1], True),
        ([-1, -1, -1, 1], True),  # unreadable ones never vote
        ([-1, -1], False),
    ],
)
def test_majority_of_hand_worked_cases(predictions, right):
    assert picked_accuracy(Majority(), arrays([predictions]), len(predictions)) == [right]


@pytest.mark.parametrize(
    ("predictions", "logprobs", "right"),
    [
        ([2, 1, 2], [-2, -1, -3], True),
        ([1, 2], [-1, -1], True),  # a tie goes to the lowest rollout number
        ([2, 1], [-1, -1], False),
        ([1, -1], [-5, -1], False),  # an unreadable winner is wrong
    ],
)
def test_likelihood_of_hand_worked_cases(predictions, logprobs, right):
    assert picked_accuracy(Likelihood(), arrays([predictions], [logprobs]), len(predictions)) == [right]


# Diversity


def plain_dissimilarity(latents_NTD):
    """1 - cosine with each earlier row's latent of the same step, summed."""
    units = latents_NTD / np.linalg.norm(latents_NTD, axis=-1, keepdims=True)
    return np.array([[sum(1 - a @ b for b in column[:i]) for column in units.swapaxes(0, 1) for a in [column[i]]]
                     for i in range(len(units))])  # fmt: skip


@quick
@given(count=st.integers(2, 6), steps=st.integers(1, 4), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_diversity_is_the_mean_over_pairs_and_steps(count, steps, width, seed):
    latents = np.random.default_rng(seed).normal(size=(count, steps, width))
    units = latents / np.linalg.norm(latents, axis=-1, keepdims=True)
    pairs = [1 - (units[i] * units[j]).sum(-1) for i, j in combinations(range(count), 2)]
    assert stats.diversity(plain_dissimilarity(latents)) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_diversity_counts_the_steps_that_all_rollouts_have():
    values = np.array([[0.0, 0.0, 0.0], [0.5, 1.0, np.nan], [1.0, np.nan, np.nan]])
    assert stats.diversity(values) == pytest.approx(0.5)
    assert stats.diversity(values[:2]) == pytest.approx(0.75)


def test_diversity_is_never_negative():
    assert stats.diversity(np.full((3, 2), -1e-16)) == 0


@pytest.mark.parametrize("values", [np.zeros((1, 3)), np.zeros((3, 0)), np.full((2, 3), np.nan)])
def test_one_rollout_or_no_latents_have_no_figure_for_diversity(values):
    assert stats.diversity(values) is None
