"""`budget=shared`: one budget for all questions; each round goes where a rollout is worth most."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import numpy as np
from scipy.special import betaln, gammaln, stdtr

from latent_tts.budget import MIN_SCORES, SCORED, Budget, Stop, Tally, standing_of_best
from latent_tts.errors import check_fields, require
from latent_tts.types import Float64, Int64

UNITS = ("rollouts", "gflop")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared(Budget):
    """Spends one budget on all questions, in rounds.

    Every question first gets `first` rollouts. Then each round goes to the share `step` of the questions where rollouts
    are worth most, `round` rollouts each, until `total` is spent or no rollout is worth anything. What a round of
    rollouts is worth is the chance that it changes the pick, per unit of cost:

    - `majority`: the chance that the runner-up overtakes the leader if all r rollouts of the round go to one of both.
      With a and b votes and a uniform prior over their shares, the runner-up's votes are beta-binomial with parameters
      r, b + 1 and a + 1. Where no vote of the round can change the leader, its rollouts are worth nothing.
    - `best_of_n`: the chance that one of r scores exceeds the best so far, 1 - F(u)^r, with F Student's t around the
      mean of the k scores so far (see `budget/rule=reward`); 1 before there are three.

    Both are exact for the models named and only an ordering for real rollouts. Of questions of equal worth, the one
    with fewer rollouts is first, then the earlier one of the task, so that nothing depends on batches.

    Attributes:
        total: the budget of the whole set; in GFLOP it includes the prompt, which every round runs again.
        unit: `rollouts` or `gflop`. In GFLOP a round is given while its expected cost, at the question's mean per
            rollout so far, is left; what is spent differs from the total by the error of that expectation. A total
            below the cost of the first rollouts is overspent, with a warning.
        first: rollouts that every question gets.
        round: rollouts that a chosen question gets at a time.
        step: share of the questions that a round goes to, in (0, 1].
        aggregator: the pick that rollouts are to change: `majority` or `best_of_n`.
    """

    total: float
    unit: str = "rollouts"
    first: int = 4
    round: int = 4
    step: float = 0.1
    aggregator: str = "majority"

    name: ClassVar[str] = "shared"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(
            "budget", self, first="a positive integer", round="a positive integer", total="a positive number",
            unit=UNITS, step="a number in (0, 1]", aggregator=CHANCES,
        )  # fmt: skip

    @property
    def label(self) -> str:
        """The settings that tell it from others."""
        budget = f"shared {self.total:.12g} {self.unit} {self.aggregator}"
        return f"{budget} first={self.first} round={self.round} step={self.step:g}"

    @property
    def needs_score(self) -> bool:
        """Whether it looks at scores."""
        return self.aggregator in SCORED

    def check(self, questions: int, n: int, answer_rule: str) -> None:
        """Check that the budget is enough for `first` rollouts of each question."""
        needed = questions * min(self.first, n)
        require(
            "budget.total",
            f"{self.total:g}",
            self.unit != "rollouts" or self.total >= needed,
            f"{questions} questions with budget.first={self.first} need {needed} rollouts or more",
        )

    def next(self, tallies: Sequence[Tally]) -> Int64:
        """The first rollouts of all questions, or a round for those where it is worth most."""
        more_Q = np.zeros(len(tallies), dtype=np.int64)
        if not all(tally.drawn for tally in tallies):
            return np.array([0 if tally.drawn else min(self.first, tally.n) for tally in tallies], dtype=np.int64)
        left = self.total - sum(map(self._spent, tallies))
        if left < 0 and all(tally.drawn <= self.first for tally in tallies):
            log.warning(
                "budget.total=%g: the first %d rollouts of all questions alone took %.4g %s",
                self.total, self.first, self.total - left, self.unit.upper(),
            )  # fmt: skip
        rates = list(map(self._rate, tallies))
        by_rate = sorted(range(len(tallies)), key=lambda place: (-rates[place], tallies[place].drawn))
        for place in by_rate[: ceil(self.step * len(tallies))]:
            tally = tallies[place]
            size = self._size(tally) if rates[place] > 0 else 0
            if self.unit == "rollouts":
                size = min(size, int(left))
            elif self._cost(tally, size) > left:
                size = 0
            more_Q[place], left = size, left - self._cost(tally, size)
        return more_Q

    def stops(self, tallies: Sequence[Tally]) -> list[Stop]:
        """All that was drawn is used. Where every other question is at `n` or `worth`, part of the total is left."""
        stops = [Stop(tally.drawn, self._why(tally)) for tally in tallies]
        kinds, spent = {stop.why for stop in stops}, sum(map(self._spent, tallies))
        if "worth" in kinds and "total" not in kinds and spent < self.total:
            log.warning(
                "budget.total=%g: %.4g spent; the next %d rollouts of a question can change no pick",
                self.total, spent, self.round,
            )  # fmt: skip
        return stops

    def _why(self, tally: Tally) -> str:
        if tally.drawn == tally.n:
            return "n"
        return "total" if self._rate(tally) > 0 else "worth"

    def _size(self, tally: Tally) -> int:
        return min(self.round, tally.n - tally.drawn)

    def _spent(self, tally: Tally) -> float:
        return tally.drawn if self.unit == "rollouts" else tally.gflop

    def _cost(self, tally: Tally, size: int) -> float:
        """The expected cost of a round of the question."""
        if self.unit == "rollouts" or not size:
            return size
        return tally.prompt_gflop + size * float(tally.gflop_N.mean())

    def _rate(self, tally: Tally) -> float:
        """What a round of the question is worth, per unit of its cost."""
        size = self._size(tally)
        cost, chance = self._cost(tally, size), CHANCES[self.aggregator]
        return chance(tally, size) / cost if cost > 0 else 0.0


def chance_of_new_leader(tally: Tally, size: int) -> float:
    """Probability that the runner-up overtakes the leader of a vote within some rollouts; see `Shared`."""
    votes, left = tally.votes, tally.n - tally.drawn
    lead, second = float(votes.lead_N[-1]), float(votes.second_N[-1])
    if lead == 0:
        return 1.0
    if lead - second > left:
        return 0.0
    gained_K = np.arange(size + 1.0)
    log_mass_K = gammaln(size + 1) - gammaln(gained_K + 1) - gammaln(size - gained_K + 1)
    log_mass_K += betaln(gained_K + second + 1, size - gained_K + lead + 1) - betaln(second + 1, lead + 1)
    behind_K: Float64 = lead + (size - gained_K) - (second + gained_K)
    # a tie goes to whoever was voted for first, which is half of an overtaking
    return float((np.exp(log_mass_K) * ((behind_K < 0) + 0.5 * (behind_K == 0))).sum())


def chance_of_new_best(tally: Tally, size: int) -> float:
    """Probability that one of some rollouts scores above the best so far; see `Shared`."""
    count, scale, best = (float(each_N[-1]) for each_N in standing_of_best(tally.score_N))
    if count < MIN_SCORES:
        return 1.0
    return 1 - float(stdtr(count - 1, best)) ** size if scale > 0 else 0.0


CHANCES = {"majority": chance_of_new_leader, "best_of_n": chance_of_new_best}  # by aggregator
