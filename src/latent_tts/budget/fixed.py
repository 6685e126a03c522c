"""`budget=fixed`: report at n only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Fixed:
    """Reports at n only."""

    name: ClassVar[str] = "fixed"

    def reported(self, n: int) -> list[int]:
        """Only n."""
        return [n]
