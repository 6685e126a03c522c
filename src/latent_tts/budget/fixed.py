"""`budget=fixed`: report at n alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Fixed:
    """Reports at n alone."""

    name: ClassVar[str] = "fixed"
    adaptive: ClassVar[bool] = False

    def reported(self, n: int) -> list[int]:
        """Only n."""
        return [n]
