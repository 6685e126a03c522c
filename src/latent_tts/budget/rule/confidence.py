"""`budget/rule=confidence`: a posterior over answers in which every rollout has a confidence of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import ClassVar

import numpy as np

from latent_tts.budget import Rule, Tally
from latent_tts.errors import check_fields, require
from latent_tts.types import Bools, Float64, Int64, text_digest

SOURCES = ("likelihood", "score")
AGGREGATORS = ("majority", "weighted")
PREFIXES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48)  # the rollouts that a fit looks at
RIDGE, TOLERANCE = 1e-3, 1e-9  # of a fit; the ridge keeps separable examples finite


@dataclass(frozen=True)
class Calibration:
    """What a rollout is worth as evidence for its answer, as fitted on other questions.

    Attributes:
        vote: log-odds that a rollout of average confidence adds to its answer.
        slope: what one standard deviation of confidence adds to that.
        unseen: log-weight of an answer that no rollout has given yet.
        mean, sd: of the confidence.
    """

    vote: float
    slope: float
    unseen: float
    mean: float
    sd: float

    def __str__(self) -> str:
        """A digest, since another calibration is another rule."""
        return text_digest(" ".join(f"{value:.6g}" for value in astuple(self)))[:6]


@dataclass(frozen=True)
class Confidence(Rule):
    """Stops when the vote's pick has a posterior mass of `threshold` among all answers.

    Each rollout i has a confidence x_i: the log-probability of its answer, or its score. The posterior mass of an
    answer is the softmax over answers of summed evidence,

        P(a) = exp(e_a) / (exp(unseen) + sum over b of exp(e_b)),
        e_a = sum over rollouts i with answer a of (vote + slope x_i),

    where x is standardised. In CGES the evidence of a rollout is the log-odds of its confidence being right, as if
    rollouts were independent given the right answer. They are not: a model repeats its mistakes. So `vote`, `slope` and
    `unseen` are fitted (by maximum likelihood, on prefixes of rollouts) to the answer that all n rollouts of a question
    elect: P is then the probability that drawing on changes nothing. They are fitted on the run that `calibration`
    names, on questions of `valid`; it must not contain any question that the run reports.

    Source: CGES, confidence-guided early stopping (arXiv 2511.02603); the fit is this project's own.

    Attributes:
        calibration: folder of a run of the same model and sampler on other questions.
        threshold: in (0, 1).
        by: `likelihood` or `score`: what a rollout's confidence is.
        aggregator: `majority` or `weighted`: the vote that it stops for.
        fitted: filled in by the pipeline from `calibration`.
    """

    calibration: str | None = None
    threshold: float = 0.95
    by: str = "likelihood"
    aggregator: str = "majority"
    fitted: Calibration | None = None

    name: ClassVar[str] = "confidence"

    def __post_init__(self) -> None:
        check_fields("budget.rule", self, threshold="a number in (0, 1)", by=SOURCES, aggregator=AGGREGATORS)
        named = isinstance(self.calibration, str)
        allowed = "must be the folder of a run of this model and sampler on questions of valid, to be calibrated on"
        require("budget.rule.calibration", self.calibration, named, allowed)

    @property
    def needs_score(self) -> bool:
        """Whether confidences or votes are scores."""
        return self.by == "score" or super().needs_score

    def enough(self, tally: Tally) -> Bools:
        """Whether the posterior mass is high enough, after each rollout."""
        return self.posterior(tally) >= self.threshold

    def posterior(self, tally: Tally) -> Float64:
        """The posterior mass (N,) of the vote's pick after each rollout; 0 before anything can be picked."""
        from scipy.special import softmax  # slow to import, and every run imports this module

        fitted = self.fitted
        assert fitted is not None, "not calibrated"
        count_NK, confidence_NK = evidence(tally, self.by, fitted.mean, fitted.sd)
        logit_NK = np.where(count_NK > 0, fitted.vote * count_NK + fitted.slope * confidence_NK, -np.inf)
        mass_NK = softmax(np.column_stack([logit_NK, np.full(tally.drawn, fitted.unseen)]), axis=1)
        leader_N1 = tally.votes.leader_N[:, None]
        return np.where(tally.votes.lead_N > 0, np.take_along_axis(mass_NK, leader_N1, 1)[:, 0], 0.0)


