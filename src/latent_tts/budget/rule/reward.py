"""`budget/rule=reward`: for best-of-n, stop when the expected gain in the best score is below a cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import gammaln, stdtr

from latent_tts.budget import MIN_SCORES, Rule, Tally, standing_of_best
from latent_tts.errors import check_fields
from latent_tts.types import Bools, Float64


@dataclass(frozen=True)
class Reward(Rule):
    """Stops when one more rollout is expected to raise the best score by less than `cost`.

    Weitzman's rule: with known scores F and recall of the best one z so far, drawing on is worth its cost as long as
    E[max(X - z, 0)] > cost, whatever the number of rollouts left. F is not known here, and taken for Student's t around
    the mean m of the k scores so far, with scale s (see `standing_of_best`). With u = (z - m) / s,

        E[max(X - z, 0)] = s ( f(u) (k - 1 + u^2) / (k - 2) - u (1 - F(u)) ),

    f and F its density and distribution. It first decides after three scored rollouts. A rollout without a
    score is one without a gain. With a distribution that is only estimated the rule is no longer proven to be optimal.

    Source: Weitzman 1979, Optimal search for the best alternative (Econometrica 47, 641); BEACON (arXiv 2510.15945)
    applies it to sampling from language models.

    Attributes:
        cost: of one rollout, in units of the score; above 0.
    """

    cost: float = 0.1

    name: ClassVar[str] = "reward"
    aggregator = "best_of_n"

    def __post_init__(self) -> None:
        check_fields("budget.rule", self, cost="a positive number")

    def enough(self, tally: Tally) -> Bools:
        """Whether the expected gain is below the cost, after each rollout."""
        return expected_gains(tally.score_N) < self.cost


def expected_gains(score_N: Float64) -> Float64:
    """What one more rollout is expected to add to the best score, after each rollout; inf before that is known."""
    count_N, scale_N, best_N = standing_of_best(score_N)
    gain_N = scale_N * unit_gain(best_N, np.maximum(count_N, MIN_SCORES) - 1)
    return np.where(count_N >= MIN_SCORES, gain_N, np.inf)


def unit_gain(u_N: Float64, freedom_N: Float64) -> Float64:
    """E[max(X - u, 0)] of Student's t with some degrees of freedom, each above 1."""
    log_density_N = (
        gammaln((freedom_N + 1) / 2)
        - gammaln(freedom_N / 2)
        - np.log(freedom_N * np.pi) / 2
        - (freedom_N + 1) / 2 * np.log1p(np.square(u_N) / freedom_N)
    )
    return np.exp(log_density_N) * (freedom_N + np.square(u_N)) / (freedom_N - 1) - u_N * stdtr(freedom_N, -u_N)
