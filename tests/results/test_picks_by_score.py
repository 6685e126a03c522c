"""`best_of_n`, `weighted` and the choice of its temperature, against plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import picked_accuracy, rollout_lists

from latent_tts.aggregator.best_of_n import BestOfN
from latent_tts.aggregator.majority import Majority
from latent_tts.aggregator.weighted import Weighted
from latent_tts.errors import UsageError
from latent_tts.results import statistics as stats
from latent_tts.types import RolloutArrays

GOLD = 1
VALUES = [-1e6, -3.0, -0.5, 0.0, 0.25, 2.0, 1e6, -math.inf, math.nan]  # scores, and none
quick = settings(derandomize=True, deadline=None, max_examples=60)


def arrays(predictions, scores):
    """Rollouts of questions whose right answer is GOLD; -1 is unreadable."""
    predictions, scores = np.array(predictions), np.asarray(scores)
    return RolloutArrays(predictions, predictions == GOLD, np.zeros(predictions.shape), scores)


def plain_best_of_n(predictions, scores, members):
    scored = [i for i in members if math.isfinite(scores[i])]
    return bool(scored) and predictions[max(scored, key=lambda i: (scores[i], -i))] == GOLD


def plain_weighted(temperature):
    def pick(predictions, scores, members):
        voters = [i for i in members if math.isfinite(scores[i]) and predictions[i] != -1]
        most = max((scores[i] for i in voters), default=0.0)
        votes = {}
        for i in voters:
            votes.setdefault(predictions[i], []).append(math.exp((scores[i] - most) / temperature))
        sums = {prediction: math.fsum(weights) for prediction, weights in votes.items()}
        best = max(sums.values(), default=0)
        # insertion order is rollout order, so the first of equally heavy predictions has the lowest rollout
        return next((p == GOLD for p, weight in sums.items() if weight >= best * (1 - 1e-12)), False)

    return pick


PICKS = [
    pytest.param(BestOfN(), plain_best_of_n, id="best_of_n"),
    pytest.param(Weighted(1.0), plain_weighted(1.0), id="weighted"),
    pytest.param(Weighted(1 / 64), plain_weighted(1 / 64), id="weighted, cold"),
    pytest.param(Weighted(64.0), plain_weighted(64.0), id="weighted, hot"),
]


@pytest.mark.every_other
@pytest.mark.parametrize(("aggregator", "plain"), PICKS)
@quick
@given(table=rollout_lists(VALUES), data=st.data())
def test_picks_equal_plain_python_on_the_same_subsets(aggregator, plain, table, data):
    predictions, scores = table
    drawn = len(predictions[0])
    n = data.draw(st.sampled_from([drawn, data.draw(st.integers(1, drawn))]))
    subsets = np.concatenate(list(stats.subsets(drawn, n))).tolist()
    expected = [np.mean([plain(p, s, members) for members in subsets]) for p, s in zip(*table, strict=True)]
    for dtype in (np.float64, np.float32):
        rollouts = arrays(predictions, np.array(scores, dtype))
        np.testing.assert_allclose(picked_accuracy(aggregator, rollouts, n), expected)


def test_an_unreadable_best_of_n_winner_is_wrong():
    assert picked_accuracy(BestOfN(), arrays([[GOLD, -1]], [[1.0, 2.0]]), 2) == [0]
    assert picked_accuracy(BestOfN(), arrays([[GOLD, -1]], [[2.0, 1.0]]), 2) == [1]


def test_a_vote_ignores_an_unreadable_rollout_however_good_its_score():
    assert picked_accuracy(Weighted(1.0), arrays([[-1, 2, GOLD]], [[1000.0, 0.0, 0.1]]), 3) == [1]


def test_without_any_score_nothing_is_picked():
    unscored = arrays([[GOLD, GOLD]], [[np.nan, np.nan]])
    assert picked_accuracy(BestOfN(), unscored, 2) == [0]
    assert picked_accuracy(Weighted(1.0), unscored, 2) == [0]
    coldest = picked_accuracy(Weighted(1e-320), arrays([[2, GOLD, 2]], [[-1.0, 3.0, 2.9]]), 3)
    assert coldest == [1]


@quick
@given(table=rollout_lists(VALUES))
def test_equal_scores_make_the_weighted_vote_a_majority_vote(table):
    predictions, _ = table
    equal = arrays(predictions, np.full(np.shape(predictions), 3.7))
    drawn = equal.correct_QD.shape[1]
    np.testing.assert_array_equal(
        picked_accuracy(Weighted(0.3), equal, drawn), picked_accuracy(Majority(), equal, drawn)
    )


@pytest.mark.parametrize("temperature", [0, -1, float("inf"), float("nan"), "hot", True])
def test_a_temperature_is_a_positive_number(temperature):
    with pytest.raises(UsageError, match="positive number"):
        Weighted(temperature)


def test_the_chosen_temperature_is_right_most_often():
    generator = np.random.default_rng(3)
    predictions = generator.integers(0, 3, (200, 8))
    # scores that are noisy but good: neither the coldest nor the hottest vote is best
    scores = 2.0 * (predictions == GOLD) + generator.normal(0, 1.5, predictions.shape)
    rollouts = arrays(predictions, scores)
    accuracy = {t: picked_accuracy(Weighted(t), rollouts, 8).mean() for t in stats.TEMPERATURES}
    chosen = stats.best_temperature(rollouts)
    assert accuracy[chosen] == max(accuracy.values())
    assert accuracy[chosen] > max(accuracy[stats.TEMPERATURES[0]], accuracy[stats.TEMPERATURES[-1]])


def test_equally_good_temperatures_give_the_one_nearest_to_one():
    assert stats.best_temperature(arrays([[GOLD, GOLD]], [[0.0, 5.0]])) == 1.0
    assert stats.best_temperature(arrays([[GOLD, GOLD]], [[0.0, 5.0]]), [0.5, 2.0, 4.0]) == 0.5
    # a wrong favourite against two right ones: only a hot vote is right
    cold_is_wrong = arrays([[2, GOLD, GOLD]], [[3.0, 0.0, 0.0]])
    assert stats.best_temperature(cold_is_wrong, [0.5, 1.0, 4.0, 8.0, 64.0]) == 8.0
