"""How many rollouts the questions of a run get, and at which numbers metrics are reported; one option per module.

`fixed` and `ladder` give every question n rollouts. `adaptive` and `shared` look at what a question has so far (its
`Tally`) and decide how many more it gets: `next` is called until no question gets any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from latent_tts.text.answer import shared_forms
from latent_tts.types import Bools, Float64, Int64

TIE = 1e-12  # relative; as in `results.statistics`: sums of equal weights differ by less, whatever their order
NOT_CERTIFIED = "not certified"
SCORED = ("weighted", "best_of_n")  # aggregators that read scores
MIN_SCORES = 3  # Student's t needs two degrees of freedom for an expected gain


@dataclass(frozen=True)
class Votes:
    """The votes of a question after each of its rollouts; K classes of answers, which may differ from row to row.

    Attributes:
        weight_NK: summed weights of each class; 0 where it has no vote.
        first_NK: number of the rollout that voted for it first; N where none has.
    """

    weight_NK: Float64
    first_NK: Int64

    @cached_property
    def leader_N(self) -> Int64:
        """The class that a vote elects: the largest weight; of tied ones, the one that was voted for first."""
        best_NK = self.weight_NK >= self.weight_NK.max(1, keepdims=True) * (1 - TIE)
        return np.where(best_NK, self.first_NK, self.first_NK.max() + 1).argmin(1)

    @cached_property
    def lead_N(self) -> Float64:
        """The weight of the leader."""
        return np.take_along_axis(self.weight_NK, self.leader_N[:, None], 1)[:, 0]

    @cached_property
    def second_N(self) -> Float64:
        """The largest weight of a rival of the leader; 0 where there is none."""
        rivals_NK = self.weight_NK.copy()
        np.put_along_axis(rivals_NK, self.leader_N[:, None], 0.0, 1)
        return rivals_NK.max(1)


@dataclass(frozen=True)
class Tally:
    """What a question has after some of its rollouts. Nothing in it says which answer is right.

    Attributes:
        n: the most rollouts that it may get.
        answers: the canonical answers in the order of rollouts; None for unreadable ones, which do not vote.
        log_weight_N: logarithms of the weights of the votes: 0 for a vote by majority. NaN for none.
        max_log_weight: the largest that a rollout can have; None where it is not known.
        logprob_N: summed log-probability of each answer.
        score_N: score of each rollout; NaN where it has none.
        equal: whether two answers are one vote; None where only equal strings are. Equality by value is not transitive,
            so that a later answer can regroup the earlier ones.
        prompt_gflop: what a round of the question costs, however many rollouts it has: the prompt is run in each.
        gflop_N: what each rollout costs beyond that.
        rounds: in which it got rollouts.
    """

    n: int
    answers: Sequence[str | None]
    log_weight_N: Float64
    logprob_N: Float64
    score_N: Float64
    max_log_weight: float | None = 0.0
    equal: Callable[[str, str], bool] | None = None
    prompt_gflop: float = 0.0
    gflop_N: Float64 = field(default_factory=lambda: np.zeros(0))
    rounds: int = 0

    @property
    def drawn(self) -> int:
        """The number of rollouts so far."""
        return len(self.answers)

    @property
    def gflop(self) -> float:
        """What its rollouts cost, in the rounds that they were drawn in."""
        return self.rounds * self.prompt_gflop + float(self.gflop_N.sum())

    @cached_property
    def weight_N(self) -> Float64:
        """The weights of the votes, relative to the largest possible (or, if that is not known, the largest so far)."""
        readable_N = np.array([answer is not None for answer in self.answers], dtype=bool)
        votes_N = readable_N & np.isfinite(self.log_weight_N)
        most = self.max_log_weight
        if most is None:
            most = float(self.log_weight_N[votes_N].max()) if votes_N.any() else 0.0
        return np.exp(np.where(votes_N, self.log_weight_N - most, -np.inf))

    @cached_property
    def string_votes(self) -> Votes:
        """The votes where every string is a class of its own."""
        code_N, voting_N = _codes(self.answers), self.weight_N > 0
        first_K = np.full(int(code_N.max(initial=0)) + 1, self.drawn)
        np.minimum.at(first_K, code_N[voting_N], np.flatnonzero(voting_N))
        since_NK = np.arange(self.drawn)[:, None] >= first_K
        return Votes(_sums(code_N, self.weight_N), np.where(since_NK, first_K, self.drawn))

    @cached_property
    def votes(self) -> Votes:
        """The votes by class, after each rollout as they are formed of the answers until then."""
        if self.equal is None:
            return self.string_votes
        weight_NK = self.sums(self.weight_N)
        first_NK = np.full(weight_NK.shape, self.drawn)
        for place, code_N in enumerate(self._classes):
            voting_N = self.weight_N[: place + 1] > 0
            np.minimum.at(first_NK[place], code_N[voting_N], np.flatnonzero(voting_N))
        return Votes(weight_NK, first_NK)

    def sums(self, value_N: NDArray[Any]) -> Float64:
        """Sums (N, K) of a value of each rollout over the classes of `votes`, after each rollout."""
        if self.equal is None:
            return _sums(self.class_N, value_N)
        sum_NK = np.zeros((self.drawn, max(1, len(set(self.answers) - {None}))))
        for place, code_N in enumerate(self._classes):
            read_N = code_N >= 0
            sum_NK[place] = np.bincount(code_N[read_N], value_N[: place + 1][read_N], sum_NK.shape[1])
        return sum_NK

    @property
    def class_N(self) -> Int64:
        """The class of each answer among all of them; -1 for unreadable ones."""
        return _codes(self.answers) if self.equal is None else self._classes[-1]

    @cached_property
    def _classes(self) -> list[Int64]:
        """After each rollout the classes of the answers until then; -1 for unreadable ones."""
        assert self.equal is not None
        classes: list[Int64] = []
        known: set[str | None] = {None}
        form_of: dict[str | None, str | None] = {None: None}
        for place, answer in enumerate(self.answers):
            if answer not in known:
                known.add(answer)
                distinct = list(known)
                form_of = dict(zip(distinct, shared_forms(distinct, self.equal), strict=True))
            classes.append(_codes([form_of[each] for each in self.answers[: place + 1]]))
        return classes

    def until(self, count: int) -> Tally:
        """The same after its first rollouts only."""
        return Tally(
            self.n, self.answers[:count], self.log_weight_N[:count], self.logprob_N[:count], self.score_N[:count],
            self.max_log_weight, self.equal, self.prompt_gflop, self.gflop_N[:count], self.rounds,
        )  # fmt: skip


def _codes(answers: Sequence[str | None]) -> Int64:
    """Answers numbered from 0 in the order of their first occurrence; -1 for None."""
    numbers: dict[str | None, int] = {}
    return np.array(
        [-1 if answer is None else numbers.setdefault(answer, len(numbers)) for answer in answers], dtype=np.int64
    )


def _sums(code_N: Int64, value_N: NDArray[Any]) -> Float64:
    added_NK = np.zeros((len(code_N), int(code_N.max(initial=0)) + 1))
    readable_N = np.flatnonzero(code_N >= 0)
    added_NK[readable_N, code_N[readable_N]] = value_N[readable_N]
    return added_NK.cumsum(0)


def standing_of_best(score_N: Float64) -> tuple[Float64, Float64, Float64]:
    """Where the best score so far is in the distribution of the next one, after each rollout.

    Scores of a question are taken as normal with unknown mean and variance (prior 1/variance), so that the next one is
    Student's t with k - 1 degrees of freedom around the mean of the k scores so far, with scale sd sqrt(1 + 1/k).

    Args:
        score_N: of each rollout; NaN where it has none.

    Returns:
        k; the scale, 0 where the scores are equal; and the best score in units of the scale, from the mean (0 there).
    """
    scored_N = np.isfinite(score_N)
    value_N = np.where(scored_N, score_N, 0.0)
    count_N = scored_N.cumsum().astype(float)
    k_N = np.maximum(count_N, MIN_SCORES)
    origin = value_N[scored_N.argmax()]  # sums are about the first score, so that a large mean costs no digits
    moved_N = np.where(scored_N, value_N - origin, 0.0)
    mean_N = moved_N.cumsum() / k_N
    square_N = np.maximum(np.square(moved_N).cumsum() - k_N * np.square(mean_N), 0.0)
    scale_N = np.sqrt(square_N / (k_N - 1) * (1 + 1 / k_N))
    scale_N[scale_N <= 1e-12 * max(1.0, abs(origin))] = 0.0
    best_N = np.maximum.accumulate(np.where(scored_N, moved_N, -np.inf))
    known_N = (count_N >= MIN_SCORES) & (scale_N > 0)
    return count_N, scale_N, np.divide(best_N - mean_N, scale_N, out=np.zeros_like(mean_N), where=known_N)


@dataclass(frozen=True)
class Stop:
    """Where a question needs no more rollouts.

    Attributes:
        used: rollouts that its answer is of; those drawn beyond are not used.
        why: the rule that said so, `n` (it has all), `total` (the budget is spent), or `worth` (no round is worth
            anything).
        certificate: what is known of the answer's error, for rules that say so.
    """

    used: int
    why: str
    certificate: str = ""


class Rule(Protocol):
    """When a question has enough rollouts; an option of the group `budget/rule`. Options inherit these defaults.

    Attributes:
        name: as shown in tables.
        at_cap: the certificate of a question that reached n.
        aggregator: name of the aggregator whose pick it stops for.
    """

    name: ClassVar[str]
    at_cap: ClassVar[str] = ""
    aggregator: str = "majority"

    @property
    def needs_score(self) -> bool:
        """Whether it reads scores; as the aggregator does, if it does not say otherwise."""
        return self.aggregator in SCORED

    @property
    def certificate(self) -> str:
        """What is known of the error of a question that it stopped."""
        return ""

    def check(self, answer_rule: str) -> None:
        """Check that it can be applied to answers of a kind (`decimal`, `latex` or `words`).

        Raises:
            UsageError: it cannot.
        """

    def enough(self, tally: Tally) -> Bools:
        """Whether there are enough (N,), after each of one or more rollouts; what comes later does not matter."""
        ...

    def stop(self, tally: Tally) -> Stop | None:
        """The first rollout after which there are enough; None if there are not."""
        enough_N = self.enough(tally) if tally.drawn else np.zeros(0, dtype=bool)
        return Stop(int(enough_N.argmax()) + 1, self.name, self.certificate) if enough_N.any() else None


class Budget(Protocol):
    """How many rollouts the questions of a run get. Options inherit these defaults.

    Attributes:
        name: of the option.
        adaptive: whether that depends on the rollouts, so that questions have unequally many.
    """

    name: ClassVar[str]
    adaptive: ClassVar[bool] = False

    def reported(self, n: int) -> list[int]:
        """The numbers of rollouts with rows in the metrics table: ascending, in [1, n], the last is n."""
        return [n]


class AdaptiveBudget(Budget, Protocol):
    """A budget that looks at what questions have so far. So a smaller n is another run, and only n is reported."""

    adaptive: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Its name in tables, with the settings that tell it from others of its kind."""
        ...

    @property
    def aggregator(self) -> str:
        """Name of the aggregator that the run reports."""
        ...

    @property
    def needs_score(self) -> bool:
        """Whether it reads scores."""
        ...

    def check(self, questions: int, n: int, answer_rule: str) -> None:
        """Check that it can be applied to a run.

        Args:
            questions: how many there are.
            n: the most rollouts of each.
            answer_rule: `decimal`, `latex` or `words`.

        Raises:
            UsageError: it cannot.
        """

    def next(self, tallies: Sequence[Tally]) -> Int64:
        """How many more rollouts each question gets (Q,); all 0: they have enough."""
        ...

    def stops(self, tallies: Sequence[Tally]) -> list[Stop]:
        """Where each question ended, when all have enough."""
        ...


def is_adaptive(budget: Budget) -> TypeGuard[AdaptiveBudget]:
    """Whether a budget looks at what questions have so far."""
    return budget.adaptive


def play(
    budget: AdaptiveBudget, questions: int, tallies_after: Callable[[Int64], list[Tally]]
) -> tuple[list[Tally], list[Stop]]:
    """Rounds of rollouts until no question gets any more.

    Args:
        budget: who gets how many.
        questions: Q.
        tallies_after: what each question has after so many of its rollouts (Q,), drawn now or drawn before.

    Returns:
        What each question has at the end, and where it ended.
    """
    drawn_Q, rounds_Q = np.zeros(questions, dtype=np.int64), np.zeros(questions, dtype=np.int64)
    while True:
        after = zip(tallies_after(drawn_Q), rounds_Q, strict=True)
        tallies = [replace(tally, rounds=int(rounds)) for tally, rounds in after]
        more_Q = budget.next(tallies)
        if not more_Q.any():
            return tallies, budget.stops(tallies)
        drawn_Q, rounds_Q = drawn_Q + more_Q, rounds_Q + (more_Q > 0)
