"""`scorer=none`: rollouts get no scores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoScorer:
    """The absence of a scorer.

    Attributes:
        reason: why there is none, where that was not asked for.
    """

    reason: str | None = None
