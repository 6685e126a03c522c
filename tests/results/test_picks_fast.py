"""Picks by counting answers against the comparison of all pairs, and their bounds on memory."""

import tracemalloc
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from quadratic import accuracy
from tables import picked_accuracy

from latent_tts.aggregator import Picks
from latent_tts.aggregator.best_of_n import BestOfN
from latent_tts.aggregator.likelihood import Likelihood
from latent_tts.aggregator.majority import Majority
from latent_tts.aggregator.weighted import Weighted
from latent_tts.results import statistics as stats
from latent_tts.types import RolloutArrays


def random_rollouts(questions, drawn, answers, seed=0):
    """Rollouts with ties of every kind, unreadable predictions and missing scores."""
    generator = np.random.default_rng(seed)
    shape = (questions, drawn)
    predictions = generator.integers(-1, answers, shape) * generator.integers(0, 2, (questions, 1))
    scores = generator.normal(0, 4, shape).round(seed % 2)
    scores[generator.random(shape) < 0.1] = np.nan
    # right is not a function of the prediction, so that it matters which rollout is picked
    return RolloutArrays(predictions, generator.random(shape) < 0.5, generator.normal(size=shape).round(1) - 1, scores)


VOTES = [Majority(), Weighted(1.0), Weighted(1 / 64), Weighted(64.0)]


@pytest.mark.every_other
@pytest.mark.parametrize("aggregator", VOTES, ids=str)
@pytest.mark.parametrize(("drawn", "answers"), [(2, 2), (5, 3), (16, 4), (64, 3), (64, 500), (257, 40)])
def test_votes_equal_the_comparison_of_all_pairs(aggregator, drawn, answers):
    rollouts = random_rollouts(30, drawn, answers, seed=drawn + answers)
    budgets = sorted({1, 2, 3, drawn // 2, drawn - 1, drawn} - {0})
    budgets = [n for n in budgets if n <= drawn]
    together = stats.picked_accuracies(aggregator, rollouts, budgets)
    for n, got in zip(budgets, together, strict=True):
        expected = accuracy(aggregator, rollouts, np.concatenate(list(stats.subsets(drawn, n))))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(picked_accuracy(aggregator, rollouts, n), got)


@pytest.mark.parametrize("aggregator", [BestOfN(), Likelihood()], ids=str)
@pytest.mark.parametrize(("drawn", "n"), [(1, 1), (9, 4), (10, 5), (300, 1), (64, 64), (16, 2)])
def test_ranks_equal_the_comparison_in_every_subset(aggregator, drawn, n):
    rollouts = random_rollouts(30, drawn, 4)
    expected = accuracy(aggregator, rollouts, np.concatenate(list(stats.subsets(drawn, n))))
    np.testing.assert_allclose(picked_accuracy(aggregator, rollouts, n), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregator", [*VOTES, BestOfN(), Likelihood()], ids=str)
@pytest.mark.parametrize("drawn", [2, 64, 257, 5000])
def test_at_one_rollout_each_figure_is_exact(aggregator, drawn):
    rollouts = random_rollouts(5, drawn, 6)
    scored = ~np.isnan(rollouts.score_QD) if aggregator.needs_score else True
    readable = True if isinstance(aggregator, (BestOfN, Likelihood)) else rollouts.prediction_QD >= 0
    expected = (rollouts.correct_QD & scored & readable).mean(1)
    np.testing.assert_allclose(picked_accuracy(aggregator, rollouts, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregator", VOTES, ids=str)
def test_a_question_has_its_figures_whatever_the_others_and_their_order(aggregator):
    rollouts = random_rollouts(200, 24, 30)
    budgets = [2, 7, 12]
    together = stats.picked_accuracies(aggregator, rollouts, budgets)
    alone = [stats.picked_accuracies(aggregator, rollouts.questions(slice(q, q + 1)), budgets) for q in range(200)]
    np.testing.assert_array_equal(together, np.concatenate(alone, axis=1))
    backwards = stats.picked_accuracies(aggregator, rollouts.questions(slice(None, None, -1)), budgets[::-1])
    np.testing.assert_array_equal(together, backwards[::-1, ::-1])


def test_a_cold_vote_does_not_underflow_in_subsets_without_the_best_rollout():
    """Where the best score is left out, the others' weights would all be 0 relative to it."""
    scores = np.array([[100.0, 1.0, 0.0, -0.5, -80.0, -90.0]])
    predictions = np.array([[0, 1, 2, 2, 3, 4]])
    for right in range(5):
        rollouts = RolloutArrays(predictions, predictions == right, np.zeros((1, 6)), scores)
        for n in range(1, 7):
            members = np.concatenate(list(stats.subsets(6, n)))
            expected = accuracy(Weighted(1 / 64), rollouts, members)
            assert picked_accuracy(Weighted(1 / 64), rollouts, n) == pytest.approx(expected)


@dataclass(frozen=True)
class Median:
    """An add-on rule: the rollout of middle likelihood; nothing out of one alone."""

    name: ClassVar[str] = "median"
    needs_score: ClassVar[bool] = False

    def rule(self, rollouts):
        def pick(members_SN):
            if members_SN.shape[1] == 1:
                return np.full((len(rollouts.correct_QD), len(members_SN)), -1)
            order_QSN = rollouts.answer_logprob_QD[:, members_SN].argsort(-1, kind="stable")
            middle_QS = order_QSN[..., members_SN.shape[1] // 2]
            return np.take_along_axis(np.broadcast_to(members_SN, order_QSN.shape), middle_QS[..., None], -1)[..., 0]

        return Picks(pick)


def test_any_other_rule_is_asked_for_the_pick_of_each_subset():
    rollouts = random_rollouts(40, 20, 5)
    budgets = [1, 2, 8, 20]
    got = stats.picked_accuracies(Median(), rollouts, budgets)
    assert (got[0] == 0).all()
    for n, found in zip(budgets[1:], got[1:], strict=True):
        members = np.concatenate(list(stats.subsets(20, n)))
        expected = [
            np.mean([correct[sorted(m, key=lambda i: (values[i], i))[n // 2]] for m in members.tolist()])
            for correct, values in zip(rollouts.correct_QD, rollouts.answer_logprob_QD, strict=True)
        ]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [0, -1, 5])
@pytest.mark.parametrize("aggregator", [Majority(), BestOfN(), Median()], ids=str)
def test_a_budget_that_was_not_drawn_is_refused(aggregator, n):
    with pytest.raises(ValueError, match=f"n={n} "):
        stats.picked_accuracies(aggregator, random_rollouts(2, 4, 3), [1, n])


@pytest.mark.parametrize(("drawn", "answers"), [(20_000, 5000), pytest.param(2**20, 300_000, marks=pytest.mark.slow)])
def test_memory_grows_with_rollouts_and_not_with_their_square(drawn, answers):
    generator = np.random.default_rng(0)
    predictions = generator.integers(0, answers, (1, drawn))
    rollouts = RolloutArrays(
        predictions, predictions < answers // 2, np.zeros((1, drawn)), generator.normal(size=(1, drawn))
    )
    tracemalloc.start()
    figures = stats.picked_accuracies(Weighted(1.0), rollouts, [1, drawn // 2, drawn])
    agreement = [stats.agreement(predictions, n) for n in (1, drawn)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ((figures >= 0) & (figures <= 1)).all()
    assert agreement[0] == 1
    assert agreement[1] == np.bincount(predictions[0]).max() / drawn
    assert peak < 20e6 + 400 * drawn
