"""`budget=adaptive`: rollouts in rounds; each question goes on until its rule says enough or n is reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from latent_tts.budget import AdaptiveBudget, Rule, Stop, Tally
from latent_tts.errors import check_fields
from latent_tts.types import Int64


@dataclass(frozen=True)
class Adaptive(AdaptiveBudget):
    """Gives each question a round of rollouts at a time, until its rule has enough.

    The rule is applied after every rollout, in their order. Rollouts of a round beyond the one at which it stopped are
    drawn and not used. A question's rollouts are the first ones of its full run.

    Attributes:
        rule: when a question has enough.
        round: rollouts per round.
        first: rollouts of the first round; None for as many.
    """

    rule: Rule
    round: int = 8
    first: int | None = None

    name: ClassVar[str] = "adaptive"

    def __post_init__(self) -> None:
        check_fields("budget", self, round="a positive integer", first="a positive integer, or null")

    @property
    def label(self) -> str:
        """The rule with its settings and the sizes of rounds."""
        settings = {field.name: getattr(self.rule, field.name) for field in fields(self.rule)}  # pyright: ignore
        settings |= {"round": self.round, "first": self.first}
        if "fitted" in settings:  # what the folder that it names gave
            settings["calibration"] = settings.pop("fitted")
        given = [f"{key}={value}" for key, value in settings.items() if value is not None]
        return f"{self.rule.name} {' '.join(given)}"

    @property
    def aggregator(self) -> str:
        """That of the rule."""
        return self.rule.aggregator

    @property
    def needs_score(self) -> bool:
        """Whether the rule reads scores."""
        return self.rule.needs_score

    def check(self, questions: int, n: int, answer_rule: str) -> None:
        """Check that the rule can be applied; see `AdaptiveBudget.check`."""
        self.rule.check(answer_rule)

    def next(self, tallies: Sequence[Tally]) -> Int64:
        """A round for each question that has neither enough nor n."""
        return np.array([self._more(tally) for tally in tallies], dtype=np.int64)

    def stops(self, tallies: Sequence[Tally]) -> list[Stop]:
        """Where the rule stopped each question, or n."""
        return [self.rule.stop(tally) or Stop(tally.drawn, "n", self.rule.at_cap) for tally in tallies]

    def _more(self, tally: Tally) -> int:
        if self.rule.stop(tally) is not None:
            return 0
        size = self.round if tally.drawn or self.first is None else self.first
        return min(size, tally.n - tally.drawn)
