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
