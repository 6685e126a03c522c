"""`budget=ladder`: n rollouts, reported at every power of two up to n, and at n."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Ladder:
    """1, 2, 4, ..., n: a whole curve from one set of rollouts."""

    name: ClassVar[str] = "ladder"

    def reported(self, n: int) -> list[int]:
        """The budgets that get rows in the metrics table."""
        return [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
