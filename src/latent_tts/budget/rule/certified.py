"""`budget/rule=certified`: stop when the pick is the mode of the answers, with an error probability up to delta."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import ClassVar

from scipy.special import betaln

from latent_tts.budget import NOT_CERTIFIED, Rule, Tally
from latent_tts.errors import RunError, bad_value, check_fields, is_whole, require
from latent_tts.types import Bools


@dataclass(frozen=True)
class Certified(Rule):
    """PPR-1v1: the leader is the most probable answer of the model, with probability at least 1 - delta.

    With a votes for the leader and b for a rival, the rule stops when for every rival

        R(a, b) = 2^(a+b) B(a+1, b+1) >= threshold,   B the beta function.

    `answers=K` given: threshold = (K - 1) / delta. Not given: the leader's first vote does not count (a - 1 in place of
    a), and threshold = (n - 1) / delta; valid for any number of answers. Unanimous rollouts stop after 16 of n=64.

    Proof. Take two answers, the more probable one (the mode, with true share p_1) and another with p_2 < p_1. Of the
    rollouts that vote for either, let q <= 1/2 be the probability that one votes for the other. For a prior uniform
    over q, 1 / (density of the posterior at q) is a martingale with mean 1, so by Ville's inequality it ever reaches
    1/alpha with probability at most alpha. With the other answer in the lead (a > b), the posterior density decreases
    from a / (a + b) > 1/2 down to 0, so that it is at q <= 1/2 at most what it is at 1/2, where its inverse is R(a, b).
    So R(a, b) >= 1/alpha with the other answer in the lead happens with probability at most alpha, whenever one looks.

    The rule stops wrongly only if it stops with a leader that is not the mode, and then R of this leader against the
    mode has reached the threshold. With K answers, K - 1 others can do so, each with probability delta / (K - 1): delta
    together. Without K, every wrong leader is the answer of some rollout i that voted for it first, i < n. Given the
    first i rollouts, those after i are as independent as before, and the argument holds for the answer of rollout i and
    the mode with the votes after i alone: a - 1 for it, and some b' <= b for the mode. R decreases in its second
    argument up to its first, so R(a - 1, b) >= threshold with a - 1 > b implies the same of b'. There are n - 1 such i:
    delta.

    The rule speaks of rollouts that are drawn independently, so `search=beam` refuses it. It says nothing of whether
    the mode is right. Unreadable rollouts do not vote. Only the strongest rival need be looked at, since R decreases in
    b.

    Source: Jain et al. 2022, PAC mode estimation using PPR martingale confidence sequences (arXiv 2109.05047); the
    threshold without K is this project's own.

    Attributes:
        delta: largest probability of a wrong stop, in (0, 1).
        answers: K, the number of different answers that the model can give to a question; None if it is not known.
    """

    delta: float = 0.05
    answers: int | None = None

    name: ClassVar[str] = "certified"
    at_cap: ClassVar[str] = NOT_CERTIFIED

    def __post_init__(self) -> None:
        check_fields("budget.rule", self, delta="a number in (0, 1)")
        ok = self.answers is None or (is_whole(self.answers) and self.answers >= 2)
        require("budget.rule.answers", self.answers, ok, "must be 2 or more, or null where it is not known")

    def check(self, answer_rule: str) -> None:
        """Refuse LaTeX: the certificate is of fixed answers, and a late string can form its classes anew."""
        if answer_rule == "latex":
            allowed = "certifies answers that are equal as strings; task.answer=latex compares values"
            raise bad_value("budget/rule", self.name, allowed)

    @property
    def certificate(self) -> str:
        """The largest probability that the pick is not the mode."""
        return f"error <= {self.delta:g}"

    def enough(self, tally: Tally) -> Bools:
        """Whether the leader is certified, after each rollout."""
        votes = tally.votes
        seen = int((votes.weight_NK[-1] > 0).sum())
        if self.answers is not None and seen > self.answers:
            raise RunError(
                f"budget.rule.answers={self.answers}: a question has {seen} different answers\n"
                "leave it out (null) where their number is not known"
            )
        threshold = max(1, (tally.n if self.answers is None else self.answers) - 1) / self.delta
        a_N, b_N = votes.lead_N - (self.answers is None), votes.second_N
        log_ratio_N = (a_N + b_N) * log(2) + betaln(a_N + 1, b_N + 1)
        return (a_N > b_N) & (log_ratio_N >= log(threshold))
