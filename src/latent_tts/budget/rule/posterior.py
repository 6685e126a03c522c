"""`budget/rule=posterior`: the Beta rule of Adaptive-Consistency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scipy.special import betainc

from latent_tts.budget import Rule, Tally
from latent_tts.errors import is_number, require
from latent_tts.types import Bools


@dataclass(frozen=True)
class Posterior(Rule):
    """Stops when the leader is more probable than the runner-up with a posterior probability of `threshold`.

        P(p > 1/2 | a, b) = 1 - I_1/2(a+1, b+1) >= threshold

    with a and b the votes of leader and runner-up, p the leader's share of both, a uniform prior over p, and I the
    regularised incomplete beta function. Four unanimous rollouts are enough for 0.95.

    This is the rule that people know. It bounds no error: it looks after every rollout, so that chance has many tries,
    and it compares the two answers that are ahead by then. Of answers with shares .4, .35, .25 and n=64 it stops in a
    third of the cases, and 30 % of these stops are on the wrong answer. `budget/rule=certified` bounds the error.

    Source: Aggarwal et al. 2023, Adaptive-Consistency (arXiv 2305.11860), section 3.

    Attributes:
        threshold: in (0.5, 1).
    """

    threshold: float = 0.95

    name: ClassVar[str] = "posterior"

    def __post_init__(self) -> None:
        ok = is_number(self.threshold) and 0.5 < self.threshold < 1
        require("budget.rule.threshold", self.threshold, ok, "must be a number in (0.5, 1)")

    def enough(self, tally: Tally) -> Bools:
        """Whether the posterior probability is high enough, after each rollout."""
        return 1 - betainc(tally.votes.lead_N + 1, tally.votes.second_N + 1, 0.5) >= self.threshold
