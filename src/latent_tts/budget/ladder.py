"""`budget=ladder` (default): report at every power of two below n, and at n."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latent_tts.budget import Budget


@dataclass(frozen=True)
class Ladder(Budget):
    """Reports at 1, 2, 4, ..., n: a whole curve from one set of rollouts."""

    name: ClassVar[str] = "ladder"

    def reported(self, n: int) -> list[int]:
        """1, 2, 4, ..., n."""
        return [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
