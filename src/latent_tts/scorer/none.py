"""`scorer=none`: rollouts have no scores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoScorer:
    """No scorer.

    Attributes:
        reason: why `scorer=auto` found none; None if the user asked for none.
    """

    reason: str | None = None

    def __str__(self) -> str:
        """Which option it is, and why."""
        return "scorer=none" if self.reason is None else f"scorer=auto: {self.reason}"
