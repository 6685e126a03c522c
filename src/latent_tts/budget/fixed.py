"""`budget=fixed`: n rollouts, reported at n."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Fixed:
    """n and nothing else."""

    name: ClassVar[str] = "fixed"

    def reported(self, n: int) -> list[int]:
        """The budgets that get rows in the metrics table."""
        return [n]
