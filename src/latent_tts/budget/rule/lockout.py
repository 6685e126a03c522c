"""`budget/rule=lockout` (default): stop when no vote still to come can change the pick of n rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latent_tts.budget import Rule, Tally
from latent_tts.errors import check_fields
from latent_tts.types import Bools

ROUNDING = 1e-9  # relative; sums of n weights in another order differ by far less
AGGREGATORS = ("majority", "weighted")


@dataclass(frozen=True)
class Lockout(Rule):
    """The vote of n rollouts with fewer of them, always the same answer.

    After k rollouts the leader has the weight a, a rival b, and m = (n - k) w is the most that the n - k rollouts left
    can add, with w the largest weight of a rollout (1 in a vote by majority). The rule stops when for every rival

        a > b + m,   or   a = b + m and the leader was voted for before the rival.

    Proof. A rival ends with at most b + m and the leader with at least a. If a > b + m, the leader wins. If a = b + m,
    the rival can at best tie, and a tie goes to the answer that was voted for first; both have their first votes. An
    answer without a vote so far is a rival with b = 0 whose first vote comes later. The pick is the first rollout that
    voted for the leader, and that one is drawn. Unreadable rollouts vote for none and use up rollouts.

    Classes that a late string can form anew (`task.answer=latex`): a is the weight of the leader's most frequent single
    string, and b that of all other readable rollouts together. A class always holds all rollouts of a string. So the
    class of this string has at least a, and every other at most b + m: the elected class is that of this string. It may
    be written as another form of the same value.

    `weighted` votes: weights are exp(score / temperature), so w is known only with a range of scores, which
    `scorer.range` declares and scoring enforces. a has to exceed b + m by a part in 1e9, since sums are rounded.

    Attributes:
        aggregator: `majority` or `weighted`.
    """

    aggregator: str = "majority"

    name: ClassVar[str] = "lockout"

    def __post_init__(self) -> None:
        check_fields("budget.rule", self, aggregator=AGGREGATORS)

    def enough(self, tally: Tally) -> Bools:
        """Whether the pick of n is known, after each rollout."""
        assert tally.max_log_weight is not None, "the largest weight is not known"
        votes = tally.votes if tally.equal is None else tally.string_votes
        left_N1 = tally.n - np.arange(1, tally.drawn + 1.0)[:, None]
        leader_N1, lead_N1 = votes.leader_N[:, None], votes.lead_N[:, None]
        first_N1 = np.take_along_axis(votes.first_NK, leader_N1, 1)
        # the leader's own column stands for an answer that nobody has voted for yet
        rival_NK, rival_first_NK = votes.weight_NK.copy(), votes.first_NK.copy()
        np.put_along_axis(rival_NK, leader_N1, 0.0, 1)
        np.put_along_axis(rival_first_NK, leader_N1, tally.drawn, 1)
        if tally.equal is not None:  # the others may become one class
            rival_NK, rival_first_NK = rival_NK.sum(1, keepdims=True), rival_first_NK.min(1, keepdims=True)
        reached_NK = rival_NK + left_N1
        locked_NK = lead_N1 * (1 - ROUNDING) > reached_NK
        if self.aggregator == "majority":  # weights may be 0 and 1 because the others underflow: those are no counts
            locked_NK |= (lead_N1 == reached_NK) & (first_N1 < rival_first_NK)
        return locked_NK.all(1) & (left_N1[:, 0] > 0)