def confidences(tally: Tally, by: str) -> Float64:
    """The confidence (N,) of each rollout."""
    return tally.logprob_N if by == "likelihood" else tally.score_N


def evidence(tally: Tally, by: str, mean: float, sd: float) -> tuple[Float64, Float64]:
    """After each rollout, for each class, how many rollouts voted for it and the sum of their confidences (N, K)."""
    standard_N = (confidences(tally, by) - mean) / sd
    return tally.sums(np.ones(tally.drawn)), tally.sums(np.where(np.isfinite(standard_N), standard_N, 0.0))


def calibrate(tallies: Sequence[Tally], by: str) -> Calibration:
    """Fit the evidence of rollouts to what all of a question's rollouts elect.

    Args:
        tallies: questions with all their n rollouts.
        by: `likelihood` or `score`.

    Raises:
        ValueError: no question has a readable answer and confidences that differ.
    """
    given = (pair for tally in tallies for pair in zip(tally.answers, confidences(tally, by), strict=True))
    read_N = np.array([value for answer, value in given if answer is not None and np.isfinite(value)])
    if len(read_N) < 2 or not read_N.std() > 0:
        raise ValueError("its rollouts have no readable answers with confidences that differ")
    mean, sd = float(read_N.mean()), float(read_N.std())
    rows, elected = [], []
    for tally in tallies:
        if not tally.votes.lead_N[-1] > 0:
            continue
        chosen = tally.answers[int(tally.votes.first_NK[-1, tally.votes.leader_N[-1]])]
        for count in (count for count in PREFIXES if count < tally.drawn):
            part = tally.until(count)
            counts_NK, sums_NK = evidence(part, by, mean, sd)
            rows.append(np.stack([counts_NK[-1], sums_NK[-1]], axis=-1))
            elected.append(part.class_N[part.answers.index(chosen)] if chosen in part.answers else -1)
    if not rows:
        raise ValueError("a calibration needs questions with two rollouts or more, one of them readable")
    vote, slope, unseen = _fit(rows, np.array(elected))
    return Calibration(vote, slope, unseen, mean, sd)


def _fit(rows: Sequence[Float64], elected_E: Int64) -> tuple[float, float, float]:
    """Vote, slope and unseen of the most likely softmax; E examples of K classes each."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    width = max(map(len, rows))
    # the last column is an answer that nobody has given yet
    feature_EKF = np.zeros((len(rows), width + 1, 3))
    there_EK = np.zeros((len(rows), width + 1), dtype=bool)
    for place, row in enumerate(rows):
        feature_EKF[place, : len(row), :2] = row
        there_EK[place, : len(row)] = row[:, 0] > 0
    feature_EKF[:, -1, 2], there_EK[:, -1] = 1.0, True
    target_E = np.where(elected_E < 0, width, elected_E)
    wanted_EF = np.take_along_axis(feature_EKF, target_E[:, None, None], 1)[:, 0]

    def log_mass(weight_F: Float64) -> Float64:
        return log_softmax(np.where(there_EK, feature_EKF @ weight_F, -np.inf), axis=1)

    def loss(weight_F: Float64) -> tuple[float, Float64]:
        log_mass_EK = log_mass(weight_F)
        chosen_E = np.take_along_axis(log_mass_EK, target_E[:, None], 1)[:, 0]
        mean_EF = np.einsum("ek,ekf->ef", np.exp(log_mass_EK), feature_EKF)
        return RIDGE / 2 * weight_F @ weight_F - chosen_E.mean(), (mean_EF - wanted_EF).mean(0) + RIDGE * weight_F

    def curvature(weight_F: Float64) -> Float64:
        mass_EK = np.exp(log_mass(weight_F))
        mean_EF = np.einsum("ek,ekf->ef", mass_EK, feature_EKF)
        second_FF = np.einsum("ek,ekf,ekg->fg", mass_EK, feature_EKF, feature_EKF)
        return (second_FF - mean_EF.T @ mean_EF) / len(rows) + RIDGE * np.eye(3)

    found = minimize(loss, np.zeros(3), jac=True, hess=curvature, method="trust-exact", options={"gtol": TOLERANCE})
    return float(found.x[0]), float(found.x[1]), float(found.x[2])
